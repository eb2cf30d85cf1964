"""Weights from preference pairs: Bradley–Terry in the weights, which is a logistic regression on margins.

A reward's margin on a pair is m_i = r_i(x, y⁺) − r_i(x, y⁻), in nats. The chosen response is preferred with probability
σ(Σ_i a_i m_i), so that a_i m_i is in log-odds. The guided model that is best for such preferences at a price of β for
each nat of KL from the base, max E[Σ a_i r_i] − β KL(π ‖ π_base), is π_base · exp(Σ (a_i / β) r_i): the weight of a
reward is w_i = a_i / β. In other words, of all guided models of a folder the fitted one is that which DPO with this β
would choose: its implicit reward, β log π_guided / π_base, is Σ β w_i r_i, but for what normalising each token takes.
An ARM that says of new pairs what it said of those that it was trained on, with β_r, has a = β_r, and w = 1 at β = β_r.

The prior of a reward is a_i s_i ~ N(0, 2²), where s_i is the root mean square of its margins: before any pair is seen,
a typical margin is worth between −4 and 4 in log-odds, and 20 pairs of which a reward has 20 right make it 3.2, odds of
24 to 1 (Laplace's rule of succession says 21 to 1). It keeps the weights of few pairs, which some weights always part
without a mistake, from being infinite.

Intervals are percentiles of fits to resampled prompts, each with a prior centre drawn from the prior (as in the
weighted Bayesian bootstrap of Newton, Polson and Xu, 2021): what the pairs do not decide is as wide as the prior. The
percentiles are those of an expanded interval (Hesterberg, The American Statistician 69, 2015), as resamples of few vary
too little.

Shapes: N pairs, K rewards, S resamples, G prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from genarm.errors import DataError
from genarm.statistics import Proportion, proportion, tail

Floats: TypeAlias = NDArray[np.float64]

PRIOR = 2.0
"""Standard deviation of the log-odds that a typical margin is worth."""
RESAMPLES = 1000
FOLDS = 10
_CELLS = 4_000_000
"""How many margins are held at once, over all resamples."""


@dataclass(frozen=True, kw_only=True)
class Coefficient:
    """What one nat of a reward's margin is worth in log-odds, with a 95% interval; `scale` is s, in nats."""

    value: float
    low: float
    high: float
    scale: float


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A regression on N pairs of G prompts.

    Attributes:
        coefficients: a of each reward.
        pairs, prompts: N and G.
        fitted: how many pairs the fit has right.
        held_out: how many are right by fits to the other prompts; None for one prompt.
    """

    coefficients: tuple[Coefficient, ...]
    pairs: int
    prompts: int
    fitted: Proportion
    held_out: Proportion | None


def fit_pairs(margins_NK: Floats, prompts: Sequence[Any], names: Sequence[str], *, seed: int = 0) -> Fit:
    """The regression on `margins_NK` with everything that says how sure it is.

    Args:
        margins_NK: of each pair and reward.
        prompts: of each pair, what its prompt is known by; pairs of one prompt stay together.
        names: of the rewards, for messages.
        seed: of the resampling.

    Raises:
        DataError: a reward has the same score for both responses of every pair.
    """
    scale_K = np.sqrt((margins_NK**2).mean(axis=0))
    if (silent := np.flatnonzero(scale_K == 0)).size:
        raise DataError(
            f"the reward {names[silent[0]]!r} scores both responses of every pair alike, so pairs cannot say what it "
            "is worth; take it out of the folder, or look at it with genarm score"
        )
    units_NK = margins_NK / scale_K
    keys = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    group_N = np.array([keys[prompt] for prompt in prompts])
    generator = np.random.default_rng(seed)
    whole_1K = maximise(units_NK, np.ones((1, len(units_NK))), np.zeros((1, units_NK.shape[1])))
    drawn_SK = np.concatenate([*_resampled(units_NK, group_N, whole_1K, generator)])
    low_K, high_K = np.quantile(drawn_SK, (tail(len(keys)), 1 - tail(len(keys))), axis=0)
    coefficients = (
        Coefficient(value=float(value / scale), low=float(low / scale), high=float(high / scale), scale=float(scale))
        for value, low, high, scale in zip(whole_1K[0], low_K, high_K, scale_K, strict=True)
    )
    return Fit(
        coefficients=tuple(coefficients),
        pairs=len(units_NK),
        prompts=len(keys),
        fitted=proportion(int((units_NK @ whole_1K[0] > 0).sum()), len(units_NK)),
        held_out=_held_out(units_NK, group_N, len(keys), generator) if len(keys) > 1 else None,
    )


def maximise(units_NK: Floats, counts_SN: Floats, centres_SK: Floats, start_1K: Floats | None = None) -> Floats:
    """The coefficients [S, K] that are likeliest, each by Newton's method from a start, or from 0.

    −Σ_n count_n log σ(a·m_n) + |a − centre|² / (2 · PRIOR²) is convex, its second derivative at least 1 / PRIOR²; steps
    that overshoot are halved.

    Args:
        units_NK: margins in units of their scale.
        counts_SN: how often each pair counts.
        centres_SK: of the prior.
        start_1K: where all of them begin.
    """
    precision = PRIOR**-2

    def loss(a_SK: Floats) -> Floats:
        log_odds_SN = a_SK @ units_NK.T
        distance_S: Floats = ((a_SK - centres_SK) ** 2).sum(axis=1) * precision / 2
        return (counts_SN * np.logaddexp(0.0, -log_odds_SN)).sum(axis=1) + distance_S

    a_SK = np.zeros_like(centres_SK) if start_1K is None else np.tile(start_1K, (len(centres_SK), 1))
    before_S = loss(a_SK)
    for _ in range(100):
        wrong_SN = 1 / (1 + np.exp(np.clip(a_SK @ units_NK.T, -500, 500)))
        slope_SK = (a_SK - centres_SK) * precision - (counts_SN * wrong_SN) @ units_NK
        bend_SN = counts_SN * wrong_SN * (1 - wrong_SN)
        bend_SKK = np.einsum("sn,nk,nl->skl", bend_SN, units_NK, units_NK, optimize=True)
        bend_SKK += precision * np.eye(units_NK.shape[1])
        step_SK = np.linalg.solve(bend_SKK, slope_SK[..., None])[..., 0]
        size_S1 = np.ones((len(a_SK), 1))
        for _ in range(40):
            after_S = loss(a_SK - size_S1 * step_SK)
            worse_S = after_S > before_S + 1e-12 * np.abs(before_S)
            if not worse_S.any():
                break
            size_S1[worse_S] /= 2
        a_SK, before_S = a_SK - size_S1 * step_SK, after_S
        if np.abs(step_SK).max() < 1e-10:
            break
    return a_SK


def _resampled(
    units_NK: Floats, group_N: NDArray[Any], start_1K: Floats, generator: np.random.Generator
) -> Iterator[Floats]:
    """Fits to resampled prompts under drawn centres, some after the others."""
    groups = int(group_N.max()) + 1
    size = max(1, _CELLS // len(units_NK))
    for start in range(0, RESAMPLES, size):
        count = min(size, RESAMPLES - start)
        counts_SG = generator.multinomial(groups, np.full(groups, 1 / groups), size=count).astype(np.float64)
        centres_SK = generator.normal(scale=PRIOR, size=(count, units_NK.shape[1]))
        yield maximise(units_NK, counts_SG[:, group_N], centres_SK, start_1K)


def _held_out(units_NK: Floats, group_N: NDArray[Any], groups: int, generator: np.random.Generator) -> Proportion:
    """How many pairs are right by the fit to the prompts of the other folds."""
    fold_N = generator.permutation(groups)[group_N] % min(FOLDS, groups)
    folds = np.unique(fold_N)
    counts_SN = (fold_N[None, :] != folds[:, None]).astype(np.float64)
    fits_SK = maximise(units_NK, counts_SN, np.zeros((len(folds), units_NK.shape[1])))
    log_odds_N = (units_NK * fits_SK[np.searchsorted(folds, fold_N)]).sum(axis=1)
    return proportion(int((log_odds_N > 0).sum()), len(units_NK))
