"""From token ids back to text: the one place that knows how.

A token's text depends on its neighbours: a character may take several tokens, a tokenizer may drop the space before
the first word, join pieces ("##ing") or read a run of bytes as a whole. So text is always what the tokenizer says of
tokens together, never a sum of tokens decoded one by one; nor does a tokenizer's "clean-up" take part, which deletes
spaces that were drawn (`x != y` would become `x!= y`).
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"
"""What stands for bytes that are no whole character."""

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_NEAR = 8
"""Visible tokens after which no earlier one can change what follows: more than one character ever takes."""
_WINDOW = 3 * _NEAR


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, special: bool) -> str:
    """The text of `ids`, with the strings of special tokens (end of turn, say) or without them."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False))


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, ...]:
    """What each token adds to the text of `ids`, special tokens included: joined, the pieces are that text.

    Of a character that takes several tokens the last one has the text, and the others have none.
    """
    detokenizer = Detokenizer(tokenizer, special=True)
    starts, text = [], ""
    for token in ids:
        starts.append(detokenizer.position)
        text += detokenizer.add(token)
    text += detokenizer.finish()
    return tuple(text[start:end] for start, end in pairwise([*starts, len(text)]))


class Detokenizer:
    """Token ids in, text out as soon as it is final: the sum is what the tokenizer makes of all ids together.

    A character of several tokens comes with its last one. Bytes that never become a character come as U+FFFD, once
    that is certain. The time for a token does not depend on how many came before it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = (), *, special: bool) -> None:
        """Begin a text.

        Args:
            tokenizer: of the ids.
            before: tokens that the text continues; they give no text themselves.
            special: special tokens have a text, too.
        """
        self._tokenizer = tokenizer
        self._special = special
        self._whole = bool(getattr(tokenizer, "is_fast", False))  # others may rewrite the last token's text
        self._bytes: dict[int, int | None] = {}
        self._visible: dict[int, bool] = {}
        self._ids = self._nearest(before)  # those that are decoded together
        self._last = self._decode()
        self._before: str | None = self._last if self._ids else None  # until the first text of our own
        self._shown = len(self._last)  # characters of the decoded text that are out, or were there before
        self._length = self._ahead = 0
        self._run = _Run()
        for token in self._ids:
            self._take_byte(token)
        self._done = self._run.characters

    @property
    def position(self) -> int:
        """Characters so far; an incomplete one does not count, so that this is where it begins."""
        return self._length + self.waiting

    @property
    def waiting(self) -> int:
        """Characters of those that are not final, and so not out."""
        return self._ahead + max(0, self._run.characters - self._done)

    def add(self, token: int) -> str:
        """The text that is final with this token, often empty."""
        if not self.sees(token):
            return ""
        self._ids.append(token)
        if self._take_byte(token):  # only the end of a run of bytes says how all of it is read
            return ""
        return self._settle(final=False)

    def sees(self, token: int) -> bool:
        """Whether the token takes part in the text; otherwise it is none at all, or a special one that is left out."""
        if token not in self._visible:
            known = self._tokenizer.convert_ids_to_tokens(token) is not None
            left_out = not decode(self._tokenizer, [token], special=self._special) and bool(
                decode(self._tokenizer, [token], special=True)
            )
            self._visible[token] = known and not left_out
        return self._visible[token]

    def finish(self) -> str:
        """What was not final; nothing comes after it."""
        return self._settle(final=True)

    def _settle(self, *, final: bool) -> str:
        now = self._decode()
        if self._before is not None:  # a character that began there is completed here, and belongs to us
            self._shown = _common(self._before, now)
        complete = len(now) if final else len(now) - now.endswith(BROKEN)
        end = complete if final or self._whole else _common(self._last, now)
        text = now[self._shown : end]
        self._last, self._done = now, self._run.characters
        if text:
            self._before = None
            self._shown = end
            self._length += len(text)
        self._ahead = max(0, complete - self._shown)
        if self._before is None and len(self._ids) > _WINDOW:
            self._shorten()
        return text

    def _shorten(self) -> None:
        """Go on with the last tokens alone, where they say the same of what is not out yet."""
        ids = self._nearest(self._ids)
        text = decode(self._tokenizer, ids, special=self._special)
        held = self._last[self._shown :]
        if text.endswith(held):
            self._ids, self._last, self._shown = ids, text, len(text) - len(held)

    def _nearest(self, ids: Sequence[int]) -> list[int]:
        """The last visible ones of `ids`, not beginning within a run of bytes."""
        found: list[int] = []
        for token in reversed(ids):
            if self.sees(token):
                found.append(token)
                if len(found) >= _NEAR and self._byte(token) is None:
                    break
        return found[::-1]

    def _decode(self) -> str:
        return decode(self._tokenizer, self._ids, special=self._special)

    def _take_byte(self, token: int) -> bool:
        byte = self._byte(token)
        if byte is None:
            self._run, self._done = _Run(), 0
            return False
        self._run.add(byte)
        return True

    def _byte(self, token: int) -> int | None:
        """The byte of a token that stands for one, of tokenizers that write unknown characters so."""
        if token not in self._bytes:
            name = str(self._tokenizer.convert_ids_to_tokens(token))
            match = _BYTE.fullmatch(name)
            stands = match is not None and decode(self._tokenizer, [token], special=True) != name
            self._bytes[token] = int(match[1], 16) if match and stands else None
        return self._bytes[token]


def _common(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


class _Run:
    """Successive tokens for single bytes, read as a whole: as UTF-8, or byte by byte where they are none."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._valid = True
        self._bytes = 0
        self._characters = 0

    @property
    def characters(self) -> int:
        """Those that are complete."""
        return self._characters if self._valid else self._bytes

    def add(self, byte: int) -> None:
        """The next byte."""
        self._bytes += 1
        if self._valid:
            try:
                self._characters += len(self._decoder.decode(bytes([byte])))
            except UnicodeDecodeError:
                self._valid = False


# --- tokens by themselves -------------------------------------------------------------------------------------------

_ANCHORS = 2000


@cache
def _byte_level() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


@dataclass(frozen=True)
class TokenText:
    """A token by itself: its bytes, and those as text, or as hexadecimal numbers where they are no whole characters."""

    text: str
    data: bytes


class TokenTexts:
    """What single tokens are called: those that were drawn, and those that might have come in their place."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        self._anchor = self._find_anchor()
        self._known: dict[tuple[int, bool], TokenText] = {}

    def of(self, token_id: int, *, first: bool = False) -> TokenText:
        """One token as it stands in a text; at the beginning of a text it has no space before it."""
        key = (token_id, first)
        if key not in self._known:
            data = self._data(token_id, first)
            try:
                text = data.decode()
            except UnicodeDecodeError:
                text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
            self._known[key] = TokenText(text, data)
        return self._known[key]

    def is_special(self, token_id: int) -> bool:
        """Whether it is one of the added tokens, which stand for themselves."""
        return token_id in self._special

    def _data(self, token_id: int, first: bool) -> bytes:
        raw = self._tokenizer.convert_ids_to_tokens(token_id)
        if raw is None:  # a row that pads the output layer
            return b""
        raw = str(raw)
        if token_id in self._special:
            return raw.encode()
        before = [] if first or self._anchor is None else [self._anchor]
        text = self._decode([*before, token_id])[len(self._decode(before)) :]
        if BROKEN not in text:
            return text.encode()
        fallback = _BYTE.fullmatch(raw)  # part of a character: decoding alone cannot show it
        if fallback:
            return bytes([int(fallback[1], 16)])
        if all(character in _byte_level() for character in raw):
            return bytes(_byte_level()[character] for character in raw)
        return text.encode()

    def _find_anchor(self) -> int | None:
        """A word after which other tokens keep the spaces before them."""
        for token_id in range(min(_ANCHORS, len(self._tokenizer))):
            if token_id not in self._special and self._decode([token_id]).strip().isalpha():
                return token_id
        return next((i for i in range(len(self._tokenizer)) if i not in self._special), None)

    def _decode(self, ids: Sequence[int]) -> str:
        return decode(self._tokenizer, ids, special=True)
