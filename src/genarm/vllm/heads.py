"""Adapters of the base's output layer alone: their logits are the base's and a small product of its hidden states.

Shapes: N rows, H features of the hidden states, R the ranks of all these adapters together, V ids.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from genarm.errors import MemberError, UnsupportedError
from genarm.vllm.lora import read_parts

if TYPE_CHECKING:
    from genarm.vllm.config import TrunkSpec


class OutputHeads(nn.Module):
    """The members of a trunk that are heads; every rank has all of them, float32 throughout."""

    def __init__(self, model: nn.Module, trunk: TrunkSpec) -> None:
        """Read the adapters.

        Raises:
            MemberError: an adapter is not there, is not a plain LoRA, or does not fit.
            UnsupportedError: the model caps its logits, which then do not add up.
        """
        super().__init__()
        self._heads = trunk.heads
        processor: Any = getattr(model, "logits_processor", None)
        if processor is None or processor.soft_cap is not None:
            raise UnsupportedError(
                f"{trunk.heads[0].name!r} adapts the output layer of {trunk.model}, which does more to its logits than "
                "vLLM could have in common with it; merge it into a full model (peft's merge_and_unload) and compose "
                "that instead, or use genarm serve --engine genarm"
            )
        device = next(model.parameters()).device
        downs: list[Tensor] = []
        for i, stream in enumerate(trunk.heads):
            files, parts = read_parts(stream, trunk)
            if len(parts) != 1:
                raise MemberError(f"{files.label} changes {sorted(parts)}, though it names the output layer alone")
            (part,) = parts.values()
            downs.append(part.down.float().t())
            up_RV = part.up.float().t() * (part.scale * processor.scale)
            self.register_buffer(f"up_{i}", up_RV.contiguous().to(device), persistent=False)
        self._ranks = [down.shape[1] for down in downs]
        self.down: Tensor
        self.register_buffer("down", torch.cat(downs, dim=1).contiguous().to(device), persistent=False)

    def logits(self, base_NV: Tensor | None, states_NH: Tensor, wanted: Container[int]) -> dict[int, Tensor | None]:
        """{member: logits [N, V]} of those that are wanted; None where this rank has none of the base's."""
        chosen = [i for i, stream in enumerate(self._heads) if stream.member in wanted]
        if base_NV is None or not chosen:
            return {self._heads[i].member: None for i in chosen}
        lows = (states_NH.float() @ self.down).split(self._ranks, dim=1)
        return {self._heads[i].member: torch.addmm(base_NV.float(), lows[i], getattr(self, f"up_{i}")) for i in chosen}
