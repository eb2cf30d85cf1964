"""Rewards in words and tuned models as methods of a comparison, from a recipe to its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from builders.tiny import save_member, tiny_lora, tiny_model, tiny_tokenizer
from genarm.errors import ConfigError, UnsupportedError
from genarm.lab.evaluation.recipe_file import load_recipe
from genarm.lab.evaluation.run import RunOptions, evaluate
from genarm.lab.methods.sample import Sample
from genarm.model.modeling import GuidedForCausalLM
from genarm.sampling import Sampling

RECIPE = """
[tiny]
reference = "base"
prompts = {{ data = "{f}/p.jsonl", count = 4, column = "prompt" }}
sampling = {{ max_new_tokens = 6, batch_size = 3 }}
judges = [{{ name = "j", kind = "function", source = "length_of:score" }}]
methods = [
  {{ kind = "sample", name = "base", model = "{f}/base" }},
  {{ kind = "sample", name = "policy", model = "{f}/lora" }},
  {{ kind = "prompted", base = "{f}/base", system = "w5 w6 w7" }},
  {{ kind = "wish", base = "{f}/base", wishes = {{ a = "w5 w6 w7", b = "w8" }}, weights = {{ b = 0 }} }},
  {{ kind = "wish", name = "budget", base = "{f}/base", wishes = {{ a = "w5" }}, weights = {{ a = 9 }}, max_kl = 0 }},
  {{ kind = "tuned", base = "{f}/base", tuned = {{ t = "{f}/lora" }} }},
  {{ kind = "tuned", name = "pair", base = "{f}/base", weights = {{ t = 1.5 }}, {pair} }},
  {{ kind = "proxy-tuning", base = "{f}/base", tuned = "{f}/one", untuned = "{f}/two", weight = 1.5 }},
  {more}
]
"""

PAIR = 'tuned = {{ t = "{f}/one" }}, references = {{ t = "{f}/two" }}'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate(("base", "one", "two")):
        save_member(tiny_model(seed=seed), tmp_path / name)
    tiny_lora(tiny_model(seed=0), tmp_path / "lora", seed=5, base_path=str(tmp_path / "base"))
    rows = [{"prompt": f"w{i} w{i + 1}" + " w9" * i} for i in range(4)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "length_of.py").write_text("def score(prompt, response):\n    return float(len(response))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def recipe(folder: Path, more: str = "") -> Any:
    path = folder / "r.toml"
    path.write_text(RECIPE.format(f=folder, more=more, pair=PAIR.format(f=folder)))
    return load_recipe(path, "tiny")


def test_identities_hold_in_a_comparison(folder: Path) -> None:
    console, output = Console(quiet=True), folder / "run"
    options = RunOptions(output=output, command="genarm eval r.toml", device="cpu")
    found = evaluate(recipe(folder), options, console)
    rows = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (output / "answers").glob("*.jsonl")
    }
    tokens = {name: [row["token_ids"] for row in answers] for name, answers in rows.items()}
    same = (("wish", "prompted"), ("tuned", "policy"), ("pair", "proxy-tuning"), ("budget", "base"))
    assert all(tokens[first] == tokens[second] for first, second in same)
    assert len({str(tokens[name]) for _, name in same}) == len(same)
    for first, second in same:
        kl = [[row["kl"] for row in rows[name]] for name in (first, second)]
        assert kl[0] == pytest.approx(kl[1], abs=1e-3)
    figures = {row.name: row for row in found.rows}
    assert figures["base"].kl_per_token == pytest.approx(0, abs=1e-5)
    kls, lengths = (sum(r["kl"] for r in rows["wish"]), sum(map(len, tokens["wish"])))
    assert figures["wish"].kl_per_token == pytest.approx(kls / lengths) != pytest.approx(0, abs=1e-2)
    assert set(figures["wish"].forwards) == {"base", "a"}
    assert "KL per token" in (output / "results.md").read_text()

    # Rows from before there was a `kl` are gone on with, by log π − log π_base.
    (answers,) = (path for path in (output / "answers").glob("wish.jsonl"))
    older = [{key: value for key, value in row.items() if key != "kl"} for row in rows["wish"]]
    answers.write_text("".join(json.dumps(row) + "\n" for row in older))
    again = {row.name: row for row in evaluate(recipe(folder), options, console).rows}
    expected = sum(row["log_prob"] - row["base_log_prob"] for row in older) / lengths
    assert again["wish"].kl_per_token == pytest.approx(expected)
    assert again["policy"].kl == figures["policy"].kl


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('{ kind = "wish", base = "b" }', "lacks wishes"),
        ('{ kind = "wish", base = "b", wishes = { a = " " } }', "wishes"),
        ('{ kind = "wish", base = "b", wishes = { a = "x" }, weights = { c = 1 } }', "unknown key 'c'"),
        ('{ kind = "wish", base = "b", wishes = { a = "x" }, max_kl = -1 }', "max_kl is -1"),
        ('{ kind = "prompted", base = "b" }', "lacks system"),
        ('{ kind = "prompted", base = "b", system = "" }', "system"),
        ('{ kind = "tuned", base = "b", tuned = { a = "x" }, references = { c = "y" } }', "unknown key 'c'"),
        (
            '{ kind = "genarm", base = "b", rewards = { a = "x" }, references = { a = "y" } }',
            "unknown key 'references'",
        ),
    ],
)
def test_mistakes_are_named(entry: str, message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(folder, entry)


def test_a_guided_folder_with_wishes_is_refused_where_nothing_reads_their_words() -> None:
    tokenizer = tiny_tokenizer()
    model = GuidedForCausalLM.from_members(tiny_model(), {}, wishes={"warm": "w1 w2"})
    with pytest.raises(UnsupportedError, match=r"the wish 'warm'.*of the kind \"wish\""):
        Sample(model, tokenizer, Sampling())
    Sample(model, tokenizer, Sampling(), weights={"warm": 0.0})
