"""Intervals for the figures the project prints."""

from __future__ import annotations

from dataclasses import dataclass


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
    """A mean over `n` independent values with a 95% Student interval [`low`, `high`]."""

    value: float
    n: int
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}] (n={self.n})"


def mean(values: list[float]) -> Mean:
    """The mean of `values` (at least two) with its 95% Student-t interval."""
    if len(values) < 2:
        raise ValueError(f"a mean with an interval needs at least 2 values, got {len(values)}")
    import numpy as np
    from scipy.stats import t

    array = np.asarray(values, dtype=np.float64)
    half = float(t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))
    value = float(array.mean())
    return Mean(value=value, n=len(array), low=value - half, high=value + half)
