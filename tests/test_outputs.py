"""Places that cannot be written to are refused before any model is looked at, by every command that writes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from genarm.cli.main import main

FILES = {
    "generate": ["generate", "no-model", "--prompt", "w1", "--output"],
    "pairs": ["pairs", "--model", "no-model", "--prompts", "no.jsonl", "--score", "last-number=k", "--output"],
    "judge": ["judge", "no.jsonl", "no.jsonl", "--protocol", "helpful", "--model", "m", "--output"],
    "accuracy": ["accuracy", "no-model", "--data", "no.jsonl", "--output"],
    "score": ["score", "no-model", "--prompt", "w1", "--response", "w2", "--html"],
}
FOLDERS = {
    "compose": ["compose", "--base", "no-model", "--reward", "r=no-model", "--output"],
    "train": ["train", "--model", "no-model", "--data", "no.jsonl", "--output"],
    "eval": ["eval", "recipe.toml", "--scale", "tiny", "--output"],
    "demo": ["demo", "--output"],
    "tune": ["tune", "no-model", "--pairs", "no.jsonl", "--output"],
    "bench": ["bench", "decode", "--real", "no-model", "no-model", "--output"],
    "bench serve": ["bench", "serve", "no-model", "--output"],
}
RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "hh-rlhf.toml"


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_a_place_that_cannot_be_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The models that are named are not there, and what is said is about the output: nobody has looked for them."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.toml").write_bytes(RECIPE.read_bytes())
    Path("file").write_text("kept", encoding="utf-8")
    Path("folder").mkdir()
    Path("folder", "kept").write_text("kept", encoding="utf-8")
    places = ["file/below", "file/far/below", f"{'n' * 300}", "folder" if name in FILES else "file"]
    if os.geteuid() != 0:  # root may write everywhere
        Path("closed").mkdir(mode=0o500)
        places += ["closed/new", "closed/far/new"]
    before = sorted(tmp_path.rglob("*"))
    for place in places:
        assert main([*FILES.get(name, FOLDERS.get(name, [])), place]) == 2, place
        *_, said = capsys.readouterr().err.strip().splitlines()
        assert place in said, said
        assert "no-model" not in said
        assert sorted(tmp_path.rglob("*")) == before
