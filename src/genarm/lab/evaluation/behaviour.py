"""What rewards know, and what they do: their accuracy on held-out pairs beside what they make of the base.

Rewards guide at different strengths, so what each adds to the base's score is read off its line at one KL: the largest
that all of them reach (`genarm.lab.evaluation.frontiers`).

Shapes: S resamples, R rewards, K columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genarm.lab.evaluation.frontiers import Curve, Measurements, measurements
from genarm.lab.evaluation.results import Results, Trained
from genarm.statistics import Estimate, Proportion, bootstrap
from genarm.training.report import accuracies

LEAST = 3
"""Rewards that a rank correlation is of, at least."""


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """What each reward adds to the base's score by one judge.

    Attributes:
        judge: whose score is meant.
        kl: where, in nats per reply.
        gains: {reward: score of the guided model less that of the base}, of rewards that guide alone.
        taus: {"reward accuracy" or "policy accuracy": Kendall's τ-b of it and the gain over rewards}, where enough have
            it; the intervals are over prompts, accuracies taken as they are.
    """

    judge: str
    kl: float
    gains: Mapping[str, Estimate]
    taus: Mapping[str, Estimate]


def behaviour(results: Results, judge: str) -> Behaviour | None:
    """By a judge that scores single replies; None where no reward trained for the run guides alone."""
    lines = {t.name: line for t in results.trained if (line := _line(results, judge, t.name)) is not None}
    if not lines:
        return None
    known = _accuracies(results, lines)
    ends = np.cumsum([line.rows_NK.shape[1] for line in lines.values()])[:-1]

    def figures(means_SK: NDArray[Any]) -> NDArray[Any]:
        curves = [Curve.of(part) for part in np.hsplit(means_SK, ends)]
        reach_S = np.min([curve.reach for curve in curves], axis=0)
        bases = [line_SK[:, line_SK.shape[1] // 2] for line_SK in np.hsplit(means_SK, ends)]
        gains_SR = np.stack([c.read(reach_S[:, None])[:, 0] - b for c, b in zip(curves, bases, strict=True)], axis=1)
        taus = [_tau(np.array([values.get(name, np.nan) for name in lines]), gains_SR) for values in known.values()]
        return np.column_stack([gains_SR, *taus])

    found = bootstrap(figures, np.hstack([line.rows_NK for line in lines.values()]))
    return Behaviour(
        judge=judge,
        kl=float(min(line.now.reach[0] for line in lines.values())),
        gains=dict(zip(lines, found, strict=False)),
        taus=dict(zip(known, found[len(lines) :], strict=True)),
    )


def pair_accuracies(trained: Trained) -> tuple[Proportion | None, Proportion | None]:
    """(of the reward alone, of the policy that it makes) on held-out pairs, as far as they are known."""
    main, alone = (accuracies(trained.metrics, name).get("all") for name in ("accuracy", "reward_accuracy"))
    return (main, trained.policy) if alone is None else (alone, main)


def _line(results: Results, judge: str, reward: str) -> Measurements | None:
    base = results.measured[0]
    methods = [row for row in results.measured if row.reward == reward and row.distances is not None]
    return measurements([base, *methods], judge) if methods and base.distances is not None else None


def _accuracies(results: Results, lines: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """{kind of accuracy: {reward: accuracy}}, of the kinds that enough rewards have."""
    found: dict[str, dict[str, float]] = {"reward accuracy": {}, "policy accuracy": {}}
    for trained in results.trained:
        for values, accuracy in zip(found.values(), pair_accuracies(trained), strict=True):
            if accuracy is not None and trained.name in lines:
                values[trained.name] = accuracy.rate
    return {kind: values for kind, values in found.items() if len(values) >= LEAST}


def _tau(known_R: NDArray[Any], gains_SR: NDArray[Any]) -> NDArray[Any]:
    """Kendall's τ-b [S] over the rewards whose accuracy is known."""
    pairs = [(i, j) for i, j in combinations(range(len(known_R)), 2) if not np.isnan(known_R[i] - known_R[j])]
    first, second = np.array(pairs).T
    one_C, other_SC = np.sign(known_R[first] - known_R[second]), np.sign(gains_SR[:, first] - gains_SR[:, second])
    tau_S: NDArray[Any] = (one_C * other_SC).sum(axis=1) / np.sqrt((one_C**2).sum() * (other_SC**2).sum(axis=1))
    return tau_S
