"""Pairs of random models whose speculation acceptance is a number of one's choice.

A base and a small ARM are made the same bigram model: attention and MLP still run at full cost, but what they add to
the residual stream is scaled down to next to nothing, and the base's embedding and output layer are the ARM's, turned
into its larger space. Then the ARM's output layer is turned by an angle towards an unrelated one: at angle 0 both say
the same and every draft is accepted; at a right angle they have nothing in common. In between there is an angle for any
acceptance, found by bisection.

Shapes: V ids of the vocabulary, T tokens, h the ARM's hidden size, H the base's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from genarm.errors import ConfigError
from genarm.lab.bench.models import random_model, twin
from genarm.lab.bench.shapes import ShapePair

WEIGHT = 1.0
"""Of the ARM, wherever it guides here."""
_FAINT = 0.01
"""What is left of each layer's contribution: enough to compute, too little to matter."""
_ENTROPY = 3.0
"""Of the guided distribution, in nats, by the formula of `_logit_spread`; in fact it comes to between 3 and 4.5."""
_LOOKED_AT = 128
_HALVINGS = 24


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A base and an ARM that says the same, of which others are made.

    Attributes:
        base: to be guided.
        arm: at angle 0; its output layer is `same_Vh`.
        same_Vh, other_Vh: float32 output layers of the ARM at angle 0 and at a right angle.
        ids_T: the tokens after which agreement is measured.
    """

    base: PreTrainedModel
    arm: PreTrainedModel
    same_Vh: Tensor
    other_Vh: Tensor
    ids_T: Tensor


@torch.no_grad()
def make_pair(shapes: ShapePair, *, dtype: torch.dtype, device: str, seed: int) -> Pair:
    """A base and an ARM of random weights that agree."""
    base = random_model(shapes.base, dtype=dtype, device=device, seed=seed)
    arm = random_model(shapes.arm, dtype=dtype, device=device, seed=seed + 1)
    for model in (base, arm):
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(_FAINT)
            layer.mlp.down_proj.weight.mul_(_FAINT)
    large, small, size = shapes.base.hidden, shapes.arm.hidden, shapes.arm.vocabulary
    generator = torch.Generator().manual_seed(seed)
    words_Vh, same_Vh, other_Vh = (torch.randn(size, small, generator=generator).to(device) for _ in range(3))
    spread = _logit_spread(size) / math.sqrt(small)
    same_Vh *= spread
    other_Vh *= spread
    turn = torch.linalg.qr(torch.randn(large, small, generator=generator)).Q.T.to(device)  # [h, H]
    arm.model.embed_tokens.weight.copy_(words_Vh)
    arm.lm_head.weight.copy_(same_Vh)
    base.model.embed_tokens.weight.copy_(words_Vh @ turn)
    # A vector keeps its length when turned, but RMSNorm divides by length / √size: √(H/h) times more is left of it.
    base.lm_head.weight.copy_(same_Vh @ turn * math.sqrt(small / large))
    ids_T = torch.randint(size, (_LOOKED_AT,), generator=generator).to(device)
    return Pair(base=base, arm=arm, same_Vh=same_Vh, other_Vh=other_Vh, ids_T=ids_T)


def _logit_spread(size: int) -> float:
    """Standard deviation of the base's logits at which the guided distribution has the wanted entropy.

    Normal logits of standard deviation s have an entropy of about ln V − s²/2; guiding with w multiplies s by 1 + w.
    """
    return math.sqrt(2 * max(math.log(size) - _ENTROPY, 1.0)) / (1 + WEIGHT)


@torch.no_grad()
def arm_that_agrees(pair: Pair, wanted: float) -> tuple[PreTrainedModel, float]:
    """An ARM whose drafts are accepted with probability `wanted`.

    Returns:
        The ARM, which shares the pair's memory but for its output layer, and its agreement at `pair.ids_T`.

    Raises:
        ConfigError: unrelated models agree more than that.
    """
    base_TV = pair.base(pair.ids_T[None]).logits[0].float()
    hidden_Th = pair.arm.model(pair.ids_T[None]).last_hidden_state[0].float()
    same_TV, other_TV = hidden_Th @ pair.same_Vh.T, hidden_Th @ pair.other_Vh.T

    def agreement(angle: float) -> float:
        return float(overlap(base_TV, math.cos(angle) * same_TV + math.sin(angle) * other_TV, WEIGHT).mean())

    low, high = 0.0, math.pi / 2
    least, most = agreement(high), agreement(low)
    if not least < wanted < most:
        raise ConfigError(
            f"--agreement is {wanted:g}; models of these shapes can have one between {least:.2f} and {most:.2f}"
        )
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if agreement(middle) > wanted else (low, middle)
    arm = twin(pair.arm)
    head_Vh = math.cos(low) * pair.same_Vh + math.sin(low) * pair.other_Vh
    arm.lm_head.weight = nn.Parameter(head_Vh.to(pair.arm.dtype), requires_grad=False)
    arm_TV = arm(pair.ids_T[None]).logits[0].float()
    return arm, float(overlap(base_TV, arm_TV, WEIGHT).mean())


def overlap(base_TV: Tensor, arm_TV: Tensor, weight: float) -> Tensor:
    """Acceptance probability of a draft after each token, [T]: Σ_v min(p, q) of logits [T, V].

    p ∝ π_base · π_arm^w is what is sampled from, q ∝ π_arm^(1+w) what the engine drafts from.
    """
    arm_log_TV = torch.log_softmax(arm_TV, dim=-1)
    p_TV = torch.softmax(torch.log_softmax(base_TV, dim=-1) + weight * arm_log_TV, dim=-1)
    q_TV = torch.softmax((1 + weight) * arm_log_TV, dim=-1)
    return torch.minimum(p_TV, q_TV).sum(dim=-1)
