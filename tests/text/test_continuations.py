"""What follows a prompt, in tokens: it reads as the response itself, wherever the prompt stops."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from builders.tokenizer_kinds import LINES, kinds, make
from genarm.text.prompts import Reading, as_conversation, encode_pair, encode_prompt

words = st.sampled_from([*" ".join(LINES).split(), "covid", "<think>", "😀", "é", "!=", "", "\n", "▁", "ﬁ"])
texts = st.lists(st.one_of(words, st.text(max_size=3)), min_size=2, max_size=8).map(" ".join)


def read(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def behind(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> list[int]:
    """The response's ids, without the one that ends it."""
    ids = encode_pair(tokenizer, prompt, response)[1]
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def usual_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> list[int]:
    """Of both together, or of the response alone where the prompt's ids would be others."""
    before = encode_prompt(tokenizer, prompt)
    together = tokenizer(prompt + response).input_ids
    if together[: len(before)] == before:
        return list(together[len(before) :])
    return list(tokenizer(response, add_special_tokens=False).input_ids)


def anchored_ids(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int] | None:
    anchor, whole = (tokenizer(text, add_special_tokens=False).input_ids for text in ("\n", "\n" + response))
    return list(whole[len(anchor) :]) if whole[: len(anchor)] == anchor else None


@kinds
@settings(max_examples=80, deadline=None)
@given(text=texts, cut=st.floats(0, 1))
@example(text="the quick brown fox", cut=0.7)
@example(text="going gone", cut=0.65)
@example(text="the quick  brown fox", cut=0.5)
def test_a_response_is_read_as_it_is_written_wherever_one_of_the_two_ways_does(
    kind: str, text: str, cut: float
) -> None:
    """The usual ids stay wherever they say what is written, and those of byte-level tokenizers always."""
    tokenizer = make(kind)
    at = max(1, round(cut * len(text)))
    prompt, response = text[:at], text[at:]
    if not tokenizer(prompt).input_ids:
        return
    before = encode_prompt(tokenizer, prompt)
    found, usual = behind(tokenizer, prompt, response), usual_ids(tokenizer, prompt, response)
    if kind in ("byte level", "lm-small") or read(tokenizer, before + usual) == text:
        assert found == usual
    anchored = anchored_ids(tokenizer, response)
    if anchored is not None and read(tokenizer, before) == prompt and read(tokenizer, before + anchored) == text:
        assert read(tokenizer, before + found) == text


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("Once upon a time there was a ", "little girl named Lily."),
        ("the quick bro", "wn fox"),
        ("The answer is: ", "a big dog"),
        ("def f(x):\n    ", "return x"),
    ],
)
@pytest.mark.parametrize("kind", ["byte fallback", "stories260k", "byte level", "lm-small"])
def test_nothing_stands_between_prompt_and_response(kind: str, prompt: str, response: str) -> None:
    """SentencePiece would put a space before a response that it is given alone."""
    tokenizer = make(kind)
    assert read(tokenizer, encode_prompt(tokenizer, prompt) + behind(tokenizer, prompt, response)) == prompt + response


@pytest.mark.parametrize("kind", ["byte fallback", "stories260k", "byte level"])
@pytest.mark.parametrize("said", ["Hi", "Hi <s>"])
def test_a_template_may_end_with_a_space(kind: str, said: str) -> None:
    """As Vicuna's; also where the prompt has a control token's string that is read as ordinary text."""
    tokenizer = make(kind)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' }}{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' else ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    )
    prompt, response = encode_pair(tokenizer, as_conversation(said), "Hello there", Reading(plain_user_text=True))
    assert read(tokenizer, prompt + response) == f"USER: {said} ASSISTANT: Hello there"
