"""Control tokens that somebody types: with `plain_user_text` they are ordinary text, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from builders.tiny import tiny_tokenizer
from builders.tokenizer_kinds import KINDS, kinds, make
from genarm.errors import ConversationError, UnsupportedError
from genarm.text.plain import plain
from genarm.text.prompts import Reading, encode_pair, encode_prompt

TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}<turn>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and '</think>' in m['content'] %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] | trim }}{% endif %}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% if note %}{{ note }}<think>{% endif %}{% endif %}"
)
PLAIN = Reading(plain_user_text=True)


def with_template(kind: str) -> PreTrainedTokenizerBase:
    tokenizer = make(kind)
    if kind not in ("lm-small", "words"):  # which have their own
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def chat(*contents: str) -> list[dict[str, str]]:
    roles = ["system", *["user", "assistant"] * len(contents)]
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def controls(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    return sum(i in plain(tokenizer).control for i in ids)


@kinds
def test_typed_control_tokens_are_ordinary_text(kind: str) -> None:
    tokenizer = with_template(kind)
    tokens = [*tokenizer.all_special_tokens, *(["<think>"] if "<think>" in tokenizer.get_vocab() else [])]
    harmless = chat("the dog", " w1 going \n", "the lazy dog", "w2")
    hostile = chat("the dog", f" w1{tokens[0]} going{tokens[-1]} \n", "the lazy dog", f"\n{''.join(tokens)}w2")
    usual = encode_prompt(tokenizer, harmless)
    assert encode_prompt(tokenizer, harmless, PLAIN) == usual
    ids = encode_prompt(tokenizer, hostile, PLAIN)
    assert controls(tokenizer, ids) == controls(tokenizer, usual)
    assert controls(tokenizer, encode_prompt(tokenizer, hostile)) > controls(tokenizer, usual)
    text = tokenizer.apply_chat_template(hostile, tokenize=False, add_generation_prompt=True)
    if kind in ("byte level", "byte fallback", "lm-small", "stories260k"):  # the others know few characters
        decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert "".join(decoded.split()) == "".join(text.split())  # <turn> and <mask> take the spaces beside them
    assert encode_pair(tokenizer, hostile, "w3", PLAIN)[0] == ids


@kinds
def test_a_text_without_anything_typed_is_read_as_ever(kind: str) -> None:
    """Even by the twin that has secret names."""
    tokenizer = make(kind)
    for text in ("the dog <turn> does n't  jump", "covid is 😀\n", "<s>w1 w2 <end>"):
        usual = tokenizer(text, add_special_tokens=False).input_ids
        assert plain(tokenizer).encode([(text, True)], special=False) == usual
        half = len(text) // 2
        if "<" not in text:
            assert plain(tokenizer).encode([(text[:half], False), (text[half:], True)], special=True) == (
                tokenizer(text).input_ids
            )


def test_typed_control_tokens_in_plain_text() -> None:
    tokenizer = make("byte level")
    ids = encode_prompt(tokenizer, "the <end>dog<end>", PLAIN)
    assert controls(tokenizer, ids) == 0
    assert tokenizer.decode(ids) == "the <end>dog<end>"


def test_a_template_that_does_more_than_write_messages_down() -> None:
    tokenizer = with_template("byte level")
    kept: Any = chat("x", "hi", "<think>why</think> hello", "more")
    assert encode_prompt(tokenizer, kept, PLAIN) == encode_prompt(tokenizer, kept)
    with pytest.raises(ConversationError, match="cannot be read as ordinary text; take it out"):
        encode_prompt(tokenizer, chat("x", "hi", "<think>why</think> hello<end>", "more"), PLAIN)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ m['content'] | length }}{% endfor %}"
    with pytest.raises(ConversationError, match="does more with messages"):
        encode_prompt(tokenizer, chat("x", "hi <end>"), PLAIN)


def test_template_arguments_are_typed_text_as_well() -> None:
    tokenizer = with_template("byte level")
    readings = [Reading(plain_user_text=True, template_args={"note": note}) for note in ("hello", "hello<end>")]
    harmless, hostile = (controls(tokenizer, encode_prompt(tokenizer, chat("x", "hi"), r)) for r in readings)
    assert harmless == hostile


def test_a_tokenizer_without_a_twin() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UnsupportedError, match="with a Slow"):
        plain(Slow())  # type: ignore[arg-type]
    assert set(KINDS) >= {"words"}
    assert plain(tiny_tokenizer()).special
