"""Adapters that were trained on another revision of a model of the hub than its main one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from builders.tiny import save_member, tiny_lora, tiny_model

_COMMITS = {"main": "a" * 40, "v1": "b" * 40}
_IDS = [[4, 9, 7, 12, 30, 8, 22, 6], [13, 5, 41, 7, 19, 10, 28, 33]]

_PROGRAM = """
import json, sys, torch
from genarm.lab.accuracy.models import open_rewards
from genarm.lab.methods.models import Models
from genarm.model.compose import compose
from genarm.model.describe import describe
from genarm.model.references import open_files
from genarm.provenance import model_record
from pathlib import Path

ids = torch.tensor(json.loads(sys.argv[1]))
said, notes, rewards = {}, {}, {}
for base, adapter in (
    *(("org/big", "v1"), ("org/big", "none"), ("org/big", "main"), ("org/big", "zero")),
    *(("org/small", "v1"), ("org/small", "main"), ("org/small@v1", "v1"), ("org/small@v1", "none")),
):
    key = f"{base} {adapter}"
    report = compose(base, {"a": adapter}, Path("guided") / key.replace("/", "."))
    notes[key], rewards[key] = report.notes, report.config.rewards
    model = open_files(str(report.folder)).load(dtype="float32", device="cpu")
    with torch.inference_mode():
        said[key] = model(ids, use_cache=False).logits.tolist()
models = Models(folder=Path.cwd(), dtype="float32", device="cpu")
print(json.dumps({
    "said": said, "notes": notes, "rewards": rewards,
    "records": {name: model_record(name)["model"] for name in ("v1", "main", "none")},
    "sums": {name: models.reward_of_replies(name).score([ids[0, :3].tolist()], [ids[0, 3:].tolist()])
             for name in ("v1", "main", "zero")},
    "specs": {name: open_rewards(name, trust_remote_code=False).spec.revision for name in ("v1", "main")},
    "start": open_rewards("zero", trust_remote_code=False).start.spec.to_dict(),
    "shown": describe("v1").members[0].model,
}))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub's cache with two models of two commits each, and adapters on the small one."""
    root = tmp_path_factory.mktemp("revisions")
    for name, seeds in (("small", (1, 2)), ("big", (3, 4))):
        repo = root / "hub" / f"models--org--{name}"
        (repo / "refs").mkdir(parents=True)
        for (revision, commit), seed in zip(_COMMITS.items(), seeds, strict=True):
            save_member(tiny_model("llama", seed=seed), repo / "snapshots" / commit)
            (repo / "refs" / revision).write_text(commit)
    for name, revision in (("v1", "v1"), ("main", "main"), ("none", None), ("zero", "v1")):
        tiny_lora(tiny_model("llama"), root / name, seed=5, base_path="org/small")
        settings = root / name / "adapter_config.json"
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "revision": revision}))
    (root / "zero" / "train_config.toml").write_text('start = "zero"\nmodel = "org/small"\nrevision = "v1"\n')
    return root


@pytest.fixture(scope="module")
def found(root: Path) -> dict[str, Any]:
    """What a process without a network says of them."""
    environment = {**os.environ, "HF_HUB_CACHE": str(root / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _PROGRAM, json.dumps(_IDS)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def plain(root: Path, name: str, revision: str = "main") -> PreTrainedModel:
    folder = root / "hub" / f"models--org--{name}" / "snapshots" / _COMMITS[revision]
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model


def log_probs(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(torch.tensor(_IDS), use_cache=False).logits.log_softmax(-1)  # type: ignore[no-any-return]


def adapted(root: Path, revision: str) -> torch.Tensor:
    """By peft alone."""
    return log_probs(PeftModel.from_pretrained(plain(root, "small", revision), root / "v1"))


def test_a_composed_adapter_goes_on_the_revision_that_it_was_trained_on(root: Path, found: dict[str, Any]) -> None:
    bases = {
        "org/big": log_probs(plain(root, "big")),
        "org/small": log_probs(plain(root, "small")),
        "org/small@v1": log_probs(plain(root, "small", "v1")),
    }
    hosts = {"v1": adapted(root, "v1"), "main": adapted(root, "main"), "none": adapted(root, "main")}
    for key, said in found["said"].items():
        base, adapter = key.split()
        if adapter == "zero":
            expected = bases[base] + hosts["v1"] - log_probs(plain(root, "small", "v1"))
        elif key == "org/small@v1 none":  # it does not say on which revision, so it shares the base
            expected = bases[base] + hosts["v1"]
        else:
            expected = bases[base] + hosts[adapter]
        torch.testing.assert_close(torch.tensor(said), expected.log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_an_adapter_shares_a_base_of_its_own_revision_only(found: dict[str, Any]) -> None:
    places = {key: (reward.get("model"), reward.get("revision")) for key, (reward,) in found["rewards"].items()}
    assert places == {
        "org/big v1": ("org/small", "v1"),
        "org/big none": ("org/small", None),
        "org/big main": ("org/small", None),
        "org/big zero": ("org/small", "v1"),
        "org/small v1": ("org/small", "v1"),
        "org/small main": (None, None),
        "org/small@v1 v1": (None, None),
        "org/small@v1 none": (None, None),
    }
    assert found["rewards"]["org/big zero"][0]["reference"] == {"model": "org/small", "revision": "v1"}
    beside = [key for key, notes in found["notes"].items() if "is loaded beside the base" in " ".join(notes)]
    assert beside == ["org/small v1"]


def test_whoever_else_reads_an_adapter_takes_its_revision(root: Path, found: dict[str, Any]) -> None:
    record = {"hub": "org/small", "revision": "v1", "commit": _COMMITS["v1"]}
    assert found["records"]["v1"] == record
    assert (
        found["records"]["main"]
        == found["records"]["none"]
        == {
            "hub": "org/small",
            "revision": "main",
            "commit": _COMMITS["main"],
        }
    )
    assert found["specs"] == {"v1": "v1", "main": None}
    assert found["start"] == {"model": "org/small", "revision": "v1"}
    assert found["shown"] == "org/small@v1"
    reply = torch.tensor(_IDS[0][3:])[:, None]

    def said(log_probs_BTV: torch.Tensor) -> float:
        return float(log_probs_BTV[0, 2:-1].gather(-1, reply).sum())

    start = said(log_probs(plain(root, "small", "v1")))
    expected = {"v1": said(adapted(root, "v1")), "main": said(adapted(root, "main"))}
    expected["zero"] = expected["v1"] - start
    assert {name: sums[0] for name, sums in found["sums"].items()} == pytest.approx(expected, abs=1e-3)


def test_a_revision_that_is_no_text_is_refused(root: Path, tmp_path: Path) -> None:
    from genarm.errors import MemberError
    from genarm.model.adapter_files import read_adapter_config

    record = json.loads((root / "v1" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**record, "revision": 3}))
    with pytest.raises(MemberError, match="has the revision 3 of its model; it must be a text or null"):
        read_adapter_config(str(tmp_path), {}, name="a")
