"""Which of the scored responses to one prompt become pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal, get_args

from genarm.errors import ConfigError

Which = Literal["extremes", "all"]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Best against worst ("extremes") or every two responses ("all"), more than `margin` apart."""

    which: Which = field(
        default="extremes",
        metadata={
            "option": "--select",
            "help": "the best response against the worst, or every two that are far enough apart",
        },
    )
    margin: float = field(
        default=0.0, metadata={"metavar": "M", "help": "a pair's scores must be more than this apart"}
    )

    def __post_init__(self) -> None:
        if self.which not in get_args(Which):
            raise ConfigError(f"--select is {self.which!r}; it must be one of {', '.join(get_args(Which))}")
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise ConfigError(f"--margin is {self.margin:g}; it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A response with its score (None: it has none), how it was drawn, and whether the length limit cut it."""

    response: str
    score: float | None
    seed: int
    cut: bool


@dataclass(frozen=True, kw_only=True)
class Selected:
    """The pairs of one prompt, better response first, and what was dropped.

    Attributes:
        ties: candidate pairs whose scores are not more than the margin apart.
        empty: responses without a word, from which nothing could be learnt.
        identical: responses that repeat an earlier one.
        unscored: different responses without a score.
        lone: whether fewer than two different scored responses were left.
    """

    pairs: tuple[tuple[Scored, Scored], ...]
    ties: int
    empty: int
    identical: int
    unscored: int
    lone: bool


def select(responses: Sequence[Scored], selection: Selection) -> Selected:
    """The pairs that `responses` to one prompt give; of equal scores, the response that was drawn first counts."""
    spoken = [scored for scored in responses if scored.response.strip()]
    different: dict[str, Scored] = {}
    for scored in spoken:
        different.setdefault(scored.response, scored)
    known = [(scored.score, scored) for scored in different.values() if scored.score is not None]
    ranked = sorted(known, key=lambda pair: -pair[0])  # stable
    worst_first = sorted(known, key=lambda pair: pair[0])
    if selection.which == "all":
        candidates = list(combinations(ranked, 2))
    else:
        candidates = [(ranked[0], worst_first[0])] if len(ranked) > 1 else []
    apart = [(better, worse) for (high, better), (low, worse) in candidates if high - low > selection.margin]
    return Selected(
        pairs=tuple(apart),
        ties=len(candidates) - len(apart),
        empty=len(responses) - len(spoken),
        identical=len(spoken) - len(different),
        unscored=len(different) - len(known),
        lone=len(known) < 2,
    )
