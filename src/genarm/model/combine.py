"""Combination of a base's and its rewards' log-probabilities: the formula of GenARM decoding, and nothing else.

Shapes: B rows, T positions, V ids of the base's vocabulary, R rewards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def log_probs(logits_BTV: Tensor) -> Tensor:
    """Float32 log-softmax over the vocabulary; logits in bf16 are widened here and stay float32 from then on."""
    return torch.log_softmax(logits_BTV, dim=-1, dtype=torch.float32)


def combine(
    base_BTV: Tensor,
    rewards: Sequence[Tensor],
    weights_BR: Tensor,
    unknown: Sequence[Tensor | None] = (),
) -> Tensor:
    """log π(v|·) = log π_base(v|·) + Σ_i w_i log π_i(v|·) − log Z (GenARM, arXiv 2410.08193).

    Args:
        base_BTV: float32 log-probs of the base.
        rewards: float32 log-probs [B, T, V] of each reward, in the order of the columns of `weights_BR`.
        weights_BR: w_i = α_i / β for each row, any finite float32. A row of zeros gives the base, bit for bit; a
            reward whose weight is 0 in a row has no part in it, whatever it says.
        unknown: for each reward, a bool mask [V] of the ids that it cannot judge (`vocabulary.Alignment`), or
            None. Such an id has probability 0 in the rows where that reward's weight is not 0. So has an id to which
            the reward itself gives probability 0 (log π = −∞), whatever the weight's sign: one that is negative would
            make it infinitely likely.

    Returns:
        Normalised float32 log-probs [B, T, V].
    """
    if not rewards:
        return base_BTV
    guided_B11 = (weights_BR != 0).any(dim=1)[:, None, None]
    total_BTV = weighted_sum(base_BTV, rewards, weights_BR, unknown)
    return torch.where(guided_B11, torch.log_softmax(total_BTV, dim=-1), base_BTV)


def weighted_sum(
    base_BTV: Tensor,
    rewards: Sequence[Tensor],
    weights_BR: Tensor,
    unknown: Sequence[Tensor | None] = (),
) -> Tensor:
    """As `combine`, before it is normalised.

    Where nobody asks for the members' own log-probs, float32 logits will do: what a member's log-softmax takes from
    all ids of a row alike, the last one takes anyway.
    """
    total_BTV = base_BTV.clone()
    for i, reward_BTV in enumerate(rewards):
        weight_B11 = weights_BR[:, i, None, None]
        if reward_BTV.is_cpu and bool(reward_BTV.sum().isfinite()):
            total_BTV.addcmul_(weight_B11, reward_BTV)  # nearly always; elsewhere looking would cost a wait
            continue
        impossible_BTV = reward_BTV == -torch.inf
        total_BTV.addcmul_(weight_B11, reward_BTV.masked_fill(impossible_BTV | (weight_B11 == 0), 0))
        total_BTV.masked_fill_(impossible_BTV & (weight_B11 != 0), -torch.inf)
    for i, mask_V in enumerate(unknown):
        if mask_V is not None:
            total_BTV.masked_fill_(mask_V & (weights_BR[:, i, None, None] != 0), -torch.inf)
    return total_BTV
