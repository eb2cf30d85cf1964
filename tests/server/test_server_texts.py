"""Tokens by themselves: their bytes are those of the text, whatever the tokenizer does with spaces and characters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from builders.templates import THINKING
from builders.tiny import SHARED, tiny_tokenizer
from genarm.errors import ConfigError, DataError
from genarm.server.texts import Texts
from genarm.text.prompts import Reading

LINES = [
    "Once upon a time",
    " two  spaces and\ttabs\n",
    "naïve café – “quoted”",
    "你好, 世界",
    "👩‍👩‍👧 family",
    "x=1;y=[2]",
]


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's: characters beyond ASCII are several tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<end>"]
    )
    raw.train_from_iterator(["once upon a time there was a family"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: spaces are "▁", decoding takes the first one away, unknown characters are bytes."""
    words = ["<unk>", "<end>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"Onceupatimdfly", "▁a", "▁ti"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    merges = [("▁", "a"), ("t", "i"), ("▁", "ti")]
    vocabulary.setdefault("ti", len(vocabulary))
    raw = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", unk_token="<unk>")


def check(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = Texts(tokenizer)
    for line in LINES:
        ids = tokenizer(line, add_special_tokens=False).input_ids
        tokens = [texts.token(token_id, first=place == 0) for place, token_id in enumerate(ids)]
        assert b"".join(token.data for token in tokens).decode() == line
        for token in tokens:
            assert token.text.encode() == token.data or token.text.startswith("bytes:\\x")
    texts.close()


def test_bytes_of_byte_level_tokens() -> None:
    check(byte_level())


def test_bytes_of_tokens_that_fall_back_to_bytes() -> None:
    check(byte_fallback())


@pytest.mark.skipif(not (SHARED / "models" / "lm-tiny").exists(), reason="needs shared/models/lm-tiny")
def test_bytes_of_a_real_tokenizer() -> None:
    check(AutoTokenizer.from_pretrained(SHARED / "models" / "lm-tiny"))


def test_special_padding_and_partial_tokens() -> None:
    tokenizer = byte_level()
    texts = Texts(tokenizer)
    end = texts.token(tokenizer.eos_token_id)
    assert (end.text, end.data) == ("<end>", b"<end>")
    beyond = texts.token(len(tokenizer) + 5)
    assert (beyond.text, beyond.data) == ("", b"")
    parts = [texts.token(i) for i in tokenizer("é").input_ids]
    assert [part.text for part in parts] == ["bytes:\\xc3", "bytes:\\xa9"]
    texts.close()


def test_encoding() -> None:
    texts = Texts(tiny_tokenizer())
    chat = [{"role": "user", "content": "w1"}]
    assert asyncio.run(texts.encode("w1 w2")) == [7, 8]
    assert texts.decode([7, 8]) == "w1 w2"
    assert asyncio.run(texts.encode(chat)) == tiny_tokenizer()("<user> w1 <end> <assistant>").input_ids
    with pytest.raises(DataError, match="prompt is empty"):
        asyncio.run(texts.encode(""))
    texts.close()
    own = tiny_tokenizer()
    own.chat_template = THINKING
    usual = asyncio.run(Texts(own).encode(chat))
    thinking = Texts(own, Reading(template_args={"enable_thinking": False}))
    assert asyncio.run(thinking.encode(chat)) == [*usual, 6]
    assert asyncio.run(thinking.encode(chat, {"enable_thinking": True})) == usual
    with pytest.raises(ConfigError, match="no argument 'thinking'"):
        asyncio.run(thinking.encode(chat, {"thinking": True}))
    thinking.close()
    silent = Texts(byte_level())
    assert not silent.chats
    with pytest.raises(DataError, match="no chat template"):
        asyncio.run(silent.encode(chat))
    silent.close()


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_where_tokens_begin_in_their_text(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    """A token within a character begins with it; what the tokenizer puts before a text takes no room in it."""
    tokenizer = make()
    texts = Texts(tokenizer)
    text = "I 😀 you time"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    offsets = asyncio.run(texts.offsets(text, ids))
    assert len(offsets) == len(ids)
    assert {at for at in offsets if text[at] == "😀"} == {2}
    ends = [*offsets[1:], len(text)]
    pieces = [text[start:end] for start, end in zip(offsets, ends, strict=True)]
    assert "".join(pieces) == text
    last = texts.token(ids[-1]).text
    assert text.endswith(last)
    assert offsets[-1] == len(text) - len(last)
    assert asyncio.run(texts.offsets(text, [tokenizer.eos_token_id, *ids])) == [0, *offsets]
    assert asyncio.run(texts.offsets(f"<end>{text}", [tokenizer.eos_token_id, *ids]))[1] == len("<end>")
    texts.close()
