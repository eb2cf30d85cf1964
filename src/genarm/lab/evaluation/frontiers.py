"""Quality at equal distance from the base: what a judge's score is over the KL divergence, family by family.

A family is one knob turned: a weight, β, a temperature, N. Its line begins at the base and joins its points in the
order of their mean KL. What lies between two points can be had: a policy that answers some prompts as the one and the
others as the other has the mean of their scores, and no more than the mean of their divergences.

Families are compared where both of their lines reach, each resample of the prompts with its own scores, divergences,
order of points and reach. A divergence of which only a bound is known stands at the bound, and so too far.

Shapes: N prompts, S resamples, P points of a line, Q distances, K columns: the divergences of P points, then their
scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from genarm.lab.evaluation.results import Measured, Results
from genarm.statistics import Estimate, bootstrap, complete

DISTANCES = 3
"""At how many distances a difference is told beside its mean."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A family that has a line: its methods by their mean KL, the base among them, and whether any KL is a bound."""

    family: str
    points: tuple[str, ...]
    bounded: bool


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """By how much the score of `first` is above that of `second` at equal KL.

    Attributes:
        first, second: families.
        low, high: from which KL to which both reach, in nats per reply.
        mean: of the difference over that range.
        at: the difference at some distances in it.
        bounded: those of the two whose KL is an upper bound, so that they stand too far from the base.
    """

    first: str
    second: str
    low: float
    high: float
    mean: Estimate
    at: Mapping[float, Estimate]
    bounded: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """All families by one judge; `absent` says of what has no line why, {method or family: reason}."""

    judge: str
    lines: tuple[Line, ...]
    absent: Mapping[str, str]
    leads: tuple[Ahead, ...]


def make_frontier(results: Results, judge: str) -> Frontier:
    """The lines of all families by a judge that scores single replies, and how those of several methods compare."""
    base = results.measured[0]
    lines = {family: line for family in _families(results) if (line := line_of(results, judge, family)) is not None}
    several = [family for family, line in lines.items() if len(line.methods) > 2]
    pairs = [ahead(results, judge, first, second) for first, second in combinations(several, 2)]
    return Frontier(
        judge=judge,
        lines=tuple(Line(family=f, points=line.order, bounded=line.bounded) for f, line in lines.items()),
        absent={} if base.distances is None else _absent(results, lines),
        leads=tuple(pair for pair in pairs if pair is not None),
    )


def ahead(results: Results, judge: str, first: str, second: str) -> Ahead | None:
    """How two families compare at equal KL; None where one of them has no line, or nothing is reached by both."""
    mine, theirs = (line_of(results, judge, family) for family in (first, second))
    if mine is None or theirs is None:
        return None
    width = mine.rows_NK.shape[1]
    rows_NK = complete(np.hstack([mine.rows_NK, theirs.rows_NK]))
    if not len(rows_NK):
        return None
    now_1K = rows_NK.mean(axis=0, keepdims=True)
    low, high = _common(Curve.of(now_1K[:, :width]), Curve.of(now_1K[:, width:]))
    if not max(low[0], 0.0) < high[0]:
        return None
    distances = _round_distances(float(low[0]), float(high[0]))

    def differences(means_SK: NDArray[Any]) -> NDArray[Any]:
        one, other = Curve.of(means_SK[:, :width]), Curve.of(means_SK[:, width:])
        at_SQ = np.broadcast_to(np.array(distances), (len(means_SK), len(distances)))
        return np.hstack([_mean_difference(one, other)[:, None], one.read(at_SQ) - other.read(at_SQ)])

    mean, *at = bootstrap(differences, rows_NK)
    return Ahead(
        first=first,
        second=second,
        low=float(low[0]),
        high=float(high[0]),
        mean=mean,
        at=dict(zip(distances, at, strict=True)),
        bounded=tuple(name for name, line in ((first, mine), (second, theirs)) if line.bounded),
    )


# --- lines ----------------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """Lines of score over KL, one for each resample: P points sorted by KL, and of equal ones by score."""

    kl_SP: NDArray[Any]
    score_SP: NDArray[Any]

    @classmethod
    def of(cls, means_SK: NDArray[Any]) -> Curve:
        """From means of columns."""
        kl_SP, score_SP = np.hsplit(means_SK, 2)
        order_SP = np.lexsort((score_SP, kl_SP), axis=-1)
        return cls(*(np.take_along_axis(values, order_SP, axis=1) for values in (kl_SP, score_SP)))

    @property
    def reach(self) -> NDArray[Any]:
        """[S], the largest KL."""
        reach_S: NDArray[Any] = self.kl_SP[:, -1]
        return reach_S

    def read(self, at_SQ: NDArray[Any]) -> NDArray[Any]:
        """The score at each KL [S, Q]; that of the nearest end beyond the ends."""
        right_SQ = (self.kl_SP[:, None, :] <= at_SQ[:, :, None]).sum(-1).clip(1, self.kl_SP.shape[1] - 1)
        x0, x1 = (np.take_along_axis(self.kl_SP, index_SQ, axis=1) for index_SQ in (right_SQ - 1, right_SQ))
        y0, y1 = (np.take_along_axis(self.score_SP, index_SQ, axis=1) for index_SQ in (right_SQ - 1, right_SQ))
        width_SQ = np.where(x1 > x0, x1 - x0, 1.0)
        share_SQ = np.where(x1 > x0, ((at_SQ - x0) / width_SQ).clip(0, 1), 1.0)
        found_SQ: NDArray[Any] = y0 + share_SQ * (y1 - y0)
        return found_SQ


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What is known of a family's line, prompt by prompt: its methods, the base first."""

    methods: tuple[Measured, ...]
    rows_NK: NDArray[Any]

    @property
    def now(self) -> Curve:
        """The line as measured (S = 1)."""
        return Curve.of(self.rows_NK.mean(axis=0, keepdims=True))

    @property
    def bounded(self) -> bool:
        """Whether the KL of any method is a bound."""
        return any(method.kl is None for method in self.methods)

    @property
    def order(self) -> tuple[str, ...]:
        """The methods by their KL."""
        kls = self.rows_NK.mean(axis=0)[: len(self.methods)].tolist()
        return tuple(method.name for _, method in sorted(zip(kls, self.methods, strict=True), key=lambda pair: pair[0]))


def line_of(results: Results, judge: str, family: str) -> Measurements | None:
    """The line of a family by a judge; None where it has none (`Frontier.absent` says why)."""
    methods = _placed(results, family)
    return None if len(methods) < 2 or not _is_one_knob(methods) else measurements(methods, judge)


def measurements(methods: Sequence[Measured], judge: str) -> Measurements | None:
    """Of methods with a place; None where the judge gives no scores."""
    if any(judge not in method.scores for method in methods):
        return None
    columns = [*(method.distances or () for method in methods), *(method.scores[judge] for method in methods)]
    return Measurements(methods=tuple(methods), rows_NK=np.array(columns, dtype=np.float64).T)


def _families(results: Results) -> list[str]:
    return list(dict.fromkeys(row.family for row in results.measured))


def _placed(results: Results, family: str) -> list[Measured]:
    """The base, and the methods of the family whose distance is known; nothing where that of the base is not."""
    base, *others = results.measured
    if base.distances is None:
        return []
    return [base, *(row for row in others if row.family == family and row.distances is not None)]


def _is_one_knob(methods: Sequence[Measured]) -> bool:
    """Whether the weights of all methods are multiples of one another."""
    mixes = set()
    for method in methods[1:]:
        size = math.hypot(*method.weights.values())
        mixes |= {tuple(sorted((n, round(w / size, 6)) for n, w in method.weights.items() if w))} if size else set()
    return len(mixes) < 2


def _absent(results: Results, lines: Mapping[str, Measurements]) -> dict[str, str]:
    found = {
        row.name: "steers another base" if row.steers_another else "its KL is not known"
        for row in results.measured
        if row.distances is None
    }
    mixed = [f for f in _families(results) if f not in lines and len(_placed(results, f)) > 1]
    return found | dict.fromkeys(mixed, "its methods differ in the mix of their weights (see the fronts)")


# --- differences ----------------------------------------------------------------------------------------------


def _common(one: Curve, other: Curve) -> tuple[NDArray[Any], NDArray[Any]]:
    """From which KL [S] to which both reach."""
    return np.maximum(one.kl_SP[:, 0], other.kl_SP[:, 0]), np.minimum(one.reach, other.reach)


def _mean_difference(one: Curve, other: Curve) -> NDArray[Any]:
    """Of the scores over the range that both reach [S], exactly; NaN where there is none."""
    low_S, high_S = _common(one, other)
    knots_SQ = np.hstack([one.kl_SP, other.kl_SP]).clip(low_S[:, None], np.maximum(low_S, high_S)[:, None])
    knots_SQ.sort(axis=1)
    between_SQ = one.read(knots_SQ) - other.read(knots_SQ)
    area_S = ((between_SQ[:, 1:] + between_SQ[:, :-1]) / 2 * np.diff(knots_SQ, axis=1)).sum(axis=1)
    mean_S: NDArray[Any] = np.where(high_S > low_S, area_S / (high_S - low_S), np.nan)
    return mean_S


def _round_distances(low: float, high: float) -> list[float]:
    """The last few of …, 0.1, 0.2, 0.5, 1, 2, 5, … in a range."""
    power = math.floor(math.log10(high))
    series = [float(f"{digit}e{power + shift}") for shift in (-1, 0) for digit in (1, 2, 5)]
    return [distance for distance in series if low < distance <= high][-DISTANCES:]
