"""Token ids of pairs: what is cut, what is dropped, and that both are counted."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from builders.tiny import SHARED, tiny_tokenizer
from genarm.data import formats
from genarm.data.formats.base import Preference
from genarm.data.preferences import PreferenceSet, load_preferences
from genarm.data.tokens import (
    EMPTY,
    EMPTY_PROMPT,
    IDENTICAL,
    IDENTICAL_CUT,
    TokenSet,
    report_table,
    split_by_prompt,
    tokenize,
)
from genarm.errors import DataError

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id


def pair(prompt: Any = "w0", chosen: str = " w1", rejected: str = " w2") -> Preference:
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected)


def encode(*pairs: Preference, prompt: int = 50, response: int = 50, **options: Any) -> TokenSet:
    return tokenize(TOKENIZER, pairs, max_prompt_tokens=prompt, max_response_tokens=response, **options)


def words(ids: Any) -> str:
    return str(TOKENIZER.decode(list(ids)))


def test_ids_and_end_of_turn() -> None:
    (found,) = encode(pair("w0 w1", " w2 w3", " w4")).pairs
    assert words(found.prompt_ids) == "w0 w1"
    assert words(found.chosen_ids) == "w2 w3 <end>"
    assert words(found.rejected_ids) == "w4 <end>"
    assert found.width == 5


def test_conversations_go_through_the_template() -> None:
    (found,) = encode(pair([{"role": "user", "content": "w0"}], "w1", "w2")).pairs
    assert words(found.prompt_ids) == "<user> w0 <end> <assistant>"
    assert words(found.chosen_ids) == "w1 <end>"


def test_prompts_are_cut_left_and_responses_right() -> None:
    found = encode(pair("w0 w1 w2 w3", " w4 w5 w6", " w7"), prompt=2, response=2)
    (cut,) = found.pairs
    assert words(cut.prompt_ids) == "w2 w3"
    assert words(cut.chosen_ids) == "w4 w5"  # cut, so without an end of turn
    assert words(cut.rejected_ids) == "w7 <end>"  # as long as allowed, so whole
    assert (found.report.cut_prompts, found.report.cut_chosen, found.report.cut_rejected) == (1, 1, 0)


def test_every_dropped_row_has_its_reason() -> None:
    found = encode(
        pair(),
        pair(chosen=" w1", rejected=" w1"),
        pair(chosen=" w1", rejected="  w1"),  # other text, same tokens
        pair(chosen=" w1 w2 w3", rejected=" w1 w2 w4"),
        pair(chosen=" ", rejected=" w1"),
        pair(prompt=""),
        response=2,
        malformed={"'chosen' is missing": 3},
    )
    assert found.report.dropped == {
        "'chosen' is missing": 3,
        IDENTICAL: 2,
        IDENTICAL_CUT: 1,
        EMPTY: 1,
        EMPTY_PROMPT: 1,
    }
    assert (found.report.rows, found.report.kept, len(found.pairs)) == (9, 1, 1)
    assert (found.report.cut_chosen, found.report.cut_rejected) == (0, 0)  # dropped rows do not count as cut


def test_repeated_rows_are_kept() -> None:
    """They carry the annotators' frequencies, which the Bradley–Terry model is fitted to."""
    assert encode(pair(), pair(), pair(chosen=" w2", rejected=" w1")).report.kept == 3


def test_conversation_that_the_template_refuses() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    conversation = [{"role": "user", "content": "w0"}]
    found = tokenize(tokenizer, [pair(), pair(conversation)], max_prompt_tokens=9, max_response_tokens=9)
    assert found.report.dropped == {"the chat template does not take this conversation: roles must alternate": 1}


def test_nothing_left_is_an_error_with_the_reasons() -> None:
    with pytest.raises(DataError, match=r"no pair is left .*identical \(2\)"):
        encode(pair(chosen=" w1", rejected=" w1"), pair(chosen=" w1", rejected=" w1"))


def test_conversation_without_a_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="--chat-template"):
        tokenize(tokenizer, [pair([{"role": "user", "content": "w0"}])], max_prompt_tokens=9, max_response_tokens=9)


def test_table_shows_every_count() -> None:
    training = encode(pair("w0 w1"), pair(chosen="w1", rejected="w1"), prompt=1).report
    console = Console(file=io.StringIO(), width=100)
    console.print(report_table({"training": training, "held out": encode(pair()).report}))
    lines = [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert ["rows", "2", "1"] in lines
    assert ["dropped:", *IDENTICAL.split(), "1", "0"] in lines
    assert ["pairs", "kept", "1", "1"] in lines
    assert ["prompts", "cut", "from", "the", "left", "1", "0"] in lines


def _set(prompts: list[str]) -> PreferenceSet:
    pairs = [pair(prompt, f"a{i}", f"b{i}") for i, prompt in enumerate(prompts)]
    return PreferenceSet(source="rows", format=formats.STANDARD, pairs=pairs, malformed={})


@given(
    prompts=st.lists(st.sampled_from("abcdefgh"), min_size=2).filter(lambda p: len(set(p)) > 1),
    fraction=st.floats(0.01, 0.9),
    seed=st.integers(0, 5),
)
def test_split_keeps_prompts_apart(prompts: list[str], fraction: float, seed: int) -> None:
    whole = _set(prompts)
    training, held_out = split_by_prompt(whole, fraction, seed)
    assert {p.prompt_key for p in training}.isdisjoint(p.prompt_key for p in held_out)
    assert sorted(p.chosen for p in training + held_out) == sorted(p.chosen for p in whole.pairs)
    assert training
    assert held_out
    assert split_by_prompt(whole, fraction, seed) == (training, held_out)


def test_split_follows_the_seed_and_needs_two_prompts() -> None:
    whole = _set([str(i) for i in range(50)])
    assert split_by_prompt(whole, 0.2, seed=0)[1] != split_by_prompt(whole, 0.2, seed=1)[1]
    assert len(split_by_prompt(whole, 0.2, seed=0)[1]) == 10
    with pytest.raises(DataError, match="one prompt only"):
        split_by_prompt(_set(["x", "x"]), 0.2, seed=0)


def test_prompt_key_tells_turns_apart() -> None:
    one = pair([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    two = pair([{"role": "user", "content": "a b"}])
    assert one.prompt_key != two.prompt_key


def test_real_data_within_a_real_context() -> None:
    """Cut pairs fit, uncut ones decode back to their texts."""
    path, model = SHARED / "data/hh-harmless/test.jsonl", SHARED / "models/lm-tiny"
    if not path.exists() or not model.exists():
        pytest.skip(f"{path} or {model} is not here")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    preferences = load_preferences(str(path)).pairs
    found = tokenize(tokenizer, preferences, max_prompt_tokens=64, max_response_tokens=32)
    assert found.report.cut_prompts > 0
    assert max(p.width for p in found.pairs) == 96
    whole = tokenize(tokenizer, preferences[:20], max_prompt_tokens=512, max_response_tokens=512)
    for preference, ids in zip(preferences[:20], whole.pairs, strict=True):
        assert ids.chosen_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids.chosen_ids[:-1]).strip() == preference.chosen.strip()
        assert preference.prompt[-1]["content"].strip() in tokenizer.decode(ids.prompt_ids)  # type: ignore[index]
