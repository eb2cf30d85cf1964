"""Combination of streams' log-probabilities: the formula of guided decoding, and nothing else.

A stream is a model that reads the tokens, with an adapter or without. The base is one; a reward adds its own stream
and, where it has a reference, takes the reference's away.

Shapes: B rows, T positions, V ids of the base's vocabulary, R rewards, S streams beside the base: the rewards, then
references that are neither the base nor a reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_HALVINGS = 20
"""In which the share of the weights that a budget leaves is found: to a few millionths of it, whatever its size."""


class Coefficients(NamedTuple):
    """What each stream's log-probs are multiplied by, a row for each sequence.

    Attributes:
        base_B: 1, less the weights of rewards whose reference is the base; None where it is 1 throughout.
        streams_BS: of the other streams; a stream whose coefficient is 0 in a row has no part in it.
        guided_B: whether any weight is not 0; the other rows are the base, bit for bit.
    """

    base_B: Tensor | None
    streams_BS: Tensor
    guided_B: Tensor

    def needs(self, stream: int) -> bool:
        """Whether some row makes use of a stream."""
        return bool((self.streams_BS[:, stream] != 0).any())

    def take(self, streams: Sequence[int]) -> Coefficients:
        """Of some streams only."""
        return self._replace(streams_BS=self.streams_BS[:, list(streams)])

    def to(self, device: torch.device) -> Coefficients:
        """On another device."""
        streams_BS, guided_B = (part.to(device, non_blocking=True) for part in (self.streams_BS, self.guided_B))
        base_B = None if self.base_B is None else self.base_B.to(device, non_blocking=True)
        return Coefficients(base_B, streams_BS, guided_B)


def coefficients(weights_BR: Tensor, references: Sequence[int | None] = (), streams: int | None = None) -> Coefficients:
    """What weights mean for the streams.

    Args:
        weights_BR: w_i = α_i / β for each row, any finite float32.
        references: of each reward: 0 for the base, s + 1 for stream s, None for no reference.
        streams: S; by default R.
    """
    rewards = weights_BR.shape[1]
    streams_BS = torch.nn.functional.pad(weights_BR, (0, (streams or rewards) - rewards))
    against_base = [reward for reward, reference in enumerate(references) if reference == 0]
    base_B = 1 - weights_BR[:, against_base].sum(dim=1) if against_base else None
    for reward, reference in enumerate(references):
        if reference:
            streams_BS[:, reference - 1] -= weights_BR[:, reward]
    return Coefficients(base_B, streams_BS, (weights_BR != 0).any(dim=1))


def log_probs(logits_BTV: Tensor) -> Tensor:
    """Float32 log-softmax over the vocabulary; logits in bf16 are widened here and stay float32 from then on."""
    return torch.log_softmax(logits_BTV, dim=-1, dtype=torch.float32)


def combine(
    base_BTV: Tensor,
    streams: Sequence[Tensor],
    given: Coefficients,
    unknown: Sequence[Tensor | None] = (),
) -> Tensor:
    """log π(v|·) = c_0 log π_base(v|·) + Σ_s c_s log π_s(v|·) − log Z.

    For rewards without references that is GenARM's log π_base + Σ_i w_i log π_i − log Z (arXiv 2410.08193).

    Args:
        base_BTV: float32 log-probs of the base.
        streams: float32 log-probs [B, T, V] of each, in the order of the columns of `given`.
        given: the coefficients c.
        unknown: for each stream, a bool mask [V] of the ids that it cannot judge (`vocabulary.Alignment`), or
            None. Such an id has probability 0 in the rows where that stream's coefficient is not 0. So has an id to
            which a stream itself gives probability 0 (log π = −∞), whatever its sign: one that is negative would
            make it infinitely likely.

    Returns:
        Normalised float32 log-probs [B, T, V].
    """
    if not streams:
        return base_BTV
    total_BTV = weighted_sum(base_BTV, streams, given, unknown)
    if given.guided_B.is_cpu and bool(given.guided_B.all()):
        return torch.log_softmax(total_BTV, dim=-1)
    return torch.where(given.guided_B[:, None, None], torch.log_softmax(total_BTV, dim=-1), base_BTV)


def weighted_sum(
    base_BTV: Tensor,
    streams: Sequence[Tensor],
    given: Coefficients,
    unknown: Sequence[Tensor | None] = (),
) -> Tensor:
    """As `combine`, before it is normalised.

    Where nobody asks for the members' own log-probs, float32 logits will do: what a member's log-softmax takes from
    all ids of a row alike, the last one takes anyway.
    """
    total_BTV = base_BTV.clone() if given.base_B is None else _times(base_BTV, given.base_B[:, None, None])
    for s, stream_BTV in enumerate(streams):
        total_BTV = _add(total_BTV, stream_BTV, given.streams_BS[:, s, None, None])
    for s, mask_V in enumerate(unknown):
        if mask_V is not None:
            total_BTV.masked_fill_(mask_V & (given.streams_BS[:, s, None, None] != 0), -torch.inf)
    return total_BTV


def _times(stream_BTV: Tensor, factor_B11: Tensor) -> Tensor:
    """A stream by itself times its coefficient."""
    if stream_BTV.is_cpu and _finite(stream_BTV):
        return factor_B11 * stream_BTV
    return _add(torch.zeros_like(stream_BTV), stream_BTV, factor_B11)


def _finite(stream_BTV: Tensor) -> bool:
    """Whether all numbers are, as nearly always; on a GPU looking would cost a wait."""
    return bool(stream_BTV.sum().isfinite())


def _add(total_BTV: Tensor, stream_BTV: Tensor, factor_B11: Tensor) -> Tensor:
    """`total_BTV` with one more stream, in place."""
    if stream_BTV.is_cpu and _finite(stream_BTV):
        return total_BTV.addcmul_(factor_B11, stream_BTV)
    impossible_BTV = stream_BTV == -torch.inf
    total_BTV.addcmul_(factor_B11, stream_BTV.masked_fill(impossible_BTV | (factor_B11 == 0), 0))
    return total_BTV.masked_fill_(impossible_BTV & (factor_B11 != 0), -torch.inf)


def divergence(guided_BTV: Tensor, base_BTV: Tensor) -> Tensor:
    """KL(π_guided ‖ π_base) in nats, [B, T], of normalised log-probs; inf where π_base rules out what π_guided says."""
    gain_BTV = torch.where(guided_BTV == -torch.inf, 0.0, guided_BTV - base_BTV)
    return (guided_BTV.exp() * gain_BTV).sum(dim=-1).clamp_min(0.0)


def within_budget(base_BTV: Tensor, guided_BTV: Tensor, max_kl_B: Tensor) -> Tensor:
    """`guided_BTV`, no farther from the base than the budget: all weights of a position scaled down just enough.

    π_s ∝ π_base · (π_guided / π_base)^s with the largest s ≤ 1 for which KL(π_s ‖ π_base) is at most the budget; it
    grows with s ≥ 0, so that halving finds s, by its logarithm, as large weights leave a small share. A position
    within the budget is left as it is, bit for bit.

    Args:
        base_BTV, guided_BTV: normalised float32 log-probs.
        max_kl_B: nats per token for each row, inf for no budget. Where leaving out the ids that a stream rules out
            costs more than the budget already, the position is the base's.
    """
    budget_B1 = max_kl_B[:, None]
    over_BT = divergence(guided_BTV, base_BTV) > budget_B1
    if over_BT.is_cpu and not bool(over_BT.any()):
        return guided_BTV
    ruled_out_BTV = (guided_BTV == -torch.inf) | (base_BTV == -torch.inf)  # by either, so by every share below 1
    step_BTV = (guided_BTV - base_BTV).masked_fill(ruled_out_BTV, 0.0)
    start_BTV = base_BTV.masked_fill(ruled_out_BTV, -torch.inf)

    def scaled(share_BT: Tensor) -> Tensor:
        return torch.log_softmax(start_BTV + share_BT[..., None] * step_BTV, dim=-1)

    # Leaving ids out costs −log of their complement's mass. The rest is ∫ u Var_u du from 0 to s, and no variance is
    # above range² / 4 (Popoviciu), so that s² range² / 8 bounds it: a share that surely fits, and 0 if none does.
    left_BT = (budget_B1 + torch.logsumexp(start_BTV, dim=-1).clamp_max(0.0)).clamp_min(0.0)
    range_BT = step_BTV.amax(dim=-1) - step_BTV.amin(dim=-1)
    low_BT = ((8 * left_BT).sqrt() / range_BT.clamp_min(torch.finfo(range_BT.dtype).tiny)).clamp_max(1.0)
    high_BT = torch.ones_like(low_BT)
    for _ in range(_HALVINGS):
        middle_BT = low_BT.sqrt() * high_BT.sqrt()
        fits_BT = divergence(scaled(middle_BT), base_BTV) <= budget_B1
        low_BT, high_BT = torch.where(fits_BT, middle_BT, low_BT), torch.where(fits_BT, high_BT, middle_BT)
    nearer_BTV = torch.where((low_BT > 0)[..., None], scaled(low_BT), base_BTV)
    return torch.where(over_BT[..., None], nearer_BTV, guided_BTV)
