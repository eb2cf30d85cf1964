"""`genarm push` and `compose --push`: to a hub on this machine, by huggingface_hub's own client, and back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants

from builders.hub import TOKEN, Hub, local_hub
from builders.tiny import save_member, tiny_lora, tiny_model
from genarm import GuidedForCausalLM, compose
from genarm.cli.main import main
from genarm.model.describe import describe
from genarm.model.publish import card

IDS = [[7, 8, 9, 10]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("push")
    base = tiny_model(seed=0)
    save_member(base, root / "base")
    (root / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    for seed, name in enumerate(("kind", "brief"), start=1):
        tiny_lora(base, root / name, seed=seed, base_path=str(root / "base"))
        (root / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    trained = 'kind = "arm"\nloss = "arm"\nbeta = 0.05\nmodel = "owner/base"\ndata = "owner/pairs"\n'
    (root / "kind" / "train_config.toml").write_text(trained)
    (root / "kind" / "inputs.json").write_text("{}")
    (root / "kind" / "metrics.json").write_text('{"eval_accuracy": 0.75, "eval_pairs": 40}')
    compose(
        root / "base", {"kind": root / "kind"}, root / "guided", weights={"kind": 0.5}, wishes={"calm": "Be | calm."}
    )
    return root


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process talks to."""
    with local_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


READER = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("me/guided", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("me/guided")
torch.save(model(torch.tensor({ids}), reward_weights={{"calm": 0}}).logits, {out!r})
assert model.encode("w1 w2", tokenizer=tokenizer)["contexts"].columns == 2
import genarm
from genarm.cli.main import main
own = genarm.GuidedForCausalLM.from_pretrained("me/guided")
assert type(own) is type(AutoModelForCausalLM.from_pretrained("me/guided"))
assert main(["show", "me/guided"]) == 0
assert main(["generate", "me/guided", "--prompt", "w1 w2", "--max-new-tokens", "2"]) == 0
assert main(["compose", "--from", "me/guided", "--weight", "kind=2", "--output", {again!r}]) == 0
"""


def test_there_and_back_again(root: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """What is uploaded loads elsewhere: in a process of its own, with a cache of its own, by the name alone."""
    assert main(["push", str(root / "guided"), "me/guided", "--private"]) == 0
    said = capsys.readouterr().out
    assert f"{hub.url}/me/guided: " in said
    assert "genarm chat me/guided loads it from anywhere" in said
    files = hub.repos["me/guided"]
    wanted = {"README.md", "config.json", "genarm_model.py", "generation_config.json", "tokenizer.json"}
    inside = {"members/base/model.safetensors", "members/kind/adapter_model.safetensors"}
    assert wanted | inside | {"members/kind/train_config.toml"} <= {*files}
    assert "members/kind/inputs.json" not in files  # where things were on this machine
    assert str(root).encode() not in files["config.json"] + files["README.md"]
    ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    program = READER.format(ids=IDS, out=str(tmp_path / "logits"), again=str(tmp_path / "again"))
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, **ours}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "me/guided is a guided folder: a base and 2 rewards" in done.stdout
    own = GuidedForCausalLM.from_pretrained(root / "guided")
    expected = own(torch.tensor(IDS), reward_weights={"calm": 0}).logits
    assert torch.equal(torch.load(tmp_path / "logits", weights_only=True), expected)


def test_composed_and_pushed_at_once(root: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    composing = ["compose", "--base", str(root / "base"), "--tuned", f"brief={root / 'brief'}"]
    options = ["--output", str(tmp_path / "out"), "--push", "other", "--license", "mit", "--private"]
    assert main([*composing, *options]) == 0
    assert (hub.private, {*hub.repos}) == ({"me/other"}, {"me/other"})
    assert ModelCard(hub.repos["me/other"]["README.md"].decode()).data.license == "mit"
    assert f"{hub.url}/me/other: " in capsys.readouterr().out


def test_what_is_dropped_leaves_the_hub_too(root: Path, tmp_path: Path, hub: Hub) -> None:
    compose(root / "guided", {"brief": root / "brief"}, tmp_path / "two")
    (tmp_path / "two" / "README.md").write_text("A card by hand.")
    assert main(["push", str(tmp_path / "two"), "me/guided"]) == 0
    assert "members/brief/adapter_config.json" in hub.repos["me/guided"]
    assert hub.repos["me/guided"]["README.md"] == b"A card by hand."
    assert main(["push", str(root / "guided"), "me/guided"]) == 0
    assert not [path for path in hub.repos["me/guided"] if path.startswith("members/brief")]
    assert "members/kind/adapter_config.json" in hub.repos["me/guided"]


def test_the_card(root: Path) -> None:
    text = card(describe(str(root / "guided")), "me/guided", "apache-2.0")
    data = ModelCard(text).data
    assert (data.license, data.library_name, data.datasets) == ("apache-2.0", "transformers", ["owner/pairs"])
    assert data.base_model is None  # a folder of this machine
    row = next(line for line in text.splitlines() if line.startswith("| kind |"))
    assert (
        row == "| kind | 0.5 | a LoRA adapter on the base | arm, β_r 0.05, on owner/pairs | 0.750 (n=40) | apache-2.0 |"
    )
    assert "| calm | 1 | the wish “Be \\| calm.”, less base |" in text
    assert str(root) not in text
    for line in ('from_pretrained("me/guided")', "genarm chat me/guided --weights kind=0.7", "trust_remote_code=True"):
        assert line in text


def test_wrong_inputs(root: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    compose(root / "base", {"kind": root / "kind"}, tmp_path / "lost")
    text = (tmp_path / "lost" / "config.json").read_text()
    (tmp_path / "lost" / "config.json").write_text(text.replace(str(root / "kind"), "./gone"))
    for folder, repo, message in (
        (root / "guided", "me/guided", "offline mode is enabled"),
        (root / "guided", "a/b/c", "cannot push to 'a/b/c'"),
        (root / "base", "me/guided", "is not a guided folder on this machine"),
        (root / "gone", "me/guided", "there is no folder"),
        (tmp_path / "lost", "me/guided", "is not pushed, as nobody could load it: the member folder './gone'"),
    ):
        assert main(["push", str(folder), repo]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("genarm.model.publish.get_token", lambda: None)
    assert main(["push", str(root / "guided"), "me/guided"]) == 2
    assert "log in with `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err


def test_what_the_hub_refuses_is_told_in_one_line(
    root: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["push", str(root / "guided"), "me/guided"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"genarm push: error: cannot push '{root / 'guided'}' to 'me/guided' at {hub.url}: ")
    assert "401" in err
    assert err.count("\n") == 1


def test_nothing_private_goes_into_a_repository_that_is_open(
    root: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repos["me/open"] = {"README.md": b"mine"}
    assert main(["push", str(root / "guided"), "me/open", "--private"]) == 2
    assert "me/open is there already and open to everybody" in capsys.readouterr().err
    assert hub.repos["me/open"] == {"README.md": b"mine"}
    assert main(["push", str(root / "guided"), "me/open"]) == 0
    assert "config.json" in hub.repos["me/open"]
