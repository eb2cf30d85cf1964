"""docs/walk-through.md: its commands, run as they are written (slow), and on a smaller world in one process."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from genarm.cli.main import main
from genarm.lab.demo.base import BaseSettings, train_base
from genarm.lab.demo.pairs import Duel, judge, write_pairs
from genarm.lab.demo.world import Kind, parse_reply, split_requests

PAGE = Path(__file__).resolve().parents[1] / "docs" / "walk-through.md"

SMALLER = {
    "head -n 400": "head -n 60",
    "head -n 200": "head -n 60",
    "--samples 8": "--samples 6",
    "--epochs 3": "--epochs 4",
    "--weights wish=1": "--weights wish=3",
}
"""What the quick version changes in the commands."""


def blocks() -> list[str]:
    found: list[str] = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert found[0] == "genarm demo\n"
    return found


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}


def run_in_one_process(block: str) -> None:
    """As a shell would, but every `genarm` command here: starting Python for each would take most of the time."""
    shell: list[str] = []
    for line in [*block.replace("\\\n", " ").splitlines(), "genarm"]:
        if not line.startswith("genarm"):
            shell.append(line)
            continue
        subprocess.run(["bash", "-euo", "pipefail", "-c", "\n".join(shell)], check=True, env=environment())
        shell.clear()
        if words := shlex.split(line)[1:]:
            assert main(words) == 0, line


@pytest.fixture
def smaller_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the commands after `genarm demo` need of its folder; the module `wish` is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    split, console = split_requests(0), Console(file=io.StringIO())
    train_base(
        tmp_path / "genarm-demo" / "base",
        split.train,
        settings=BaseSettings(layers=2, hidden=96, replies=4500),
        seed=0,
        console=console,
    )
    for name, requests in (("helpful", split.train), ("helpful-held-out", split.held_out)):
        duels = [Duel(request, "One.", "Two.") for request in requests[:60]]
        write_pairs(tmp_path / "genarm-demo" / "pairs" / f"{name}.jsonl", judge(duels, "helpful", sharpness=1, seed=0))
    yield
    sys.modules.pop("wish", None)


def test_the_commands_lead_to_a_guided_model(smaller_world: None) -> None:
    """All but the demo itself; fewer prompts and a stronger weight, and still fewer drastic steps than the base's."""
    for block in blocks()[1:]:
        for written, instead in SMALLER.items():
            block = block.replace(written, instead)
        run_in_one_process(block)
    base, wish = drastic_share(Path("base.jsonl")), drastic_share(Path("wish.jsonl"))
    assert base > 0.1
    assert wish < base / 2
    alone = ["generate", "genarm-demo/base", "--input", "held-out.jsonl", "--output", "alone.jsonl"]
    assert main([*alone, "--max-new-tokens", "64", "--batch-size", "32"]) == 0
    assert responses(Path("alone.jsonl")) == responses(Path("base.jsonl"))


def test_the_quick_version_still_changes_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert all(written in text for written in SMALLER)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_page_as_it_is_written(tmp_path: Path) -> None:
    """Every command, in a shell; the effect is beyond doubt and near the printed one."""
    script = "set -euo pipefail\n" + "\n".join(blocks())
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    printed = re.findall(r"```text\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)[0]
    for now, then in zip(figures(done.stdout), figures(printed), strict=True):
        assert now == pytest.approx(then, abs=0.1 if then < 1 else 0.3)
    base, wish = re.findall(r"drastic step: \S+ \[(\S+), (\S+)\]", done.stdout)
    assert float(wish[1]) < float(base[0])


def figures(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"(?:drastic step|gentle steps): ([0-9.]+)", text)]


def responses(path: Path) -> list[str]:
    return [json.loads(line)["response"] for line in path.read_text(encoding="utf-8").splitlines()]


def drastic_share(path: Path) -> float:
    replies = responses(path)
    return sum(any(s.kind is Kind.DRASTIC for s in parse_reply(reply)) for reply in replies) / len(replies)
