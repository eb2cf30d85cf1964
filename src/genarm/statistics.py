"""Intervals for the figures the project prints, all of 95%.

No interval is a point: rows that are all alike do not say how far others would be from them, so that their figure has
an interval only where there are bounds to what can be, and else none (NaN).

Shapes: N rows that were drawn independently (prompts, mostly), K columns, S bootstrap resamples, F figures.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:  # numpy and scipy take a while to import
    from numpy.typing import ArrayLike, NDArray

RESAMPLES = 4000
"""Of every bootstrap."""

_Z = 1.959964
_ALIKE = 1e-12
"""By how much of its size a figure moves in rounding, at most."""
_CELLS = 4_000_000
"""How many counts of rows are held at once: 32 MB."""

Outcome: TypeAlias = Literal["win", "tie", "lose"]

_POINTS = {"win": 1.0, "tie": 0.5, "lose": 0.0}


@dataclass(frozen=True, kw_only=True)
class Proportion:
    """`count` successes of `n` with a 95% Wilson interval [`low`, `high`]; all NaN where n is 0."""

    count: int
    n: int
    rate: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.n == 0:
            return "– (n=0)"
        return f"{self.rate:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.n})"


def proportion(count: int, n: int) -> Proportion:
    """The rate count / n with its 95% Wilson score interval (scipy's)."""
    if n == 0:
        nan = float("nan")
        return Proportion(count=count, n=n, rate=nan, low=nan, high=nan)
    from scipy.stats import binomtest  # scipy takes half a second to import

    interval = binomtest(count, n).proportion_ci(confidence_level=0.95, method="wilson")
    return Proportion(count=count, n=n, rate=count / n, low=float(interval.low), high=float(interval.high))


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over `n` independent values with a 95% Student interval [`low`, `high`]; NaN where all are alike."""

    value: float
    n: int
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.value:.2f} (n={self.n}, all alike)"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}] (n={self.n})"


def mean(values: Sequence[float]) -> Mean:
    """The mean of `values` (at least two) with its 95% Student-t interval."""
    if len(values) < 2:
        raise ValueError(f"a mean with an interval needs at least 2 values, got {len(values)}")
    import numpy as np
    from scipy.stats import t

    array = np.asarray(values, dtype=np.float64)
    half = float(t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))
    value = float(array.mean())
    if half <= _ALIKE * abs(value):
        half = math.nan
    return Mean(value=value, n=len(array), low=value - half, high=value + half)


def finite(value: Any) -> Any:
    """`value`, and what is in it, with None for what is no finite number, for which JSON has no word."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- bootstrap over rows --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure made from `n` rows with its 95% interval; NaN where it is undefined.

    A figure that no resample changes has no interval either: of one row, of rows that are all alike.
    """

    value: float
    low: float
    high: float
    n: int


def bootstrap(
    statistic: Callable[[NDArray[Any]], NDArray[Any]], rows_NK: ArrayLike, *, seed: int = 0
) -> tuple[Estimate, ...]:
    """Figures that are made of the means of columns, with intervals over resampled rows.

    What is measured on one row stays together, so that differences are paired: a row without a value in any column is
    left out of all of them, or two columns would be means over rows of which one is harder. The same `seed` and N
    give the same resamples, whatever the columns. The percentiles are those of an expanded interval, as resamples of
    few rows vary too little (`tail`); of fewer than ten they still do.

    Args:
        statistic: makes F figures of each row of column means, (S, K) → (S, F).
        rows_NK: a value of each column for each row; NaN where there is none.
        seed: of the resampling.

    Returns:
        F estimates; their `n` is the number of rows that have every value. Resamples in which a figure is undefined, a
        quotient by 0, say, are left out of its interval.
    """
    import numpy as np

    rows = complete(rows_NK)
    n = len(rows)

    def figures(counts_SN: NDArray[Any]) -> NDArray[Any]:
        with np.errstate(invalid="ignore", divide="ignore"):
            return statistic((counts_SN @ rows) / counts_SN.sum(axis=1, keepdims=True))

    values_F = figures(np.ones((1, n)))[0]
    drawn_SF = np.concatenate([figures(counts_SN) for counts_SN in _resampled(n, seed)]) if n else values_F[None]
    size = float(np.abs(rows).max(initial=0.0))
    return tuple(
        Estimate(value=float(value), low=low, high=high, n=n)
        for value, (low, high) in zip(values_F, (_percentiles(drawn_S, size, n) for drawn_S in drawn_SF.T), strict=True)
    )


def complete(rows_NK: ArrayLike) -> NDArray[Any]:
    """The rows that have a value in every column."""
    import numpy as np

    rows = np.asarray(rows_NK, dtype=np.float64)
    found: NDArray[Any] = rows[~np.isnan(rows).any(axis=1)]
    return found


@lru_cache(maxsize=64)
def tail(n: int) -> float:
    """What an expanded 95% percentile interval of `n` rows leaves out on each side (Hesterberg, Am. Stat. 69, 2015).

    It is as much wider than the plain one as Student's is than the normal one whose variance is divided by n.
    """
    from scipy.stats import norm, t  # scipy takes half a second to import

    n = max(n, 2)
    return float(norm.cdf(math.sqrt(n / (n - 1)) * t.ppf(0.025, n - 1)))


def mean_difference(
    first: Sequence[float], second: Sequence[float], *, within: tuple[float, float] | None = None
) -> Estimate:
    """How much the mean of `first` is above that of `second`, row by row, with Student's interval.

    Rows with a NaN on a side are left out. Where all differ by as much, others may differ by anything `within` bounds,
    as those of verdicts are; where there are no bounds there is no interval, however far apart the values are that
    were seen.
    """
    import numpy as np

    known = complete(np.subtract(first, second)[:, None])[:, 0].tolist()
    n, lowest, highest = len(known), *(within or (-math.inf, math.inf))
    if within is not None and n > 1 and max(known) - min(known) <= _ALIKE * max(map(abs, within)):
        value, low, high = _unanimous(known[0], n, within)
        return Estimate(value=value, low=low, high=high, n=n)
    if n < 2:
        return Estimate(value=known[0] if known else math.nan, low=math.nan, high=math.nan, n=n)
    found = mean(known)
    size = float(np.nanmax(np.abs([first, second])))
    if max(known) - min(known) <= _ALIKE * size:  # their own rounding is that of what they are differences of
        found = replace(found, low=math.nan, high=math.nan)
    return Estimate(value=found.value, low=max(found.low, lowest), high=min(found.high, highest), n=n)


def _resampled(n: int, seed: int) -> Iterable[NDArray[Any]]:
    """How often each of `n` rows is in each resample: some resamples after the others, (S, N) all together."""
    return _few(n, seed) if n * RESAMPLES <= _CELLS else _drawn(n, seed)


@lru_cache(maxsize=4)
def _few(n: int, seed: int) -> tuple[NDArray[Any], ...]:
    """All of them, which are asked for many times."""
    return tuple(_drawn(n, seed))


def _drawn(n: int, seed: int) -> Iterator[NDArray[Any]]:
    """As many at once as `_CELLS` allows: of many rows, all would take gigabytes."""
    import numpy as np

    generator, chances = np.random.default_rng(seed), np.full(n, 1 / n)
    size = max(1, _CELLS // n)
    for start in range(0, RESAMPLES, size):
        drawn = generator.multinomial(n, chances, size=min(size, RESAMPLES - start))
        yield drawn.astype(np.float64)


def _percentiles(drawn_S: NDArray[Any], size: float, n: int) -> tuple[float, float]:
    """Of resamples of `n` values up to `size`; NaN where they are all the same."""
    import numpy as np

    defined = drawn_S[np.isfinite(drawn_S)]
    if not len(defined) or np.ptp(defined) <= _ALIKE * max(size, np.abs(defined).max()):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, (tail(n), 1 - tail(n)))
    return float(low), float(high)


# --- comparisons prompt by prompt -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """Verdicts on a first side against a second.

    Attributes:
        win, tie, lose: how many.
        unparsed: verdicts that could not be read: counted, and part of no rate.
        rate: (win + ½ tie) / n; NaN where n is 0.
        low, high: its 95% score interval: half of Tango's for the share of wins less that of losses, and without ties
            Wilson's.
    """

    win: int
    tie: int
    lose: int
    unparsed: int
    rate: float
    low: float
    high: float

    @property
    def n(self) -> int:
        """Verdicts that could be read."""
        return self.win + self.tie + self.lose

    def __str__(self) -> str:
        if self.n == 0:
            return f"– (n=0, {self.unparsed} unparsed)"
        unparsed = f", {self.unparsed} unparsed" if self.unparsed else ""
        return f"{self.rate:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.n}{unparsed})"


def points(outcomes: Sequence[Outcome | None]) -> tuple[float, ...]:
    """1 for a win, ½ for a tie, 0 for a loss, NaN for a verdict that could not be read."""
    return tuple(float("nan") if outcome is None else _POINTS[outcome] for outcome in outcomes)


def win_rate(outcomes: Sequence[Outcome | None]) -> WinRate:
    """The share of wins, a tie counting half, among the verdicts that could be read (those not None)."""
    counts = Counter(outcomes)
    win, tie, lose = counts["win"], counts["tie"], counts["lose"]
    n = win + tie + lose
    rate, low, high = (float("nan"),) * 3
    if n in (win, tie, lose) and n:
        rate, low, high = _unanimous((win + tie / 2) / n, n, (0.0, 1.0))
    elif n:
        less, more = tango(win, lose, n)
        rate, low, high = (win + tie / 2) / n, (1 + less) / 2, (1 + more) / 2
    return WinRate(
        win=win,
        tie=tie,
        lose=lose,
        unparsed=counts[None],
        rate=rate,
        low=low,
        high=high,
    )


def _unanimous(value: float, n: int, within: tuple[float, float]) -> tuple[float, float, float]:
    """Where all are one, resampling varies nothing: what `n` would miss by more than 2.5% may be anything `within`."""
    unsure = 1 - 0.025 ** (1 / n)
    return value, value - unsure * (value - within[0]), value + unsure * (within[1] - value)


def tango(first: int, second: int, n: int) -> tuple[float, float]:
    """The 95% interval of a difference of paired proportions.

    Of n pairs, `first` speak for one side alone, and `second` for the other. It is Tango's score interval (Statistics
    in Medicine 17, 1998), which is no point where the sides agree everywhere.
    """
    return -_limit(second, first, n), _limit(first, second, n)


def _limit(more: int, less: int, n: int) -> float:
    """The largest difference that Tango's score test does not refuse, `more` pairs speaking for it and `less` against.

    The pairs that one side alone has have the probabilities p and p + difference; p is the likeliest under it.
    """
    inside, outside = (more - less) / n, 1.0
    for _ in range(60):
        tried = (inside + outside) / 2
        linear = (2 * n - more + less) * tried - more - less
        p = (math.sqrt(linear**2 + 8 * n * less * tried * (1 - tried)) - linear) / (4 * n)
        accepted = (more - less - n * tried) ** 2 <= _Z**2 * n * (2 * p + tried * (1 - tried))
        inside, outside = (tried, outside) if accepted else (inside, tried)
    return inside
