"""How a causal LM reads a batch of pairs: one forward, and what it says before each token of the responses.

Shapes: as in `collator` and `responses`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from torch import nn

from genarm.model.generation import last_positions
from genarm.training.responses import ResponseStates

Batch: TypeAlias = Mapping[str, torch.Tensor]


class ModelReader:
    """Reads batches with one model: a `PreTrainedModel`, or a `peft.PeftModel` on one."""

    def __init__(self, model: nn.Module) -> None:
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.arguments = frozenset(inspect.signature(base.forward).parameters)

    def states(self, model: nn.Module, batch: Batch) -> ResponseStates:
        """What `model`, which may be wrapped for several processes, says before each token of the responses."""
        ids_BT, mask_BT = batch["input_ids"], batch["attention_mask"]
        response_mask_BR = batch["response_mask"]
        width_R = response_mask_BR.shape[1]
        options: dict[str, Any] = {"use_cache": False}
        if "position_ids" in self.arguments:
            options["position_ids"] = (mask_BT.cumsum(-1) - 1).clamp(min=0)
        if "logits_to_keep" in self.arguments:
            options["logits_to_keep"] = width_R + 1 if model.training else last_positions(width_R + 1, ids_BT)
        logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, **options).logits
        rows_N, places_N = response_mask_BR.nonzero(as_tuple=True)
        return ResponseStates(
            hidden_ND=logits_BTV[rows_N, places_N + logits_BTV.shape[1] - width_R - 1],
            labels_N=ids_BT[rows_N, places_N + ids_BT.shape[1] - width_R],
            sequences_N=rows_N,
            count=len(ids_BT),
            head=nn.Identity(),
        )
