"""How alike judges order the replies to one prompt, and how far each goes by their length.

Kendall's τ-b within prompts: of every two methods' replies to the same prompt each side says which is better, or that
they are equal; agreement counts 1 and disagreement −1, over the geometric mean of how often either side decides. What
makes a prompt hard or long has no part in it.

Shapes: N prompts, M methods, C pairs of methods, S resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from genarm.lab.evaluation.results import Results
from genarm.statistics import Estimate, bootstrap

LENGTH = "length in tokens"


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of two judges, or of a judge and the length of replies; `pairs` of replies are compared by both."""

    first: str
    second: str
    tau: Estimate
    pairs: int


def agreements(results: Results, judges: Sequence[str]) -> tuple[Agreement, ...]:
    """Every two of the judges, which score single replies, and each of them with length."""
    if len(results.measured) < 2:
        return ()
    columns = {judge: np.array([row.scores[judge] for row in results.measured]).T for judge in judges}
    lengths_NM = np.array([row.tokens for row in results.measured]).T
    sides = [*combinations(judges, 2), *((judge, LENGTH) for judge in judges)]
    return tuple(_agreement(first, second, columns[first], columns.get(second, lengths_NM)) for first, second in sides)


def _agreement(first: str, second: str, first_NM: NDArray[np.float64], second_NM: NDArray[np.float64]) -> Agreement:
    one_NC, other_NC = _order(first_NM), _order(second_NM)
    sums = [one_NC * other_NC, one_NC**2, other_NC**2]
    (tau,) = bootstrap(
        lambda means_SK: means_SK[:, :1] / np.sqrt(means_SK[:, 1:2] * means_SK[:, 2:]),
        np.stack([values_NC.sum(axis=1) for values_NC in sums], axis=1),
    )
    return Agreement(first=first, second=second, tau=tau, pairs=one_NC.size)


def _order(values_NM: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N, C]: 1 where the first reply of a pair has more, −1 where it has less."""
    first, second = np.triu_indices(values_NM.shape[1], 1)
    order_NC: NDArray[np.float64] = np.sign(values_NM[:, first].astype(np.float64) - values_NM[:, second])
    return order_NC
