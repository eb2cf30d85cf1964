"""The figures of a reward, from the scores of its pairs alone.

A pair counts as right when its chosen response scores higher. A tie is a tie: never right, and counted beside.
Intervals are at 95% and take pairs as independent. Shapes: B pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from genarm.statistics import Proportion, proportion, tango

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


CHOSEN_LONGER, REJECTED_LONGER, SAME_LENGTH = "chosen longer", "rejected longer", "same length"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores and lengths in tokens of B pairs: `rows` are their numbers in the data."""

    rows: Ints
    chosen_B: Floats
    rejected_B: Floats
    chosen_length_B: Ints
    rejected_length_B: Ints

    @property
    def margin_B(self) -> Floats:
        """r(x, y⁺) − r(x, y⁻)."""
        return self.chosen_B - self.rejected_B

    @property
    def longer_B(self) -> Ints:
        """Tokens that the chosen response has more than the rejected one."""
        return self.chosen_length_B - self.rejected_length_B

    def per_token(self) -> Scores:
        """The same pairs with every score divided by the length of its response."""
        return replace(
            self,
            chosen_B=self.chosen_B / self.chosen_length_B,
            rejected_B=self.rejected_B / self.rejected_length_B,
        )

    def minus(self, other: Scores) -> Scores:
        """The same pairs scored by the difference from `other`, which has them too."""
        assert np.array_equal(self.rows, other.rows)
        return replace(self, chosen_B=self.chosen_B - other.chosen_B, rejected_B=self.rejected_B - other.rejected_B)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure with its 95% interval [`low`, `high`]."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How many of n pairs are right, with a Wilson interval, and how many tie."""

    right: Proportion
    ties: int


@dataclass(frozen=True, kw_only=True)
class Figures:
    """All figures of one reward.

    Attributes:
        overall: over all pairs (the micro average).
        categories: over the pairs of each category; `macro` is the mean of their accuracies.
        lengths: over the pairs whose chosen response is the longer, the shorter, or as long.
        balanced: the mean of the first two of `lengths`: the accuracy if length said nothing about the choice.
            None where one of them has no pairs.
        length_correlation: Pearson's, of the margin with the difference of the lengths. None where one of them is
            constant or there are too few pairs.
        margin: its mean.
    """

    overall: Accuracy
    categories: Mapping[str, Accuracy]
    macro: Interval | None
    lengths: Mapping[str, Accuracy]
    balanced: Interval | None
    length_correlation: Interval | None
    margin: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Accuracy of `second` minus that of `first` on the n pairs that both scored.

    `only_first` and `only_second` count pairs that one of them alone has right; `p_value` is McNemar's, exact.
    """

    first: str
    second: str
    n: int
    only_first: int
    only_second: int
    accuracy: Interval
    p_value: float


def figures(scores: Scores, categories: Sequence[str] | None) -> Figures:
    """The figures of `scores`; `categories` has that of every row of the data."""
    margin_B, longer_B = scores.margin_B, scores.longer_B
    groups = {CHOSEN_LONGER: longer_B > 0, REJECTED_LONGER: longer_B < 0, SAME_LENGTH: longer_B == 0}
    lengths = {name: _accuracy(margin_B[group_B]) for name, group_B in groups.items()}
    halves = [lengths[CHOSEN_LONGER].right, lengths[REJECTED_LONGER].right]
    by_category = {} if categories is None else _by_category(scores, categories)
    return Figures(
        overall=_accuracy(margin_B),
        categories=by_category,
        macro=mean_of([accuracy.right for accuracy in by_category.values()]) if by_category else None,
        lengths=lengths,
        balanced=mean_of(halves) if all(half.n for half in halves) else None,
        length_correlation=correlation(margin_B, longer_B.astype(np.float64)),
        margin=float(margin_B.mean()),
    )


def mean_of(parts: Sequence[Proportion]) -> Interval:
    """The mean of independent proportions, its interval from theirs.

    Squared distances from each rate to its own limit add up as variances do (Zou and Donner, Statistics in Medicine
    27, 2008); with a single part the result is that part's interval.
    """
    rate = sum(part.rate for part in parts) / len(parts)
    below = math.hypot(*(part.rate - part.low for part in parts)) / len(parts)
    above = math.hypot(*(part.high - part.rate for part in parts)) / len(parts)
    return Interval(value=rate, low=rate - below, high=rate + above)


def correlation(first_B: Floats, second_B: Floats) -> Interval | None:
    """Pearson's correlation with Fisher's interval; None for fewer than four pairs, or where one side is constant."""
    if len(first_B) < 4 or np.ptp(first_B) == 0 or np.ptp(second_B) == 0:
        return None
    from scipy.stats import pearsonr

    found = pearsonr(first_B, second_B)
    interval = found.confidence_interval(confidence_level=0.95)
    return Interval(value=float(found.statistic), low=float(interval.low), high=float(interval.high))


def difference(first: tuple[str, Scores], second: tuple[str, Scores]) -> Difference | None:
    """How two rewards, each with its name, differ on the pairs that both scored; None where there are none.

    The interval is Tango's: no narrower for rewards that agree everywhere than the number of pairs allows.
    """
    common = np.intersect1d(first[1].rows, second[1].rows)
    if not len(common):
        return None
    right_1_B, right_2_B = (scores.margin_B[np.isin(scores.rows, common)] > 0 for _, scores in (first, second))
    from scipy.stats import binomtest

    only_1, only_2 = int((right_1_B & ~right_2_B).sum()), int((right_2_B & ~right_1_B).sum())
    discordant = only_1 + only_2
    low, high = tango(only_2, only_1, len(common))
    return Difference(
        first=first[0],
        second=second[0],
        n=len(common),
        only_first=only_1,
        only_second=only_2,
        accuracy=Interval(value=(only_2 - only_1) / len(common), low=low, high=high),
        p_value=float(binomtest(only_1, discordant).pvalue) if discordant else 1.0,
    )


def _accuracy(margin_B: Floats) -> Accuracy:
    right = proportion(int((margin_B > 0).sum()), len(margin_B))
    return Accuracy(right=right, ties=int((margin_B == 0).sum()))


def _by_category(scores: Scores, categories: Sequence[str]) -> dict[str, Accuracy]:
    own_B = np.asarray([categories[row] for row in scores.rows])
    return {str(name): _accuracy(scores.margin_B[own_B == name]) for name in np.unique(own_B)}
