"""Adapters of the output layer alone, such as a head ARM: all that they say, the base's last hidden states tell.

A member with such an adapter needs no row and no forward of its own. With the base's log-probs at hand, its own are
`log_softmax(log π_base + (h A) B)`: what the base's log-softmax has taken from all ids alike, its own takes anyway.

Shapes: W positions, D features of the hidden states, R columns (the ranks of all these adapters together), V ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from genarm.engine.lora import can_share
from genarm.model.adapters import adapter_layers, names_on
from genarm.model.combine import log_probs
from genarm.model.output_layer import logit_scale, output_layer


def is_of_the_output(model: PreTrainedModel, adapter: str | None) -> bool:
    """Whether an adapter's member can be told from the base's hidden states.

    The adapter must be a plain low-rank sum on the output layer, and the model's logits what that layer says and
    nothing else, a cap or a scale; that is tried on a few tokens.
    """
    layer = output_layer(model)
    if adapter is None or [own for own in adapter_layers(model) if adapter in names_on(own)] != [layer]:
        return False
    return can_share(model, [adapter]) and logit_scale(model) == 1


class OutputAdapters:
    """The adapters of one model's output layer, by index; float32 throughout.

    Attributes:
        rank: R.
    """

    def __init__(self, model: PreTrainedModel, adapters: Sequence[str]) -> None:
        """Copy their matrices, which are small.

        Args:
            model: carries them.
            adapters: by their names there.
        """
        self._layer: nn.Module = output_layer(model)
        self._heard: Tensor | None = None
        layer: Any = self._layer
        downs = [layer.lora_A[name].weight.detach().float() for name in adapters]
        self.rank = sum(map(len, downs))
        self._ends = torch.tensor([0, *map(len, downs)]).cumsum(0).tolist()
        self._ups = [
            (layer.lora_B[name].weight.detach().float() * float(layer.scaling[name])).t().contiguous()
            for name in adapters
        ]
        self._down_DR = torch.cat(downs).t().contiguous()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the model runs once: note what its output layer reads."""
        hook = self._layer.register_forward_pre_hook(self._hear)
        try:
            yield
        finally:
            hook.remove()
            self._heard = None

    def _hear(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._heard = inputs[0]

    def heard(self) -> Tensor:
        """What the output layer has read, [1, W, D]; call while listening."""
        assert self._heard is not None
        return self._heard

    def low(self) -> Tensor:
        """h A of the positions that the output layer has read, float32 [W, R]; likewise."""
        return self.heard().flatten(0, -2).float() @ self._down_DR

    def log_probs(self, adapter: int, base_WV: Tensor, low_WR: Tensor) -> Tensor:
        """What the member with an adapter says, float32 log-probs [W, V], from the base's."""
        mine_WR = low_WR[:, self._ends[adapter] : self._ends[adapter + 1]]
        return log_probs(torch.addmm(base_WV, mine_WR, self._ups[adapter]))
