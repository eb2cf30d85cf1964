"""`genarm compose --from`: a guided folder with rewards added, dropped and weighed anew, against composing it so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from builders.tiny import save_member, tiny_lora, tiny_model
from genarm import GuidedForCausalLM
from genarm.cli.main import main
from genarm.data.presets import read_presets, write_preset

IDS = torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14]])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("from")
    base = tiny_model(seed=0)
    save_member(base, root / "base")
    save_member(tiny_model("qwen2", seed=3, hidden=16), root / "full")
    for seed, name in enumerate(("kind", "brief"), start=1):
        tiny_lora(base, root / name, seed=seed, base_path=str(root / "base"))
    options = ("--describe", "kind=is kind", "--set", "base.dtype=float32")
    write(root, "guided", "--base", "base", "--reward", "kind=kind:0.5", "--tuned", "brief=brief:-1", *options)
    return root


def write(root: Path, output: str, *arguments: str, code: int = 0) -> Path:
    """`genarm compose`; names of what is in `root` stand for it."""
    places = {path.name: str(path) for path in root.iterdir()}
    words = []
    for word in arguments:
        name, equals, value = word.partition("=")
        path, colon, weight = value.partition(":")
        words.append(f"{name}={places[path]}{colon}{weight}" if equals and path in places else places.get(word, word))
    for at, word in enumerate(arguments):
        if word == "--drop":
            words[at + 1] = arguments[at + 1]
    assert main(["compose", *words, "--output", str(root / output)]) == code
    return root / output


def record(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def logits(folder: Path, **weights: float) -> torch.Tensor:
    found: torch.Tensor = GuidedForCausalLM.from_pretrained(folder)(IDS, reward_weights=weights or None).logits
    return found


def test_nothing_changed_is_the_same(root: Path) -> None:
    again = write(root, "again", "--from", "guided")
    assert record(again) == record(root / "guided")
    assert torch.equal(logits(again), logits(root / "guided"))
    for name in ("tokenizer.json", "generation_config.json"):
        assert (again / name).read_text() == (root / "guided" / name).read_text()


def test_what_is_added_and_dropped_again_leaves_no_trace(root: Path) -> None:
    more = write(root, "more", "--from", "guided", "--reward", "third=full:2", "--wish", "calm=Be calm.")
    assert [*GuidedForCausalLM.from_pretrained(more).default_weights] == ["kind", "brief", "calm", "third"]
    less = write(root, "less", "--from", str(more), "--drop", "third", "--drop", "calm")
    assert record(less) == record(root / "guided")
    assert torch.equal(logits(less), logits(root / "guided"))


def test_weighed_anew_is_composed_anew(root: Path) -> None:
    weighed = write(root, "weighed", "--from", "guided", "--weight", "kind=3", "--weight", "brief=0.25")
    options = ("--describe", "kind=is kind", "--set", "base.dtype=float32")
    anew = write(root, "anew", "--base", "base", "--reward", "kind=kind:3", "--tuned", "brief=brief:0.25", *options)
    assert record(weighed) == record(anew)
    assert torch.equal(logits(weighed), logits(root / "guided", kind=3.0, brief=0.25))


def test_a_reward_in_the_place_of_another(root: Path) -> None:
    new = write(root, "replaced", "--from", "guided", "--drop", "kind", "--reward", "kind=full:0.5")
    anew = write(root, "replacement", "--base", "base", "--tuned", "brief=brief:-1", "--reward", "kind=full:0.5")
    torch.testing.assert_close(logits(new), logits(anew))
    assert {reward["name"]: reward.get("model") for reward in record(new)["rewards"]}["kind"] == str(root / "full")


def test_presets_come_along(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(root, "with-presets", "--from", "guided")
    write_preset(source, "soft", {"kind": 0.1}, 0.5)
    write_preset(source, "both", {"kind": 1.0, "brief": 1.0}, None)
    assert read_presets(write(root, "kept", "--from", str(source))) == read_presets(source)
    capsys.readouterr()
    assert read_presets(write(root, "one", "--from", str(source), "--drop", "brief")) == {
        "soft": {"kind": 0.1, "max_kl": 0.5}
    }
    assert "note: the presets both are left behind" in capsys.readouterr().out


def test_a_bundle_that_others_lean_on_is_said(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write(root, "bundle", "--from", "guided", "--bundle")
    assert "must stay there" not in capsys.readouterr().out
    leaning = write(root, "leaning", "--from", str(bundle))
    assert f"lie in {bundle}, which must stay there; --bundle copies them" in capsys.readouterr().out
    assert torch.equal(logits(leaning), logits(root / "guided"))
    whole = write(root, "whole", "--from", str(bundle), "--bundle")
    assert record(whole) == record(bundle)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "base", "--reward", "kind=kind"], "is not a guided folder; give a model as --base"),
        (["--from", "nosuch"], "there is no folder 'nosuch' here"),
        (["--from", "guided", "--drop", "kindness"], "has no reward 'kindness' to drop; its rewards are: kind, brief"),
        (["--from", "guided", "--drop", "kind", "--drop", "brief"], "needs at least one reward"),
        (["--from", "guided", "--reward", "kind=full"], "has a reward 'kind' already"),
        (["--from", "guided", "--weight", "kindness=1"], "no reward is named 'kindness'; this model has: kind, brief"),
        (["--base", "base", "--reward", "kind=kind", "--drop", "kind"], "name the folder with --from"),
        (["--from", "guided", "--private"], "--private is for --push REPO"),
    ],
)
def test_wrong_inputs(root: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    places = {path.name: str(path) for path in root.iterdir()}
    write(root, "wrong", *arguments, code=2)
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (root / "wrong").exists()
    assert "guided" in places


def test_an_output_that_is_there(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(root, "guided", "--from", "guided", code=2)
    assert "already exists and is not empty" in capsys.readouterr().err
