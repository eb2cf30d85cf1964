"""`genarm show`: what is in a folder, against what loading it gives, and what would run it, against what does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from builders.families import tiny_family
from builders.tiny import VOCAB_SIZE, save_member, tiny_lora, tiny_model, tiny_tokenizer
from genarm import Engine, GuidedForCausalLM, compose
from genarm.cli.main import main
from genarm.errors import GenarmError
from genarm.vllm.config import ServedConfig

TRAINED = """
kind = "arm"
loss = "arm"
beta = 0.05
model = "/somewhere/base"
data = "owner/pairs"
"""


def wide(**options: Any) -> PreTrainedModel:
    """With an output for one special token more than others have."""
    return tiny_model(seed=0, vocab_size=VOCAB_SIZE + 1, **options)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in bfloat16 with a card, an adapter on it that was trained here, another model, and all as one folder."""
    root = tmp_path_factory.mktemp("show")
    save_member(wide().to(torch.bfloat16), root / "base", tiny_tokenizer(("<tool>",)))
    (root / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    tiny_lora(wide(), root / "arm", seed=1, base_path=str(root / "base"))
    (root / "arm" / "train_config.toml").write_text(TRAINED)
    metrics = {"eval_accuracy": 0.71, "eval_accuracy_low": 0.6, "eval_accuracy_high": 0.8, "eval_pairs": 100}
    (root / "arm" / "metrics.json").write_text(json.dumps(metrics))
    (root / "arm" / "LICENSE").write_text("\n  MIT License\n\nPermission is hereby …\n")
    save_member(tiny_model("qwen2", seed=3, hidden=16), root / "small")
    compose(
        root / "base",
        {"kind": root / "arm"},
        root / "guided",
        tuned={"polite": root / "small"},
        weights={"kind": 0.5},
        descriptions={"kind": "prefers kind replies"},
    )
    compose(root / "guided", {}, root / "wishful", wishes={"brief": "Answer briefly."})
    return root


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["show", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_guided_folder(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr("genarm.model.loading.load_whole", load)
    monkeypatch.setattr("genarm.model.adapter_files.load_file", load)
    found = shown(capsys, str(root / "guided"))
    monkeypatch.undo()
    assert found["kind"] == "guided folder"
    members = {member["name"]: member for member in found["members"]}
    model = GuidedForCausalLM.from_pretrained(root / "guided")
    assert [*members] == [member.name for member in model.members]
    for name, place, numbers in (
        ("base", "base/model.safetensors", sum(p.numel() for n, p in model.base.named_parameters() if "lora" not in n)),
        (
            "kind",
            "arm/adapter_model.safetensors",
            sum(p.numel() for n, p in model.base.named_parameters() if "lora" in n),
        ),
        ("polite", "small/model.safetensors", sum(p.numel() for p in model.members[2].model.parameters())),
    ):
        held = members[name]["weights"]
        assert (held["parameters"], held["on_disk"]) == (numbers, (root / place).stat().st_size)
        dtype = "bfloat16" if name == "base" else "float32"
        assert (held["dtype"], held["in_memory"]) == (dtype, numbers * (2 if name == "base" else 4))
    assert [members[name]["licence"] for name in members] == ["apache-2.0", "MIT License (LICENSE)", None]
    assert (members["kind"]["loss"], members["kind"]["beta"], members["kind"]["weight"]) == ("arm", 0.05, 0.5)
    assert (members["kind"]["reference"], members["polite"]["reference"]) == (None, "base")
    assert members["kind"]["figures"]["eval_accuracy"] == 0.71
    assert members["polite"]["unknown"] == ["<tool>"]
    assert (found["vocabulary"], found["context"]) == (model.config.vocab_size, 128)
    runs = found["runs"]
    assert (runs["transformers"]["runs"], runs["engine"]["runs"]) == (True, True)
    assert runs["vllm"]["runs"] is not False


def test_what_people_read(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(root / "wishful")]) == 0
    out = capsys.readouterr().out
    assert "is a guided folder: a base and 3 rewards" in out
    for line in (
        "kind: prefers kind replies",
        "kind: trained by --loss arm with β_r = 0.05 from /somewhere/base on owner/pairs",
        "kind: held-out accuracy 0.710 [0.600, 0.800] (n=100)",
        "polite: a difference to base",
        "brief: the wish 'Answer briefly.'",
        "vLLM would refuse it: vLLM reads one prompt for all members, so it cannot run the wish 'brief'",
        "none found",
    ):
        assert line in out


def refusal(act: Any) -> str:
    with pytest.raises(GenarmError) as raised:
        act()
    return str(raised.value)


def test_what_would_refuse_it_says_the_same(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The words are those of the refusal itself: each is provoked here."""
    folder = tmp_path / "guided"
    shutil.copytree(root / "guided", folder)
    said = shown(capsys, str(root / "wishful"))["runs"]["vllm"]
    assert said == {
        "runs": False,
        "why": refusal(lambda: ServedConfig.from_pretrained(root / "wishful", name_or_path=str(root / "wishful"))),
    }
    config = json.loads((folder / "config.json").read_text())
    config["rewards"][0]["adapter"] = "./gone"
    (folder / "config.json").write_text(json.dumps(config))
    found = shown(capsys, str(folder))
    lost = refusal(lambda: GuidedForCausalLM.from_pretrained(folder))
    assert found["problem"] == found["runs"]["engine"]["why"] == found["runs"]["transformers"]["why"] == lost
    assert found["members"][1]["problem"] in lost
    assert found["members"][2]["weights"] is not None
    tiny_lora(wide(hidden=16), tmp_path / "narrow", seed=1, base_path=str(root / "base"))
    config["rewards"][0]["adapter"] = str(tmp_path / "narrow")
    (folder / "config.json").write_text(json.dumps(config))
    misfit = refusal(lambda: GuidedForCausalLM.from_pretrained(folder))
    assert shown(capsys, str(folder))["problem"] == misfit


def test_what_vllm_has_no_place_for(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapted = get_peft_model(wide(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    adapted.save_pretrained(tmp_path / "dora")
    tiny_lora(wide(), tmp_path / "both", seed=1, base_path="x", targets=["q_proj", "lm_head"])
    for name, why in (
        ("dora", "is more on 'model.layers.0.self_attn.q_proj' than"),
        ("both", "changes 'lm_head', wher"),
    ):
        place = {"r": str(root / "base")}
        compose(root / "base", {"r": tmp_path / name}, tmp_path / f"of-{name}", adapter_models=place)
        runs = shown(capsys, str(tmp_path / f"of-{name}"))["runs"]
        assert runs["engine"]["runs"] is True
        assert why in runs["vllm"]["why"]


def test_a_base_that_the_engine_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_family("bloom")
    tokenizer = tiny_tokenizer(words=[f"w{i}" for i in range(90)])
    save_member(base, tmp_path / "base", tokenizer)
    said = shown(capsys, str(tmp_path / "base"))["runs"]["engine"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert said == {"runs": False, "why": refusal(lambda: Engine(model, tokenizer))}


def test_what_is_no_guided_folder(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = shown(capsys, str(root / "arm"))
    assert (found["kind"], found["runs"], found["members"][0]["loss"]) == ("adapter", {}, "arm")
    assert main(["show", str(root / "arm")]) == 0
    out = capsys.readouterr().out
    assert f"genarm compose --base {root / 'base'} --reward NAME={root / 'arm'} --output DIR" in out
    assert "--tuned" not in out
    assert main(["show", str(root / "base")]) == 0
    out = capsys.readouterr().out
    assert f"genarm compose --base {root / 'base'} --reward NAME=ARM" in out
    assert f"genarm chat {root / 'base'} --wish NAME=TEXT" in out


def test_wrong_inputs(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train_config.toml").write_text(TRAINED)
    shutil.copytree(root / "guided", tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "guided", "base": ')
    for name, message in (
        (str(root / "guidde"), f"there is no folder '{root / 'guidde'}' here (did you mean '{root / 'guided'}'?)"),
        (str(tmp_path / "empty"), "has no config.json"),
        (str(tmp_path / "run"), "a run of genarm train that is not finished; repeat its command with --resume"),
        (str(tmp_path / "broken"), "cannot read the configuration"),
        ("someone/guided", "there is no folder 'someone/guided' here"),
        (str(root / "guided" / "config.json"), "is a file"),
    ):
        assert main(["show", name]) == 2
        err = capsys.readouterr().err
        assert err.startswith("genarm show: error: ")
        assert message in err
        assert err.count("\n") == 1
