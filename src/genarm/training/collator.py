"""Batches of pairs: chosen and rejected in one forward.

Shapes: B pairs, hence 2B sequences (the chosen ones first); T = P + R positions, prompts right-aligned in the
first P, responses left-aligned in the last R. So the last R + 1 rows of the logits hold every response, and a
model that takes `logits_to_keep` computes no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from genarm.data.tokens import TokenPair


@dataclass(frozen=True, kw_only=True)
class PairCollator:
    """Collates `TokenPair`s into `input_ids`, `attention_mask` [2B, T] and `response_mask` [2B, R]."""

    pad_id: int

    def __call__(self, pairs: Sequence[TokenPair]) -> dict[str, torch.Tensor]:
        """Tensors of one batch; padding has `pad_id` and mask 0."""
        prompts = [pair.prompt_ids for pair in pairs] * 2
        responses = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
        width_P, width_R = max(map(len, prompts)), max(map(len, responses))
        ids_BT = torch.full((len(prompts), width_P + width_R), self.pad_id)
        mask_BT = torch.zeros_like(ids_BT)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            span = slice(width_P - len(prompt), width_P + len(response))
            ids_BT[row, span] = torch.tensor([*prompt, *response])
            mask_BT[row, span] = 1
        return {"input_ids": ids_BT, "attention_mask": mask_BT, "response_mask": mask_BT[:, width_P:].contiguous()}
