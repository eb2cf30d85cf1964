"""How a judge's reply is read. Whatever is not exactly what the protocol asks for is None, never a tie.

What a reasoning model thinks aloud, up to `</think>` or to where it was cut off, is no part of its reply; emphasis
(`**8 7**`) is overlooked.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from genarm.data.tables import FORBID
from genarm.errors import ConfigError

Preference: TypeAlias = Literal[1, 0, -1]
"""1: the answer shown first is better; 0: neither; -1: the one shown second."""

_NUMBER = r"[0-9]{1,6}(?:\.[0-9]{1,6})?"
_TWO_NUMBERS = re.compile(rf"({_NUMBER})(?:,?\s+)({_NUMBER})")


@dataclass(frozen=True, kw_only=True)
class TwoScores:
    """Two numbers from `low` to `high` that fill the `line` (first or last) which is not blank; the higher one wins."""

    __pydantic_config__ = FORBID

    line: str = "first"
    low: float = 1.0
    high: float = 10.0

    def __post_init__(self) -> None:
        if self.line not in ("first", "last"):
            raise ConfigError(f"the parser's line is {self.line!r}; it must be first or last")
        _check_range(self.low, self.high)

    def __call__(self, reply: str) -> Preference | None:
        """What the scores say (None: no such line)."""
        found = _TWO_NUMBERS.fullmatch(_line(reply, -1 if self.line == "last" else 0))
        if found is None:
            return None
        first, second = float(found[1]), float(found[2])
        if not (self.low <= first <= self.high and self.low <= second <= self.high):
            return None
        return 0 if first == second else 1 if first > second else -1


@dataclass(frozen=True, kw_only=True)
class VerdictTag:
    """One of three tags, anywhere in the reply and with none of the others."""

    __pydantic_config__ = FORBID

    first: str = "[[A]]"
    second: str = "[[B]]"
    tie: str = "[[C]]"

    def __post_init__(self) -> None:
        tags = (self.first, self.second, self.tie)
        if any(a in b for a in tags for b in tags if a is not b):
            raise ConfigError(f"the parser's tags are {', '.join(map(repr, tags))}; none may be part of another")

    def __call__(self, reply: str) -> Preference | None:
        """What the tag says (None: no tag, or different ones)."""
        tags: dict[str, Preference] = {self.first: 1, self.tie: 0, self.second: -1}
        spoken = _spoken(reply)
        found = [preference for tag, preference in tags.items() if tag in spoken]
        return found[0] if len(found) == 1 else None


@dataclass(frozen=True, kw_only=True)
class SingleScore:
    """A number from `low` to `high` that fills the last line which is not blank, after `label` or without it."""

    __pydantic_config__ = FORBID

    label: str = "Score:"
    low: float = 1.0
    high: float = 10.0

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)

    @property
    def wanted(self) -> str:
        """What is read, in words."""
        return f"a last line such as '{self.label} {self.high:g}' (from {self.low:g} to {self.high:g})"

    def __call__(self, reply: str) -> float | None:
        """The score (None: no such line). "Score: 7/10" is read where 10 is the highest score."""
        pattern = rf"(?:{re.escape(self.label)})?\s*({_NUMBER})(?:\s*/\s*{re.escape(f'{self.high:g}')})?"
        found = re.fullmatch(pattern, _line(reply, -1), flags=re.IGNORECASE)
        if found is None or not self.low <= float(found[1]) <= self.high:
            return None
        return float(found[1])


Parser: TypeAlias = TwoScores | VerdictTag | SingleScore

PARSERS: dict[str, Callable[..., Parser]] = {"two-scores": TwoScores, "verdict": VerdictTag, "score": SingleScore}
"""The kinds that a protocol file may name."""


def _check_range(low: float, high: float) -> None:
    if not 0 <= low < high:
        raise ConfigError(f"the parser's scores go from {low} to {high}; low must be at least 0 and below high")


def _spoken(reply: str) -> str:
    """Nothing where it ends within a thought: what is weighed there is no verdict."""
    return reply.rpartition("</think>")[2].partition("<think>")[0]


def _line(reply: str, which: int) -> str:
    """The first (0) or last (-1) line that is not blank, without emphasis."""
    lines = [text for line in _spoken(reply).split("\n") if (text := re.sub(r"[*_`]", "", line).strip())]
    return lines[which] if lines else ""
