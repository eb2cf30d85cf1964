"""Text from tokens, against what the tokenizers themselves make of all tokens together."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import cache
from itertools import takewhile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from genarm.engine.reply_text import TextStream
from genarm.text.detokenizer import BROKEN, Detokenizer, token_texts
from tiny import SHARED, tiny_tokenizer

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


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, special: bool = False) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)


def after(before: str, text: str) -> str:
    """What of `text` follows `before`, which may have ended within a character."""
    while not text.startswith(before):
        before = before[:-1]
    return text[len(before) :]


texts = st.lists(
    st.one_of(
        st.sampled_from([*" ".join(LINES).split(), "<end>", "<turn>", "<think>", "😀", "é", "!=", "covid", "  ", "\n"]),
        st.text(max_size=4),
    ),
    max_size=12,
).map(" ".join)


def ids_of(data: st.DataObject, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Of a text, cut anywhere, or any at all."""
    anything = st.lists(st.integers(0, len(tokenizer) + 1), max_size=40)
    encoded = texts.map(lambda text: list(tokenizer(text, add_special_tokens=False).input_ids))
    return data.draw(st.one_of(encoded, anything))


@kinds
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_text_in_its_context(kind: str, data: st.DataObject) -> None:
    tokenizer = make(kind)
    before, ids = ids_of(data, tokenizer), ids_of(data, tokenizer)
    for special in (False, True):
        detokenizer = Detokenizer(tokenizer, before, special=special)
        pieces = [detokenizer.add(token) for token in ids]
        whole = after(decoded(tokenizer, before, special=special), decoded(tokenizer, [*before, *ids], special=special))
        assert "".join(pieces) + detokenizer.finish() == whole
        assert detokenizer.finish() == ""
        for n in range(len(ids) + 1):  # nothing is shown that the tokenizer takes back
            assert whole.startswith("".join(pieces[:n]))
    assert "".join(token_texts(tokenizer, ids)) == decoded(tokenizer, ids, special=True)


@kinds
@settings(max_examples=30, deadline=None)
@given(text=texts)
@example(text="I 😀 you")
def test_a_token_begins_where_the_text_before_it_ends(kind: str, text: str) -> None:
    """One within a character begins with that."""
    tokenizer = make(kind)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    whole = decoded(tokenizer, ids)
    if BROKEN in whole:
        return
    detokenizer = Detokenizer(tokenizer, special=False)
    for n, token in enumerate(ids):
        run = run_of_bytes(tokenizer, ids[:n])
        known = decoded(tokenizer, ids[: n - len(run)]).removesuffix(BROKEN)

        assert detokenizer.position == len(known) + len(run.decode(errors="ignore"))
        detokenizer.add(token)


def run_of_bytes(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> bytes:
    """Those of the tokens for single bytes that `ids` end with; they are decoded as a whole."""
    names = takewhile(lambda name: name.startswith("<0x"), reversed(tokenizer.convert_ids_to_tokens(list(ids))))
    return bytes(int(name[3:-1], 16) for name in names)[::-1]


@kinds
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_stop_strings_against_decoding_everything_again(kind: str, data: st.DataObject) -> None:
    tokenizer = make(kind)
    ids = ids_of(data, tokenizer)
    whole = decoded(tokenizer, ids, special=True)
    places = st.tuples(st.integers(0, max(0, len(whole) - 1)), st.integers(1, 6)).map(lambda p: whole[p[0] : sum(p)])
    stop = [s for s in data.draw(st.lists(st.one_of(places, texts), min_size=1, max_size=3)) if s and BROKEN not in s]
    if not stop or BROKEN in whole:
        return
    at, used = len(whole), len(ids)
    for n in range(1, len(ids) + 1):
        known = decoded(tokenizer, ids[:n], special=True)
        found = [known.find(s) for s in stop if s in known]
        if found and BROKEN not in known:
            at, used = min(found), n
            break
    stream = TextStream(tokenizer, stop)
    shown = "".join(stream.add(token) for token in ids[: used - 1])
    assert not stream.stopped
    shown += "".join(stream.add(token) for token in ids[used - 1 : used]) + stream.finish()
    assert stream.stopped == (at < len(whole) or any(s in whole for s in stop))
    assert stream.finish() == ""
    visible = whole[:at]
    specials = {*tokenizer.all_special_tokens}
    if specials.intersection(tokenizer.convert_ids_to_tokens(ids)):  # tokenizers may put spaces around them
        for token in specials:
            visible = visible.replace(token, "")
        for token in specials:  # one that the stop string begins within is not shown either
            begins = (n for n in range(len(token), 0, -1) if whole.startswith(token, at - n))
            cut = next((n for n in begins if n <= at and visible.endswith(token[:n])), 0)
            visible = visible[: len(visible) - cut]
        visible, shown = visible.replace(" ", ""), shown.replace(" ", "")
        if visible and decoded(tokenizer, ids).startswith("##"):  # the end of a word stays one where no word is shown
            visible = "##" + visible.removeprefix("##")
    assert shown == visible


def test_a_stop_string_in_the_end_of_a_word_that_follows_special_tokens() -> None:
    """WordPiece shows such a token with its mark only where nothing is shown before it."""
    tokenizer = make("word piece")
    name = next(name for name in sorted(tokenizer.get_vocab()) if name.startswith("##") and name.find("g") > 2)
    for before, shown in (("<unk>", "##"), ("x", "x")):
        stream = TextStream(tokenizer, ["g"])
        ids = tokenizer.convert_tokens_to_ids(["<unk>", before, name])
        assert "".join(map(stream.add, ids)) == shown + name[2 : name.index("g")]
        assert stream.stopped


@kinds
def test_a_special_token_can_stop_a_reply(kind: str) -> None:
    tokenizer = make(kind)
    ids = tokenizer("w1 w2", add_special_tokens=False).input_ids
    end = tokenizer.eos_token
    for stop in (end, end[1:]):
        stream = TextStream(tokenizer, ["never", stop])
        shown = "".join(stream.add(token) for token in [*ids, tokenizer.eos_token_id])
        assert stream.stopped
        assert shown == decoded(tokenizer, ids)
    stream = TextStream(tokenizer, ["never"])
    assert "".join(map(stream.add, [*ids, tokenizer.eos_token_id])) + stream.finish() == decoded(tokenizer, ids)


@kinds
def test_the_cost_of_a_token_does_not_grow(kind: str) -> None:
    tokenizer = make(kind)
    one = tokenizer("😀", add_special_tokens=False).input_ids
    for ids in (
        one,
        one[:-1] or one,
        [tokenizer.eos_token_id],
        tokenizer("the dog", add_special_tokens=False).input_ids,
    ):
        many = (ids * 4000)[:4000]
        began = time.process_time()
        stream = TextStream(tokenizer, ["never", "<never>"])
        text = "".join(map(stream.add, many)) + stream.finish()
        assert time.process_time() - began < 2
        assert text == decoded(tokenizer, many)
