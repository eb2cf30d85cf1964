"""What is learned through the policy that decodes, π_b · ρ^w / Z: the arithmetic, at one position at a time.

ρ is π_r, or π_r/π_r0 where the reward is a difference to its own start. Everything takes logits as they are.

Shapes: C positions, V ids of the base's vocabulary; a reward may have more or fewer ids than the base, as `align` says.
"""

from __future__ import annotations

import torch
from torch import Tensor


def guided_log_probs(base_CV: Tensor, reward_CV: Tensor, weight: Tensor | float, unknown_V: Tensor | None) -> Tensor:
    """log π_b + w log ρ − log Z [C, V], as `genarm.model.combine` has it; ids in `unknown_V` have no probability."""
    total_CV = base_CV + weight * reward_CV
    if unknown_V is not None:
        total_CV = total_CV.masked_fill(unknown_V, -torch.inf)
    return total_CV.log_softmax(-1)


def reward_log_probs(own_CV: Tensor, start_CV: Tensor | None) -> Tensor:
    """log ρ [C, V] of a reward's logits, less those of its start where there are any."""
    return own_CV.log_softmax(-1) if start_CV is None else own_CV.log_softmax(-1) - start_CV.log_softmax(-1)


def guided_rewards(
    labels_C: Tensor, base_CV: Tensor, reward_CV: Tensor, weight_C: Tensor, unknown_V: Tensor | None
) -> Tensor:
    """(log π_guided − log π_b) / w of each token [C] that comes: log ρ − log Z / w.

    Over w, so that β times a margin of these is what the paper's loss has at Z = 1, whatever the weight.
    """
    base_CV, column_C1 = base_CV.log_softmax(-1), labels_C[:, None]
    guided_CV = guided_log_probs(base_CV, reward_CV, weight_C[:, None], unknown_V)
    return (guided_CV.gather(-1, column_C1) - base_CV.gather(-1, column_C1))[:, 0] / weight_C


def divergence_from(target_CV: Tensor, other_CV: Tensor) -> Tensor:
    """KL(target ‖ other) [C] of log-probs; where the target has no probability there is nothing to differ in."""
    share_CV = target_CV.exp()
    return torch.where(share_CV > 0, share_CV * (target_CV - other_CV), 0.0).sum(-1)
