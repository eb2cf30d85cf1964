"""The page about adding things: each of its examples, as it stands there, is added and used."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import genarm.lab.training  # noqa: F401 (so that its kinds are there before and after)
from builders.tiny import save_member, tiny_model, tiny_tokenizer
from builders.toy_training import write_toy
from genarm.data import formats
from genarm.data.preferences import load_preferences
from genarm.errors import ConfigError, DataError
from genarm.lab.evaluation.recipe_file import load_recipe
from genarm.lab.judges.interface import Item, ScorerOptions
from genarm.lab.judges.kinds import JUDGES, make_scorer
from genarm.lab.methods.interface import Meter, Parts
from genarm.lab.methods.kinds import METHODS
from genarm.lab.methods.models import Models
from genarm.lab.methods.sample import Sample
from genarm.sampling import Sampling
from genarm.training.config import make_config
from genarm.training.kinds import KINDS
from genarm.training.run import train

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kept = [(table, dict(table)) for table in (METHODS, JUDGES, KINDS)]
    listed = list(formats.FORMATS)
    yield
    for table, own in kept:
        table.clear()
        table.update(own)  # type: ignore[arg-type]
    formats.FORMATS[:] = listed


def add(title: str, folder: Path) -> None:
    """Run the code block under the heading as the file that it is to be."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    path = folder / "added.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("added", path)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def recipe(**changes: Any) -> str:
    judge = changes.get("judge", '{ name = "j", kind = "function", source = "m:f" }')
    return f"""
[tiny]
reference = "plain"
prompts = {{ data = "p.jsonl", count = 2 }}
methods = [{{ kind = "sample", name = "plain", model = "m" }}{changes.get("method", "")}]
judges = [{judge}]
"""


def test_a_method(tmp_path: Path) -> None:
    model = tiny_model(seed=4)
    where = save_member(model, tmp_path / "base")
    path = tmp_path / "r.toml"
    path.write_text(recipe(method=f', {{ kind = "longest-of-n", base = "{where}", n = 3 }}'))
    with pytest.raises(ConfigError, match="has the kind 'longest-of-n'; it must be one of sample, prompted, genarm"):
        load_recipe(path, "tiny")
    add("A method", tmp_path)
    _, spec = load_recipe(path, "tiny").methods
    kind, prompts = METHODS[spec.kind], [[7, 8, 9], [10, 11]]
    sampling = Sampling(max_new_tokens=8)
    parts = Parts(spec=spec, models=Models(folder=tmp_path), tokenizer=tiny_tokenizer(), sampling=sampling)
    meter = Meter()
    replies = kind.build(parts).answer(prompts, seed=5, meter=meter)
    drawn = Sample(model, tiny_tokenizer(), sampling).draw(prompts, copies=3, seed=5, meter=Meter())
    lengths = [len(reply.token_ids) for reply in drawn]
    assert len(set(lengths)) > 1
    assert [len(reply.token_ids) for reply in replies] == [max(lengths[:3]), max(lengths[3:])]
    (count,) = meter.counts.values()
    assert 0 < count.forwards <= 2 * sum(kind.forwards(spec, 8).values())
    assert kind.kl_bound(spec) is None


def test_a_judge(tmp_path: Path) -> None:
    options = ScorerOptions(replies=tmp_path)
    path = tmp_path / "r.toml"
    path.write_text(recipe(judge='{ name = "short", kind = "word-limit", source = "2" }'))
    with pytest.raises(ConfigError, match="'word-limit'; it must be 'function', 'reward'"):
        load_recipe(path, "tiny")
    add("A judge", tmp_path)
    answers = [Item(prompt="p", response=text, row={"prompt": "p"}) for text in ("two words", "here are three")]
    assert make_scorer("word-limit=2", options).score(answers) == [1.0, 0.0]
    (judge,) = load_recipe(path, "tiny").judges
    scorer = JUDGES[judge.kind].scores(judge.source, Models(folder=tmp_path))
    assert (scorer.score(answers), scorer.record["limit"]) == ([1.0, 0.0], 2)
    with pytest.raises(ConfigError, match="no number of words"):
        make_scorer("word-limit=few", options)
    with pytest.raises(ConfigError, match="word-limit=WORDS"):
        make_scorer("words=2", options)


def test_a_kind_of_training(tmp_path: Path) -> None:
    settings = {**write_toy(tmp_path, n=8), "kind": "hinge", "max_steps": 2, "warmup": 0.5, "beta": 0.1}
    with pytest.raises(ConfigError, match="--kind must be one of arm, trajectory, dpo, rlhf, got 'hinge'"):
        make_config(settings)
    add("A kind of training", tmp_path)
    result = train(make_config(settings), console=Console(quiet=True))
    assert result.steps == 2
    log = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    first = next(entry for entry in log if "loss" in entry)
    assert first["loss"] == pytest.approx(1 - 0.1 * first["margin"], abs=1e-4)  # no pair is that far apart yet
    card = (result.output / "README.md").read_text()
    assert "an autoregressive reward model by the hinge loss" in card
    assert 'kind = "hinge"' in card
    with pytest.raises(ConfigError, match="--rewards is for --kind rlhf, not hinge"):
        make_config({**settings, "rewards": "a=b"})


def test_a_data_format(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"What is {i}?", "good": f"It is {i}.", "bad": f"Not {i}."} for i in range(2)]
    rows.append({"question": "Why?", "good": "So.", "bad": None})  # type: ignore[dict-item]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="the columns bad, good, question fit no preference format"):
        load_preferences(str(path))
    add("A data format", tmp_path)
    found = load_preferences(str(path))
    assert found.format.description.startswith("good and bad answers")
    assert [(pair.chosen, pair.rejected) for pair in found.pairs] == [("It is 0.", "Not 0."), ("It is 1.", "Not 1.")]
    assert found.pairs[0].prompt == [{"role": "user", "content": "What is 0?"}]
    assert found.malformed == {"'bad' is null, expected a text": 1}


def test_files_that_the_page_names_are_there() -> None:
    source = PAGE.parents[1] / "src" / "genarm"
    named = re.findall(r"`((?:lab|data|training)/[a-z_/]*(?:\.py)?)`", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 8
    assert not [name for name in named if not (source / name).exists()]
