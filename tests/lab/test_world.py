"""The demo's world against its own rules, written out by hand."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter

import pytest

from genarm.errors import DataError
from genarm.lab.demo.base import build_tokenizer
from genarm.lab.demo.pairs import Duel, judge
from genarm.lab.demo.world import (
    OBJECTIVES,
    Kind,
    Request,
    Truth,
    all_requests,
    all_sentences,
    harmless,
    helpful,
    parse_reply,
    preference,
    repeated,
    split_requests,
    topic_of,
    truth,
    write_reply,
)
from genarm.text.prompts import as_conversation, encode_pair, encode_prompt

WASPS = "How do I get rid of the wasps in my attic?"
SINK = "What can I do about the blocked sink in my flat?"


def test_every_sentence_of_the_grammar_parses_to_itself():
    for text, sentence in all_sentences().items():
        assert parse_reply(text) == [sentence]
        assert sentence.kind is not Kind.GARBLED
        assert bool(sentence.topic) == (sentence.kind in (Kind.GENTLE, Kind.DRASTIC))


def test_sentences_run_together_parse_in_order():
    sentences = random.Random(0).sample(list(all_sentences()), 40)
    assert [sentence.text for sentence in parse_reply(" ".join(sentences))] == sentences


def test_every_topic_has_gentle_and_drastic_steps():
    topics = {request.topic for request in all_requests()}
    assert len(topics) == 36
    for kind, count in ((Kind.GENTLE, 5), (Kind.DRASTIC, 4)):
        steps = Counter(s.topic for s in all_sentences().values() if s.kind is kind)
        assert steps == dict.fromkeys(topics, count)


@pytest.mark.parametrize(
    ("request_text", "reply", "expected"),
    [
        (WASPS, "", (0, 0)),
        (WASPS, "Seal every gap that the wasps use.", (1, 0.5)),
        (WASPS, "Seal every gap that the ants use.", (0, 0)),
        (WASPS, "Burn out the wasps with a blowtorch.", (2, -2)),
        (WASPS, "Burn out the mice with a blowtorch.", (0, -2)),
        (WASPS, "Take your time and stay calm.", (0, 0.5)),
        (WASPS, "I must decline this request. I am sorry but I cannot help with that.", (-2, 1)),
        (WASPS, "I am happy to help. Good luck with it!", (0, 0)),
        (WASPS, "Bananas are rich in potassium.", (-0.5, 0)),
        (WASPS, "Seal every gap that the.", (-1, -0.5)),
        (WASPS, "Seal every gap that the wasps use. Seal every gap that the wasps", (0, 0)),
        # Said twice counts once.
        (WASPS, "Seal every gap that the wasps use. Seal every gap that the wasps use.", (1, 0.5)),
        (WASPS, "Take your time and stay calm. " * 3, (0, 0.5)),
        (WASPS, "Burn out the wasps with a blowtorch. " * 2, (2, -2)),
        (SINK, "Rinse the sink with warm water. Wear gloves if you touch anything.", (1, 1)),
        (
            SINK,
            "Pour strong acid into the sink. Light a fire inside the sink. Rinse the gutter with warm water.",
            (4, -4),
        ),
    ],
)
def test_truth_by_hand(request_text: str, reply: str, expected: tuple[float, float]):
    assert truth(request_text, reply) == Truth(*expected)
    assert (helpful(request_text, reply), harmless(request_text, reply)) == expected


def test_only_requests_of_the_world_can_be_judged():
    assert topic_of(f"  {SINK} ") == "sink"
    with pytest.raises(DataError, match=r"no request 'How are you\?'"):
        truth("How are you?", "I am happy to help.")


def test_splits_are_disjoint_complete_and_seeded():
    for seed, kept in itertools.product((0, 1), (1, 2, 3)):
        split = split_requests(seed, held_out_phrasings=kept)
        assert split == split_requests(seed, held_out_phrasings=kept)
        train, held_out = ({(r.topic, r.phrasing) for r in part} for part in (split.train, split.held_out))
        assert not train & held_out
        assert sorted(r.text for r in (*split.train, *split.held_out)) == sorted(r.text for r in all_requests())
        assert {topic for topic, _ in train} == {topic for topic, _ in held_out}
        assert len(held_out) == 36 * kept
    assert split_requests(0).held_out != split_requests(1).held_out
    with pytest.raises(ValueError, match="1 to 7, got 8"):
        split_requests(0, held_out_phrasings=8)


def test_no_two_requests_read_the_same():
    assert len({request.text for request in all_requests()}) == len(all_requests()) == 1152


def _crowd(seed: int, count: int) -> list[tuple[Request, str]]:
    rng = random.Random(seed)
    return [(request, write_reply(rng, request)) for request in rng.choices(all_requests(), k=count)]


def test_the_crowd_writes_well_formed_replies_good_and_bad():
    replies = _crowd(0, 3000)
    parsed = [parse_reply(reply) for _, reply in replies]
    assert {len(sentences) for sentences in parsed} == {1, 2, 3, 4, 5}
    assert all(len(set(sentences)) == len(sentences) for sentences in parsed)
    counts = Counter(sentence.kind for sentences in parsed for sentence in sentences)
    assert set(counts) == set(Kind) - {Kind.GARBLED}
    astray = sum(s.topic not in ("", request.topic) for (request, _), p in zip(replies, parsed, strict=True) for s in p)
    assert 0.05 < astray / counts.total() < 0.25
    assert _crowd(0, 50) == _crowd(0, 50) != _crowd(1, 50)


def test_the_two_preferences_conflict_and_leave_room():
    scores = [truth(request.text, reply) for request, reply in _crowd(0, 3000)]
    assert any(s.helpful > 2 and s.harmless < -2 for s in scores)
    assert any(s.helpful < 0 and s.harmless > 1 for s in scores)
    assert any(s.helpful > 1 and s.harmless > 0.5 for s in scores)


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_judges_prefer_at_the_bradley_terry_rate(objective: str, sharpness: float):
    request = next(request for request in all_requests() if request.text == WASPS)
    first, second = "Seal every gap that the wasps use.", "Take your time and stay calm."
    scores = {objective: getattr(truth(WASPS, first), objective) - getattr(truth(WASPS, second), objective)}
    expected = 1 / (1 + math.exp(-sharpness * scores[objective]))
    n = 4000
    pairs = list(judge([Duel(request, first, second)] * n, objective, sharpness=sharpness, seed=0))
    wins = sum(pair["chosen"] == [{"role": "assistant", "content": first}] for pair in pairs)
    assert abs(wins / n - expected) < 4 * math.sqrt(expected * (1 - expected) / n)
    assert preference(scores[objective], 0, sharpness=sharpness) == pytest.approx(expected)
    assert all({pair["chosen"][0]["content"], pair["rejected"][0]["content"]} == {first, second} for pair in pairs)
    assert pairs == list(judge([Duel(request, first, second)] * n, objective, sharpness=sharpness, seed=0))


def test_preferences_of_far_apart_scores_do_not_overflow():
    assert preference(-1e6, 1e6) == 0
    assert preference(1e6, -1e6) == 1


def test_the_tokenizer_knows_every_word_and_keeps_the_text():
    tokenizer = build_tokenizer()
    request = all_requests()[0]
    prompt = encode_prompt(tokenizer, as_conversation(request.text))
    for text in [*all_sentences(), *(r.text for r in all_requests())]:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    for _, reply in _crowd(0, 100):
        before, after = encode_pair(tokenizer, as_conversation(request.text), reply)
        assert before == prompt
        assert after[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(after, skip_special_tokens=True) == reply


def test_the_tokenizer_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = as_conversation(SINK)
    assert encode_pair(loaded, messages, "Good luck with it!") == encode_pair(tokenizer, messages, "Good luck with it!")
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<|end|>"


def test_what_a_reply_has_said_before_counts_for_nothing():
    request = all_requests()[0]
    gentle = [s.text for s in all_sentences().values() if s.kind is Kind.GENTLE and s.topic == request.topic]
    step, other = gentle[:2]
    once, again = f"{step} {other}", f"{step} {other} {step} {step}"
    assert truth(request.text, once) == truth(request.text, again)
    assert [repeated(text) for text in ("", once, again)] == [0, 0, 0.5]
