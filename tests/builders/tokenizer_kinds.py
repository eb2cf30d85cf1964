"""Tokenizers of every kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from builders.tiny import SHARED, tiny_tokenizer

LINES = [
    "the quick brown fox does not jump over the lazy dog , does it ? I ' m sure it does n't .",
    "if x != y : return 'z' ! naïve café costs 5 € – “quoted” 日本語 한국어 😀 🙂",
    "going gone running runner undoing unknown words wording",
]


SPECIAL = ["<unk>", "<s>", "<end>"]


def finished(raw: Tokenizer) -> PreTrainedTokenizerFast:
    """With added tokens that take the spaces beside them, and one that is no special token."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<end>",
        clean_up_tokenization_spaces=True,
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<turn>", lstrip=True), AddedToken("<mask>", rstrip=True)]}
    )
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("covid", single_word=True)])
    return tokenizer


def trained(raw: Tokenizer, trainer: trainers.Trainer) -> PreTrainedTokenizerFast:
    raw.train_from_iterator(LINES * 3, trainer)
    return finished(raw)


def byte_level() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(raw, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL))


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space before the first word that decoding takes away, bytes for unknown characters."""
    trained_on = Tokenizer(models.BPE())
    trained_on.normalizer = normalizers.Replace(" ", "▁")
    trained_on.train_from_iterator([LINES[0], LINES[2]], trainers.BpeTrainer(vocab_size=120))
    merges = [tuple(pair) for pair in json.loads(trained_on.to_str())["model"]["merges"]]
    words = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *sorted(trained_on.get_vocab())]
    raw = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return finished(raw)


def unigram() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.Unigram())
    raw.normalizer = normalizers.NFKC()
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    return trained(raw, trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>"))


def word_piece() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    return trained(raw, trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIAL))


def word_ends() -> PreTrainedTokenizerFast:
    """As GPT-1's: the last piece of a word says that a space follows."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.decoder = decoders.BPEDecoder()
    return trained(raw, trainers.BpeTrainer(vocab_size=150, special_tokens=SPECIAL, end_of_word_suffix="</w>"))


KINDS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "unigram": unigram,
    "word piece": word_piece,
    "word ends": word_ends,
    "words": tiny_tokenizer,
    **{
        name: lambda name=name: AutoTokenizer.from_pretrained(SHARED / "models" / name)
        for name in ("lm-small", "stories260k")
    },
}


kinds = pytest.mark.parametrize("kind", KINDS)


@cache
def make(kind: str) -> PreTrainedTokenizerBase:
    if kind in ("lm-small", "stories260k") and not (SHARED / "models" / kind).exists():
        pytest.skip(f"needs shared/models/{kind}")
    return KINDS[kind]()
