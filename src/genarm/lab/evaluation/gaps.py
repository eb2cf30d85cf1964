"""Which share of the way from one method to a better one others cover."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genarm.lab.evaluation.recipe import Gap
from genarm.lab.evaluation.results import Results
from genarm.statistics import Estimate, bootstrap, mean_difference


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """How far methods come on the way from `bottom` to `top`.

    Attributes:
        judge, bottom, top: of the gap.
        gap: mean quality of `top` less that of `bottom`.
        shares: {method: (its mean quality − bottom's) / gap}; None where the interval of `gap` is not above 0.
    """

    judge: str
    bottom: str
    top: str
    gap: Estimate
    shares: Mapping[str, Estimate | None]


def recovered(results: Results, gap: Gap) -> Recovered | None:
    """The shares with paired bootstrap intervals; None where the judge says nothing of one of the methods."""
    qualities = [results.quality(gap.judge, name) for name in (gap.bottom, gap.top, *gap.methods)]
    known = [quality for quality in qualities if quality is not None]
    if len(known) < len(qualities):
        return None
    bottom, top, *methods = known
    width = mean_difference(top, bottom)
    shares = [bootstrap(_share, np.array([bottom, top, method]).T)[0] for method in methods]
    defined = width.low > 0
    return Recovered(
        judge=gap.judge,
        bottom=gap.bottom,
        top=gap.top,
        gap=width,
        shares={name: share if defined else None for name, share in zip(gap.methods, shares, strict=True)},
    )


def _share(means_S3: NDArray[Any]) -> NDArray[Any]:
    """Of bottom, top and a method: [S, 1]."""
    over_bottom_S2 = means_S3[:, 1:] - means_S3[:, :1]
    share_S1: NDArray[Any] = over_bottom_S2[:, 1:] / over_bottom_S2[:, :1]
    return share_S1
