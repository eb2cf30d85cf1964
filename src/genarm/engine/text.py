"""Text from tokens as they come: whole characters only, and nothing that a stop string may still take back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextStream:
    """Turns token ids into pieces of text whose sum is the reply.

    Attributes:
        stopped: a stop string has come; the text ends before it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        """Begin a reply.

        Args:
            tokenizer: of the ids.
            stop: strings that end the text, none of them empty; they are looked for in the reply alone.
            before: the last tokens of a text that the reply continues.
        """
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = list(before)
        self._anchor = 0  # tokens from here on are decoded again, for the spaces and characters across tokens
        self._shown = len(before)  # tokens up to here have become text
        self._held = ""

    def add(self, token: int) -> str:
        """The text that is final with this token, often empty."""
        self._ids.append(token)
        before = self._decode(self._anchor, self._shown)
        now = self._decode(self._anchor, len(self._ids))
        if now.endswith("\ufffd"):  # a character of several tokens is not complete
            return ""
        if now != before:  # a special token has no text, and by itself no space before its successor either
            self._anchor = self._shown
        self._shown = len(self._ids)
        return self._pass_on(now[len(before) :])

    def finish(self) -> str:
        """What is still held back; the reply has ended."""
        if self.stopped:
            return ""
        before = self._decode(self._anchor, self._shown)
        rest = self._decode(self._anchor, len(self._ids))[len(before) :]
        self._shown = len(self._ids)
        text = self._pass_on(rest)
        held, self._held = self._held, ""
        return text + held

    def _decode(self, first: int, last: int) -> str:
        return str(self._tokenizer.decode(self._ids[first:last], skip_special_tokens=True))

    def _pass_on(self, text: str) -> str:
        if not self._stop:
            return text
        text = self._held + text
        ends = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
