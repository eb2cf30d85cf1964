"""A reply's text as its tokens come: final characters only, and nothing that a stop string may still take back."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from genarm.text.detokenizer import Detokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextStream:
    """Turns token ids into pieces of text whose sum is the reply.

    The reply has no special tokens in it. Stop strings are looked for in the text that has them, so that a special
    token can be one, or be part of one; the earliest one ends the reply.

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
            before: the tokens of a text that the reply continues.
        """
        self.stopped = False
        self._tokenizer = tokenizer
        self._shown = Detokenizer(tokenizer, before, special=False)
        self._searched = Detokenizer(tokenizer, before, special=True) if stop else None
        self._stops = [_Search(text) for text in stop]
        self._held: deque[_Piece] = deque()
        self._owed: list[_Piece] = []  # of the held ones, those whose shown text is not final yet

    @property
    def position(self) -> int:
        """Where in the reply's text the next token begins, in characters; see `Detokenizer.position`."""
        return self._shown.position

    def add(self, token: int, *, early: bool = False) -> str:
        """The text that is final with this token, often empty; a stop string that ends in an `early` one is none."""
        shown = self._shown.add(token)
        if self._searched is None:
            return shown
        searched = self._searched.add(token)
        if self._shown.sees(token):
            return self._pass_on(_Piece(searched, self._pay(shown)), early=early)
        hidden = str(self._tokenizer.convert_ids_to_tokens(token) or "")
        piece = _Piece(searched.removesuffix(hidden), "")
        # A run of bytes ends at a special token where that is searched, and goes on after it where it is not shown.
        piece.owed = min(len(piece.searched), self._shown.waiting - sum(p.owed for p in self._owed))
        if piece.owed:
            self._owed.append(piece)
        return self._pass_on(piece, _Piece(searched and hidden, ""), early=early)

    def finish(self) -> str:
        """What is still held back; the reply has ended."""
        if self.stopped:
            return ""
        shown = self._shown.finish()
        if self._searched is None:
            return shown
        text = self._pass_on(_Piece(self._searched.finish(), self._pay(shown)))
        rest = "".join(piece.shown for piece in self._held)
        self._held.clear()
        return text + rest

    def _pass_on(self, piece: _Piece, hidden: _Piece | None = None, *, early: bool = False) -> str:
        """What is out of reach of every stop string, now that this text has come."""
        self._held.extend([piece] if hidden is None else [piece, hidden])
        new = piece.searched if hidden is None else piece.searched + hidden.searched
        found = [keep for keep in (stop.feed(new, early=early) for stop in self._stops) if keep is not None]
        if not found:
            return self._take(max(stop.begun for stop in self._stops))
        self.stopped = True
        rest = self._pay(self._shown.finish())  # bytes that another token would have decided about
        piece.shown += rest
        text = self._take(max(found))
        self._held.clear()
        return text

    def _pay(self, shown: str) -> str:
        """What of newly shown text is its own token's, after the pieces that it was owed to have theirs."""
        if not shown:
            return ""
        for piece in self._owed:
            piece.shown, shown, piece.owed = shown[: piece.owed], shown[piece.owed :], 0
        self._owed.clear()
        return shown

    def _take(self, keep: int) -> str:
        """Take out what is shown of the held text but for its last `keep` characters, as they are searched."""
        count = sum(len(piece.searched) for piece in self._held) - keep
        taken = ""
        while self._held and not self._held[0].owed and count >= len(self._held[0].searched):
            piece = self._held.popleft()
            taken += piece.shown
            count -= len(piece.searched)
        if self._held and not self._held[0].owed and count > 0:
            piece = self._held[0]
            cut = max(0, len(piece.shown) - (len(piece.searched) - count))  # they differ at the beginning, by a space
            taken += piece.shown[:cut]
            piece.searched, piece.shown = piece.searched[count:], piece.shown[cut:]
        return taken


@dataclass
class _Piece:
    """Some text as stop strings are looked for in it, and as it is shown.

    Attributes:
        owed: how many characters of the shown text are still to come.
    """

    searched: str
    shown: str
    owed: int = 0


class _Search:
    """Looks for one stop string in a text that comes in pieces, each character once (Knuth, Morris and Pratt).

    Attributes:
        begun: how many characters of the stop string the text ends with.
    """

    def __init__(self, stop: str) -> None:
        self.begun = 0
        self._stop = stop
        self._back = [0]  # of each beginning, the longest shorter one that it ends with
        for end in range(1, len(stop)):
            self._back.append(self._next(self._back[-1], stop[end]))

    def feed(self, piece: str, *, early: bool) -> int | None:
        """How many characters before the end of `piece` the stop string begins, if it comes to its end in it."""
        for i, character in enumerate(piece):
            self.begun = self._next(self.begun, character)
            if self.begun == len(self._stop) and early:
                self.begun = self._back[-1]
            elif self.begun == len(self._stop):
                return len(piece) - (i + 1 - len(self._stop))
        return None

    def _next(self, begun: int, character: str) -> int:
        while begun and self._stop[begun] != character:
            begun = self._back[begun - 1]
        return begun + (self._stop[begun] == character)
