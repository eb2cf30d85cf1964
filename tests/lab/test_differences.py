"""Rewards of every loss in a comparison: composed as they were trained, and said so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from builders.tiny import save_member, tiny_model
from builders.toy_training import toy_preferences
from genarm.cli.main import main
from genarm.lab.evaluation.provenance import training_record
from genarm.lab.evaluation.recipe import TrainSpec
from genarm.lab.evaluation.recipe_file import load_recipe
from genarm.lab.evaluation.run import RunOptions, evaluate
from genarm.lab.methods.models import Models
from genarm.model.config import THE_BASE
from genarm.text.prompts import encode_pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, toy pairs, prompts, and a recipe that trains an ARM by each loss and lets each guide."""
    where = tmp_path_factory.mktemp("losses")
    save_member(tiny_model(seed=0), where / "model")
    rows = {"pairs": toy_preferences(16, 0), "held-out": toy_preferences(12, 1)}
    rows["prompts"] = [{"prompt": f"w{i} w{i + 1}"} for i in range(20, 32)]
    for name, content in rows.items():
        (where / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    base = {"kind": "genarm", "base": f"{where}/model"}
    recipe = {
        "reference": "base",
        "prompts": {"data": f"{where}/prompts.jsonl", "count": 6, "column": "prompt"},
        "sampling": {"max_new_tokens": 6, "batch_size": 6},
        "training": {
            **{"model": f"{where}/model", "data": f"{where}/pairs.jsonl", "eval_data": f"{where}/held-out.jsonl"},
            **{"max_steps": 2, "batch_size": 8, "accumulation": 1, "learning_rate": 2e-2},
            **{"max_prompt_tokens": 16, "max_response_tokens": 16},
        },
        "train": [
            {"name": "plain", "lora": True},
            {"name": "reference", "loss": "reference", "lora": True},
            {"name": "whole", "loss": "reference", "learning_rate": 1e-3},
            {"name": "product", "loss": "product", "lora": True, "through_weight": "0.5-1"},
        ],
        "methods": [
            {"kind": "sample", "name": "base", "model": f"{where}/model"},
            {"kind": "sample", "name": "cold", "model": f"{where}/model", "sampling": {"temperature": 0.5}},
            {"kind": "sample", "name": "policy", "model": "@train/reference"},
            {"kind": "sample", "name": "whole policy", "model": "@train/whole"},
            {**base, "name": "guided", "rewards": {"r": "@train/reference"}},
            {**base, "name": "whole guided", "rewards": {"r": "@train/whole"}},
            {**base, "name": "plain", "rewards": {"p": "@train/plain"}, "weights": [{"p": 0.5}, {"p": 2}]},
            {**base, "name": "product", "rewards": {"q": "@train/product"}, "weights": [{"q": 1}, {"q": 3}]},
            {**base, "name": "both", "rewards": {"q": "@train/product", "p": "@train/plain"}, "weights": {"q": 0}},
            {"kind": "mod", "policies": {"a": "@train/reference", "b": "@train/whole"}, "weights": {"a": 1, "b": 0.5}},
            {"kind": "tuned", "base": f"{where}/model", "tuned": {"t": "@train/plain"}, "weights": {"t": 2}},
        ],
        "judges": [{"name": "length", "kind": "function", "source": "length_of_reply:score"}],
    }
    (where / "length_of_reply.py").write_text("def score(prompt, response):\n    return float(len(response))\n")
    (where / "r.toml").write_text(tomli_w.dumps({"tiny": recipe}))
    return where


def test_rewards_are_composed_as_they_were_trained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At weight 1 on its own base, a difference to the start is the trained policy, token by token."""
    monkeypatch.syspath_prepend(str(folder))
    recipe = load_recipe(folder / "r.toml", "tiny")
    options = RunOptions(output=folder / "run", command="genarm eval r.toml", device="cpu")
    found = evaluate(recipe, options, Console(quiet=True))
    answers = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (folder / "run" / "answers").glob("*.jsonl")
    }
    tokens = {name: [row["token_ids"] for row in rows] for name, rows in answers.items()}
    kls = {name: sum(row["kl"] for row in rows) for name, rows in answers.items()}
    for guided, policy in (("guided", "policy"), ("whole-guided", "whole-policy")):
        assert tokens[guided] == tokens[policy]
        assert kls[guided] == pytest.approx(kls[policy], abs=1e-3)
        assert kls[policy] > 0.01
    exponents = {row.name: row.exponent for row in found.rows}
    assert exponents == {
        **{"base": 1, "cold": 2, "policy": 1, "whole policy": 1, "guided": 1, "whole guided": 1},
        **{"plain (p 0.5)": 1.5, "plain (p 2)": 3, "product (q 1)": 1, "product (q 3)": 1, "both": 2},
        **{"mod": 1.5, "tuned": 1},
    }
    page = (folder / "run" / "results.md").read_text().replace("\\", "")
    assert "was trained by --loss reference as a difference to its own start, so its reference is the base" in page
    assert "q was trained for the weight 0.5-1 and has 3 here" in page
    assert "has 1 here" not in page
    losses = [trained.loss for trained in found.trained]
    assert losses == ["arm", "reference", "reference", "product"]
    (behaviour,) = found.behaviours
    assert set(behaviour.gains) == {"plain", "reference", "whole", "product"}
    assert set(behaviour.taus) == {"reward accuracy", "policy accuracy"}
    policies = {trained.name: trained.policy for trained in found.trained}
    assert policies["product"] is None  # its training has measured it
    for name in ("plain", "reference", "whole"):
        assert policies[name] is not None
        right = right_pairs(folder, name, difference=name != "plain")
        assert (policies[name].count, policies[name].n) == (sum(right), len(right))
    report = (folder / "run" / "report.html").read_bytes()
    evaluate(recipe, options, Console(quiet=True))
    assert (folder / "run" / "report.html").read_bytes() == report


@torch.no_grad()
def right_pairs(folder: Path, name: str, *, difference: bool) -> list[bool]:
    """Which held-out pairs the policy of a reward ranks right at weight 1, by plain forwards."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    where = folder / "run" / "train" / name
    start = AutoModelForCausalLM.from_pretrained(folder / "model")
    adapted = (where / "adapter_config.json").exists()
    arm = PeftModel.from_pretrained(start, where) if adapted else AutoModelForCausalLM.from_pretrained(where)

    def gain(prompt: list[dict[str, str]], response: str) -> float:
        prompt_ids, ids = encode_pair(tokenizer, prompt, response)
        whole = torch.tensor([[*prompt_ids, *ids]])
        base_TV, arm_TV = (model(whole).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1) for model in (base, arm))
        guided_TV = arm_TV if difference else (base_TV + arm_TV).log_softmax(-1)
        return float((guided_TV - base_TV).gather(-1, torch.tensor(ids)[:, None]).sum())

    rows = map(json.loads, (folder / "held-out.jsonl").read_text().splitlines())
    return [
        gain(row["prompt"], row["chosen"][0]["content"]) > gain(row["prompt"], row["rejected"][0]["content"])
        for row in rows
    ]


def test_what_a_row_is_composed_of_is_looked_at_again(folder: Path, tmp_path: Path) -> None:
    """A reward that is trained anew in its place, by another loss, is composed anew: it has a reference now."""
    method = load_recipe(folder / "r.toml", "tiny").method("plain (p 0.5)")
    where = tmp_path / "train" / "plain"
    save_member(tiny_model(seed=1), where)
    models = Models(folder=tmp_path, device="cpu")
    assert models.composed(method).reward_specs[0].reference is None
    assert (models.starts(method), models.notes(method)) == ({}, [])
    save_member(tiny_model(seed=2), where)
    (where / "train_config.toml").write_text(f'loss = "reference"\nstart = "zero"\nmodel = "{folder}/model"\n')
    models = Models(folder=tmp_path, device="cpu")
    assert models.composed(method).reward_specs[0].reference == THE_BASE
    assert models.starts(method) == {}  # the base is in a row's record anyway
    assert "as a difference to its own start" in models.notes(method)[0]
    save_member(tiny_model(seed=3), where)
    start = save_member(tiny_model(seed=4), tmp_path / "start")
    (where / "train_config.toml").write_text(f'loss = "reference"\nstart = "zero"\nmodel = "{start}"\n')
    first = Models(folder=tmp_path, device="cpu").starts(method)
    save_member(tiny_model(seed=5), start)
    assert first["p"] != Models(folder=tmp_path, device="cpu").starts(method)["p"]


def test_all_that_a_loss_learns_from_is_recorded(tmp_path: Path) -> None:
    save_member(tiny_model(seed=0), tmp_path / "model")
    save_member(tiny_model(seed=1), tmp_path / "through")
    (tmp_path / "p.jsonl").write_text('{"prompt": "w1"}\n')
    (tmp_path / "wish.txt").write_text("w1 w2")
    settings: dict[str, Any] = {"loss": "distil", "wish": f"@{tmp_path}/wish.txt"}
    settings |= {"model": "@model", "through": "@through", "prompts": "@p.jsonl"}

    def records() -> dict[str, Any]:
        return training_record(TrainSpec(name="a", settings=settings), Models(folder=tmp_path))

    first = records()
    assert first == records()
    assert first["wish"] == "w1 w2"
    (tmp_path / "wish.txt").write_text("w3")
    (tmp_path / "p.jsonl").write_text('{"prompt": "w2"}\n')
    save_member(tiny_model(seed=2), tmp_path / "through")
    changed = records()
    assert {key for key in first if first[key] != changed[key]} == {"through", "prompts", "wish"}


def test_a_wish_is_planned_without_pairs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = {
        "reference": "base",
        "prompts": {"data": f"{folder}/prompts.jsonl", "count": 6, "column": "prompt"},
        "training": {"model": f"{folder}/model", "prompts": f"{folder}/prompts.jsonl"},
        "train": [{"name": "w", "loss": "distil", "wish": "w5"}],
        "methods": [
            {"kind": "sample", "name": "base", "model": f"{folder}/model"},
            {"kind": "genarm", "base": f"{folder}/model", "rewards": {"w": "@train/w"}},
        ],
        "judges": [{"name": "j", "kind": "function", "source": "math:fsum"}],
    }
    (tmp_path / "r.toml").write_text(tomli_w.dumps({"tiny": table}))
    assert main(["eval", str(tmp_path / "r.toml"), "--plan", "--output", str(tmp_path / "run")]) == 0
    assert "w: distil from" in capsys.readouterr().out
