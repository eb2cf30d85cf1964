"""How far apart two ways to the same log-probabilities may be by rounding.

Shapes: T tokens, V ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 3e-4
"""Of distances in float32, the largest; 135 million trained weights come to 5e-6, tiny models of any family to 8e-6."""
ROUNDED = 0.2
"""Of distances in half precision, the median; those weights come to 0.03 in bfloat16, what is wrong to 0.5 or more.
Rounding grows as the root of the number of layers."""
_LEAST_SPREAD = 1e-3
"""A model that says the same of all ids has no spread to compare with."""


def apart(got_TV: Tensor, want_TV: Tensor, *, exact: bool) -> float | None:
    """The largest difference in nats of two models that are not the same; None where rounding explains what differs.

    Args:
        got_TV, want_TV: log-probs; where `want_TV` is NaN nothing is compared.
        exact: products are float32 throughout.
    """
    want_TV = want_TV.to(got_TV.device)
    known = ~want_TV.isnan().any(dim=-1)  # what the model says nothing of proves nothing
    if not known.any():
        return None
    distances = _distances(got_TV[known], want_TV[known])
    # A router that picks another expert by rounding leaves one token far off; what is wrong leaves many.
    seen = distances.max() if exact else distances.median()
    if seen <= (EXACT if exact else ROUNDED):  # not so for NaN
        return None
    return float((got_TV[known] - want_TV[known]).nan_to_num(torch.inf).abs().max())


def _distances(got_TV: Tensor, want_TV: Tensor) -> Tensor:
    """The root mean square difference at each token, [T], in spreads (standard deviations) of its log-probs."""
    same_TV = got_TV == want_TV  # −inf on both sides, too
    apart_T = (got_TV - want_TV).masked_fill(same_TV, 0.0).square().mean(dim=-1).sqrt()
    spread_T = want_TV.masked_fill(want_TV.isinf(), 0.0).std(dim=-1)
    return apart_T / (spread_T + _LEAST_SPREAD)
