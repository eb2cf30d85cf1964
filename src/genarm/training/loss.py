"""The ARM loss (GenARM, arXiv 2410.08193, section 4.2), in tensors alone.

Shapes: B sequences (or pairs), T positions, V vocabulary, N positions that hold a response token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

# Entries of the vocabulary-sized table handled at once: bounds the temporary float32 copy to 64 MiB.
CHUNK_ENTRIES = 1 << 24


def token_log_probs(logits_BTV: torch.Tensor, labels_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """log π(labels_BT[b, t]) under softmax(logits_BTV[b, t]) where `mask_BT`, 0 elsewhere: float32 [B, T].

    Logits and labels are aligned: position t of `logits_BTV` predicts position t of `labels_BT`. The values equal
    `log_softmax(logits.float())` gathered at the labels, without that second [B, T, V] table: the autograd graph
    holds the logits (as they came) and one log-sum-exp per position, and the gradient has the logits' dtype.
    Float64 logits are computed in float64.
    """
    result: torch.Tensor = _TokenLogProbs.apply(logits_BTV, labels_BT, mask_BT.bool())
    return result


def response_log_probs(logits_BTV: torch.Tensor, labels_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """The reward r(x, y) = Σ_t log π(y_t | x, y_<t) of each sequence, summed over `mask_BT`: float32 [B]."""
    return token_log_probs(logits_BTV, labels_BT, mask_BT).sum(-1)


def arm_loss(chosen_B: torch.Tensor, rejected_B: torch.Tensor, beta: float) -> torch.Tensor:
    """−E log σ(β_r · (r(x, y⁺) − r(x, y⁻))), the mean over B pairs; a scalar."""
    return -F.logsigmoid(beta * (chosen_B - rejected_B)).mean()


class _TokenLogProbs(torch.autograd.Function):
    """Gathers log-softmax at the labels, a chunk of positions at a time in both directions."""

    @staticmethod
    def forward(ctx: Any, logits_BTV: torch.Tensor, labels_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(logits_BTV.dtype, torch.float32)
        rows_N, columns_N = mask_BT.nonzero(as_tuple=True)
        labels_N = labels_BT[rows_N, columns_N]
        lse_N = torch.empty(len(rows_N), dtype=wide, device=logits_BTV.device)
        picked_N = torch.empty_like(lse_N)
        for part in _chunks(len(rows_N), logits_BTV.shape[-1]):
            logits_CV = logits_BTV[rows_N[part], columns_N[part]].to(wide)
            lse_N[part] = logits_CV.logsumexp(-1)
            picked_N[part] = logits_CV.gather(-1, labels_N[part].unsqueeze(-1)).squeeze(-1)
        ctx.save_for_backward(logits_BTV, lse_N, rows_N, columns_N, labels_N)
        log_probs_BT = lse_N.new_zeros(mask_BT.shape)
        log_probs_BT[rows_N, columns_N] = picked_N - lse_N
        return log_probs_BT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BT: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits_BTV, lse_N, rows_N, columns_N, labels_N = ctx.saved_tensors
        grad_N = grad_BT[rows_N, columns_N]
        grad_BTV = torch.zeros_like(logits_BTV)
        for part in _chunks(len(rows_N), logits_BTV.shape[-1]):
            logits_CV = logits_BTV[rows_N[part], columns_N[part]].to(lse_N.dtype)
            # d log softmax(z)[y] / dz = onehot(y) − softmax(z)
            slope_CV = (logits_CV - lse_N[part].unsqueeze(-1)).exp_().neg_()
            slope_CV.scatter_add_(-1, labels_N[part].unsqueeze(-1), torch.ones_like(slope_CV[:, :1]))
            slope_CV *= grad_N[part].unsqueeze(-1)
            grad_BTV[rows_N[part], columns_N[part]] = slope_CV.to(logits_BTV.dtype)
        return grad_BTV, None, None


def _chunks(n: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_ENTRIES // vocabulary)
    return [slice(start, start + size) for start in range(0, n, size)]
