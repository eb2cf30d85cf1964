"""Selection against enumeration, and each scorer against what it wraps."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification

from builders.judge_server import Act, JudgeServer, Seen, says
from builders.tiny import tiny_model, tiny_tokenizer
from genarm.errors import ConfigError, DataError
from genarm.lab.judges.interface import Item, Scorer, ScorerOptions
from genarm.lab.judges.kinds import make_scorer
from genarm.lab.pairs.select import Scored, Selection, select
from genarm.provenance import model_record
from genarm.text.prompts import encode_pair

# --- selection ------------------------------------------------------------------------------------------------

SCORES = st.one_of(st.none(), st.sampled_from([-1.0, 0.0, 0.5, 1.0, 3.0]))
DRAWN = st.lists(st.tuples(st.sampled_from(["a", "b", "c", "d", "", " "]), SCORES), max_size=8)


def scored(drawn: list[tuple[str, float | None]]) -> list[Scored]:
    """Equal responses get the score of the first, as they do in a run."""
    first: dict[str, float | None] = {}
    for response, score in drawn:
        first.setdefault(response, score)
    return [Scored(response=r, score=first[r], seed=i, cut=False) for i, (r, _) in enumerate(drawn)]


@given(DRAWN, st.sampled_from([0.0, 0.5, 2.0]))
def test_selection_against_enumeration(drawn: list[tuple[str, float | None]], margin: float) -> None:
    responses = scored(drawn)
    words = [r for r in responses if r.response.strip()]
    firsts = [r for i, r in enumerate(words) if r.response not in {earlier.response for earlier in words[:i]}]
    known = [(r.score, r) for r in firsts if r.score is not None]
    gaps = {(a.seed, b.seed): high - low for high, a in known for low, b in known if a is not b}

    every = select(responses, Selection(which="all", margin=margin))
    assert {(a.seed, b.seed) for a, b in every.pairs} == {pair for pair, gap in gaps.items() if gap > margin}
    assert len(every.pairs) + every.ties == len(list(itertools.combinations(known, 2)))

    one = select(responses, Selection(margin=margin))
    largest = max(gaps.values(), default=0.0)
    assert len(one.pairs) == (largest > margin)
    assert one.ties == (len(known) > 1 and largest <= margin)
    for better, worse in one.pairs:
        assert gaps[better.seed, worse.seed] == largest
        assert (better.seed, worse.seed) == min(pair for pair, gap in gaps.items() if gap == largest)

    for found in (every, one):
        assert found.empty == len(responses) - len(words)
        assert found.identical == len(words) - len(firsts)
        assert found.unscored == len(firsts) - len(known)
        assert found.lone == (len(known) < 2)


@pytest.mark.parametrize("margin", [-0.1, float("nan"), float("inf")])
def test_margins(margin: float) -> None:
    with pytest.raises(ConfigError, match="--margin is"):
        Selection(margin=margin)


# --- scorers --------------------------------------------------------------------------------------------------


def item(response: str, prompt: str = "w1 w2", **row: Any) -> Item:
    return Item(prompt=[{"role": "user", "content": prompt}], response=response, row={"prompt": prompt, **row})


def make(spec: str, folder: Path = Path("replies"), **options: Any) -> Scorer:
    return make_scorer(spec, ScorerOptions(replies=folder, **options))


def test_the_last_number(tmp_path: Path) -> None:
    scorer = make("last-number=answer")
    rows = [{"answer": "so\n#### 1,200"}, {"answer": 7}, {"answer": -2.5}, {"answer": "about 3"}]
    scorer.check(rows)
    responses = ["It is $1,200.", "7.0", "minus -2.5", "4"]
    assert scorer.score([item(r, **row) for r, row in zip(responses, rows, strict=True)]) == [1, 1, 1, 0]
    with pytest.raises(DataError, match="prompt 1: the answer 'none' has no number"):
        scorer.check([{"answer": "1"}, {"answer": "none"}])


def test_unit_tests() -> None:
    scorer = make("tests=test")
    listed = {"test": ["assert double(2) == 4", "assert double(0) == 0"]}
    checked = {"test": "def check(f):\n    assert f(2) == 4\n", "entry_point": "double"}
    scorer.check([listed, checked])
    good, bad = ("```python\ndef double(x):\n    return x * 2\n```", "```python\ndef double(x):\n    return x + 2\n```")
    items = [item(r, **row) for row in (listed, checked) for r in (good, bad, "no code")]
    assert scorer.score(items) == [1, 0, 0, 1, 1, 0]  # 2 + 2 is 4: the second set of tests is weak
    continued = "def double(x):\n"
    assert scorer.score([item("    return 2 * x\n", continued, **checked)]) == [1]
    with pytest.raises(DataError, match="prompt 0: 'test' is \\[\\]; expected Python code"):
        scorer.check([{"test": []}])
    assert scorer.record["limits"]["memory"] == 1024


@torch.no_grad()
def test_a_reward_model(tmp_path: Path) -> None:
    """Against the model itself on one unpadded sequence at a time."""
    tokenizer = tiny_tokenizer()
    config = tiny_model(vocab_size=len(tokenizer)).config
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    scorer = make(f"reward={tmp_path / 'reward'}", device="cpu")
    items = [item("w5 w6 w7"), item("w9", "w3"), item("w1 w1 w1 w1 w1 w1")]
    expected = []
    for one in items:
        prompt, reply = encode_pair(tokenizer, one.prompt, one.response)
        expected.append(float(model(torch.tensor([prompt + reply])).logits))
    assert scorer.score(items) == pytest.approx(expected, abs=1e-4)
    assert len(set(expected)) == 3
    assert scorer.record["reward"] == model_record(str(tmp_path / "reward"))


def judge_of(words: dict[str, str]) -> Any:
    def behave(seen: Seen, number: int) -> Act:
        answer = seen.question.split("[Answer]")[1].split("[End")[0].strip()
        return says(words[answer])

    return behave


def test_a_judge_with_a_rubric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply that cannot be read is no score, and what was asked once is not asked again."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    rubric = tmp_path / "rubric.txt"
    rubric.write_text("Kindness alone counts.", encoding="utf-8")
    said = {"good": "Kind.\nScore: 9", "bad": "Rude.\nScore: 2", "odd": "I cannot say."}
    with JudgeServer(judge_of(said)) as server:
        options = {"judge_url": server.url, "judge_model": "tiny-judge"}
        scorer = make(f"judge={rubric}", tmp_path / "replies", **options)
        assert scorer.score([item(word) for word in said]) == [9, 2, None]
        assert all("Kindness alone counts." in json.dumps(seen.body) for seen in server.seen)
        assert {seen.body["model"] for seen in server.seen} == {"tiny-judge"}
        again = make(f"judge={rubric}", tmp_path / "replies", **options)
        assert again.score([item(word) for word in said]) == [9, 2, None]
        assert len(server.seen) == 3
    before = scorer.record
    rubric.write_text("Brevity alone counts.", encoding="utf-8")
    assert make(f"judge={rubric}", **options).record != before
    elsewhere = make(f"judge={rubric}", judge_url="http://127.0.0.1:9/v1", judge_model="tiny-judge")
    assert elsewhere.record == make(f"judge={rubric}", **options).record


def test_a_judge_that_fails_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was answered is kept, so that the next run asks only for the rest."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    refuse = [True]

    def behave(seen: Seen, number: int) -> Act:
        if "bad" in seen.question and refuse[0]:
            return Act(status=400, body={"error": {"message": "too rude"}})
        return says("Score: 5")

    rubric = tmp_path / "rubric.txt"
    rubric.write_text("Any.", encoding="utf-8")
    with JudgeServer(behave) as server:
        scorer = make(f"judge={rubric}", tmp_path / "replies", judge_url=server.url, judge_model="j")
        with pytest.raises(DataError, match="the judge gave no reply to 1 of 2 questions"):
            scorer.score([item("good"), item("bad")])
        refuse[0] = False
        asked = len(server.seen)
        assert scorer.score([item("good"), item("bad")]) == [5, 5]
        assert len(server.seen) == asked + 1


def test_a_judge_needs_a_protocol_for_single_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="the protocol pairwise compares two answers"):
        make("judge=pairwise", judge_url="http://127.0.0.1:9/v1")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        make("judge=score")
