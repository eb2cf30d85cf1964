"""What models say of responses, position by position, without a table of [positions, vocabulary].

Shapes: N positions that predict a token of a response, in the same order for every model that reads the same batch;
S = 2B sequences (the chosen ones first), D width of the hidden states, V vocabulary, C positions of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Entries of a chunk's logits: bounds each temporary float32 copy of them to 64 MiB.
CHUNK_ENTRIES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class ResponseStates:
    """What a model says before each token of the responses of a batch.

    Attributes:
        hidden_ND: what the output layer reads; the logits themselves (D = V) where the layer is not a part of its own.
        labels_N: the token that comes.
        sequences_N: which sequence it belongs to, 0 … S − 1.
        count: S.
        head: logits [C, V] of states [C, D]; `nn.Identity()` where the states are logits.
    """

    hidden_ND: Tensor
    labels_N: Tensor
    sequences_N: Tensor
    count: int
    head: Callable[[Tensor], Tensor]


def token_log_probs(states: ResponseStates) -> Tensor:
    """log π(y_t | x, y_<t) of every token of the responses: float32 [N].

    Differentiable in the states and in the head's parameters; see `over_vocabulary` for what it holds.
    """
    return over_vocabulary(_log_probs, states)


def summed(values_N: Tensor, states: ResponseStates) -> Tensor:
    """The sum of `values_N` over the tokens of each sequence: [S]."""
    own_SN = torch.arange(states.count, device=values_N.device)[:, None] == states.sequences_N
    return torch.where(own_SN, values_N, 0).sum(-1)  # unlike index_add, in the same order every time


def over_vocabulary(values: Callable[..., Tensor], *states: ResponseStates) -> Tensor:
    """`values(labels_C, *logits_CV)` at every position, a chunk of positions at a time: float32 [N].

    Args:
        values: maps the tokens that come [C] and the logits [C, V] of each model, float32 at least, to one value [C]
            for each position, which must depend on that position alone.
        states: of one or several models that read the same batch (and have the same vocabulary).

    The result can be differentiated once, in all states and in the parameters of all heads. No logits outlive their
    chunk: where no head is trained, the slopes [N, D] are made on the way forwards; otherwise the backward makes the
    logits again.
    """
    probes = [one.head(one.hidden_ND[:1].detach()) for one in states]
    size = max(1, CHUNK_ENTRIES // probes[0].shape[-1])
    # Slopes of a table would be as large as the table, which is there already.
    tables = any(isinstance(one.head, nn.Identity) and one.hidden_ND.requires_grad for one in states)
    if torch.is_grad_enabled() and not tables and not any(probe.requires_grad for probe in probes):
        result: Tensor = _SlopesAhead.apply(values, states, size, *(one.hidden_ND for one in states))
        return result
    # One split of each, whose backward joins the chunks once: each slice's would make the whole anew.
    parts = zip(states[0].labels_N.split(size), *(one.hidden_ND.split(size) for one in states), strict=True)
    return torch.cat(
        [checkpoint(_values, values, states, labels_C, hidden, use_reentrant=False) for labels_C, *hidden in parts]
    )


def _log_probs(labels_C: Tensor, logits_CV: Tensor) -> Tensor:
    return -F.cross_entropy(logits_CV, labels_C, reduction="none")


def _values(
    values: Callable[..., Tensor], states: Sequence[ResponseStates], labels_C: Tensor, hidden: Sequence[Tensor]
) -> Tensor:
    logits = [one.head(hidden_CD) for one, hidden_CD in zip(states, hidden, strict=True)]
    return values(labels_C, *(table.to(torch.promote_types(table.dtype, torch.float32)) for table in logits))


class _SlopesAhead(torch.autograd.Function):
    """Values and their slopes in the hidden states from one forward of frozen heads."""

    @staticmethod
    def forward(
        ctx: Any, values: Callable[..., Tensor], states: Sequence[ResponseStates], size: int, *hidden: Tensor
    ) -> Tensor:
        made = []
        slopes = [torch.empty_like(one) if one.requires_grad else None for one in hidden]
        for start in range(0, len(hidden[0]), size):
            part = slice(start, start + size)
            own = [one[part].detach().requires_grad_(one.requires_grad) for one in hidden]
            with torch.enable_grad():
                values_C = _values(values, states, states[0].labels_N[part], own)
            made.append(values_C.detach())
            wanted = [one for one in own if one.requires_grad]
            found = iter(torch.autograd.grad(values_C, wanted, torch.ones_like(values_C)) if wanted else ())
            for slope_ND in slopes:
                if slope_ND is not None:
                    slope_ND[part] = next(found)
        ctx.save_for_backward(*slopes)
        return torch.cat(made)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        grads = [None if slope is None else (slope * grad_N[:, None]).to(slope.dtype) for slope in ctx.saved_tensors]
        return None, None, None, *grads
