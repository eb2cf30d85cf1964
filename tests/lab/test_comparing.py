"""Judges behind an endpoint inside a comparison: a real HTTP server that prefers the longer answer, and misbehaves."""

from __future__ import annotations

import dataclasses
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from builders.judge_server import Act, JudgeServer, Seen, says
from genarm.errors import ConfigError
from genarm.lab.evaluation.answers import Answers
from genarm.lab.evaluation.comparing import announce, calls, compare_all, pairs_of
from genarm.lab.evaluation.prompts import Question
from genarm.lab.evaluation.recipe import PromptSpec, Recipe, SamplingSpec
from genarm.lab.evaluation.results import Cost
from genarm.lab.judges.kinds import JudgeSpec
from genarm.lab.methods.interface import MethodSpec

N = 6
COST = Cost(seconds=(1.0,), tokens=1, forwards={}, positions={})


def recipe(judge: JudgeSpec) -> Recipe:
    methods = tuple(
        MethodSpec(kind="sample", name=name, family=name, roles={"model": "m"}, sampling={"temperature": t})
        for name, t in (("base", 1.0), ("wordy", 0.5), ("terse", 0.4))
    )
    return Recipe(
        title="T",
        scale="tiny",
        seed=0,
        prompts=PromptSpec(data="p", count=N),
        sampling=SamplingSpec(max_new_tokens=8),
        methods=methods,
        judges=(judge,),
        reference="base",
        comparisons=(("wordy", "terse"),),
    )


def llm(url: str, **settings: Any) -> JudgeSpec:
    return JudgeSpec(name="judge", kind="llm", source="pairwise", settings={"model": "j", "base_url": url, **settings})


QUESTIONS = [Question(prompt=f"question {i}", text=f"question {i}", ids=(i,)) for i in range(N)]
ANSWERS = {
    name: Answers(
        replies=tuple(text.format(i) for i in range(N)), token_ids=tuple((1,) for _ in range(N)), cost=COST, kl=None
    )
    for name, text in (("base", "answer {} one"), ("wordy", "answer {} one two three"), ("terse", "answer {}"))
}


def longer(seen: Seen, number: int) -> Act:
    """Prefers the answer with more words; about question 0 it says nothing that can be read."""
    found = re.findall(r"answer (\d)((?: one)?(?: two three)?)", seen.question)
    (index, first), (_, second) = found[-2:]
    if index == "0":
        return says("I cannot decide.")
    return says("[[A]]" if len(first) > len(second) else "[[B]]")


def test_pairs_of_a_recipe() -> None:
    assert pairs_of(recipe(llm("http://x"))) == [("wordy", "terse"), ("wordy", "base"), ("terse", "base")]


def test_verdicts_and_their_rows(tmp_path: Path) -> None:
    with JudgeServer(longer) as server:
        judge = llm(server.url)
        found, notes = compare_all(tmp_path, judge, recipe(judge), QUESTIONS, ANSWERS, Console(quiet=True))
        asked = len(server.seen)
        assert asked == 3 * 2 * N
        again, _ = compare_all(tmp_path, judge, recipe(judge), QUESTIONS, ANSWERS, Console(quiet=True))
        assert len(server.seen) == asked  # nothing is asked twice
    assert again == found
    outcomes = {(v.first, v.second): v.outcomes for v in found}
    assert outcomes["wordy", "terse"] == outcomes["wordy", "base"] == (None, *["win"] * (N - 1))
    assert outcomes["terse", "base"] == (None, *["lose"] * (N - 1))
    assert len(notes) == 3
    assert "1 replies could not be read, 0 calls failed" in notes[0]
    rows = [json.loads(line) for line in (tmp_path / "wordy--terse.jsonl").read_text().splitlines()]
    assert [row["outcome"] for row in rows] == list(outcomes["wordy", "terse"])
    assert rows[0]["orders"][0]["reply"] == "I cannot decide."


def test_failures_are_counted_and_never_ties(tmp_path: Path) -> None:
    def down(seen: Seen, number: int) -> Act:
        return longer(seen, number) if "question 3" not in seen.question else Act(status=500)

    with JudgeServer(down) as server:
        judge = llm(server.url, retries=1, backoff=0.01)
        (first, *_), notes = compare_all(tmp_path, judge, recipe(judge), QUESTIONS, ANSWERS, Console(quiet=True))
    assert first.outcomes[3] is None
    assert "1 calls failed" in notes[0]


def test_calls_are_announced_with_their_price(capsys: pytest.CaptureFixture[str]) -> None:
    spec = recipe(llm("http://127.0.0.1:9/v1", price_in=10.0, price_out=30.0))
    (expected,) = calls(spec)
    assert expected.calls == 3 * 2 * N
    assert expected.price is not None
    announce(spec, Console(width=200))
    said = capsys.readouterr().out
    assert "judge will be asked 36 times at most" in said
    assert f"{expected.price:,.2f} at the given prices" in said


def test_mistakes_of_a_judge_are_found_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    quiet = Console(quiet=True)
    with pytest.raises(ConfigError, match="'judge' has the unknown setting 'speed'; settings are model"):
        announce(recipe(llm("http://x", speed=1)), quiet)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        announce(recipe(llm("https://api.openai.com/v1")), quiet)
    with pytest.raises(ConfigError, match="there is no protocol 'nope'"):
        announce(recipe(dataclasses.replace(llm("http://x"), source="nope")), quiet)


@pytest.mark.skipif(find_spec("alpaca_eval") is None, reason="needs the extra alpaca")
def test_alpaca_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longer answer wins; without the hub's data the verdicts are there, and a note says what is missing."""
    from builders.alpaca import weigh

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    count = 12
    rows = [{"instruction": f"question {i}", "dataset": "koala"} for i in range(count)]
    questions = [
        Question(prompt=row["instruction"], text=row["instruction"], ids=(i,), row=row, number=i)
        for i, row in enumerate(rows)
    ]
    lengths = {"base": [8] * count, "wordy": [9 + i for i in range(count)], "terse": [8 + i % 2 for i in range(count)]}
    answers = {
        name: Answers(replies=tuple("m" * n for n in own), token_ids=tuple((1,) for _ in own), cost=COST, kl=None)
        for name, own in lengths.items()
    }
    with JudgeServer(weigh) as server:
        judge = JudgeSpec(name="AlpacaEval 2", kind="alpaca-eval", source="j", settings={"base_url": server.url})
        found, notes = compare_all(tmp_path / "judge", judge, recipe(judge), questions, answers, Console(quiet=True))
    outcomes = {(v.first, v.second): v.outcomes for v in found}
    assert outcomes["wordy", "base"] == ("win",) * count
    assert outcomes["terse", "base"] == ("tie", "win") * (count // 2)
    assert notes[0].startswith("AlpacaEval 2, wordy against terse: ")
    assert (tmp_path / "judge" / "terse--base.jsonl").is_file()
