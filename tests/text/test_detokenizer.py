"""Text from tokens, against what the tokenizers themselves make of all tokens together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import takewhile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from builders.tokenizer_kinds import (
    LINES,
    kinds,
    make,
)
from genarm.engine.reply_text import TextStream
from genarm.text.detokenizer import BROKEN, Detokenizer, token_texts


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
        known = decoded(tokenizer, ids[:n], special=True).rstrip(BROKEN)  # what comes before a part of a character
        found = [known.find(s) for s in stop if s in known]
        if found:
            at, used = min(found), n
            break
    stream = TextStream(tokenizer, stop)
    shown = "".join(stream.add(token) for token in ids[: used - 1])
    assert not stream.stopped
    shown += "".join(stream.add(token) for token in ids[used - 1 : used]) + stream.finish()
    assert stream.stopped == (at < len(whole) or any(s in whole for s in stop))
    assert stream.finish() == ""
    visible = whole[:at]
    added = tokenizer.added_tokens_decoder.values()  # some are special and stand for nothing that has a name
    specials = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
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


@pytest.mark.parametrize("stop", ["<unk><", "B", "<unk>B", "C", "<unk><unk>", "A", "never"])
def test_bytes_before_special_tokens_and_stop_strings(stop: str) -> None:
    """Where special tokens are not shown, a run of bytes goes on after them, and its text is final only there."""
    tokenizer = make("stories260k")
    a, unk, b, c = tokenizer.convert_tokens_to_ids(["<0x41>", "<unk>", "<0x42>", "C"])
    for ids in ([a, unk, unk], [a, unk, c], [a, unk, b, unk, unk, c], [a, unk, b], [c, a, unk, unk, a, b, unk, c]):
        whole = decoded(tokenizer, ids, special=True)
        stream = TextStream(tokenizer, [stop])
        shown = ""
        for token in ids:
            shown += stream.add(token)
            if stream.stopped:
                break
        shown += stream.finish()
        assert shown == whole.split(stop)[0].replace("<unk>", "").replace(" ", ""), (ids, stop)


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
