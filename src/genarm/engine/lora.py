"""LoRA adapters that share one read of their model's weights.

In an adapted layer all adapters are stacked into two matrices. A pass multiplies all its tokens by the first, keeps for
each token the columns of its own adapter (none, for the model itself) and multiplies by the second: two small products,
however many adapters there are. On a GPU both are in the model's dtype (bf16 enters here), as for any other layer; on a
CPU in float32, where products this small take half the time.

Shapes: T tokens, R ranks of all adapters of a layer together, I and O its in- and output features.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from genarm.model.adapters import adapter_layers

_Columns = tuple[tuple[int, float], ...]
"""What the ranks of a layer are: (member, scaling) of each column. Layers alike in this share a mask."""


def can_share(model: nn.Module, adapters: Sequence[str]) -> bool:
    """Whether all of `adapters` are plain low-rank sums on linear layers (no DoRA, no embeddings, no biases)."""
    for layer in adapter_layers(model):
        if not isinstance(layer, LoraLayer):
            return False
        for name in adapters:
            if name in layer.lora_embedding_A or name in layer.lora_variant or layer.lora_bias.get(name):
                return False
            if name in layer.lora_A and not isinstance(layer.lora_A[name], nn.Linear):
                return False
        if layer.merged:
            return False
    return True


@dataclass(frozen=True)
class _Stack:
    """All adapters of one layer, one above the other."""

    columns: _Columns
    down_RI: Tensor
    up_RO: Tensor


class SharedAdapters:
    """The adapters of one model, ready to run side by side. Outside of `masked` the model runs as before."""

    def __init__(self, model: nn.Module, adapters: Sequence[str | None], dtype: torch.dtype) -> None:
        """Stack the adapters; peft's own parameters become views of the stacks, so nothing is held twice.

        Args:
            model: carries them.
            adapters: of each member of the trunk, by index; None for the model itself.
            dtype: of the stacks.
        """
        layers: list[Any] = [*adapter_layers(model)]
        self._stacks: dict[nn.Module, _Stack] = {}
        self._tables: dict[_Columns, Tensor] = {}
        self._masks: dict[_Columns, Tensor] = {}
        for layer in layers:
            stack = _stack(layer, adapters, dtype)
            if stack is not None:
                kind: type[nn.Module] = type(layer)
                layer.__class__ = _sharing(kind)
                self._stacks[layer] = stack
                if stack.columns not in self._tables:
                    self._tables[stack.columns] = _table(stack, len(adapters))

    @contextmanager
    def masked(self, adapters_T: Tensor) -> Iterator[None]:
        """Run tokens each with the adapter of its member, in this thread."""
        self._masks = {
            columns: table.index_select(0, adapters_T.to(table.device)) for columns, table in self._tables.items()
        }
        _current.adapters = self
        try:
            yield
        finally:
            _current.adapters = None

    def add(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """`output` of the layer's base for `x`, plus the low-rank parts."""
        stack = self._stacks.get(layer)
        if stack is None:  # it carries adapters of another engine only
            return output
        low_TR = (x.view(-1, x.shape[-1]).to(stack.down_RI.dtype) @ stack.down_RI.t()).mul_(self._masks[stack.columns])
        # In place: the layer's output is fresh, nobody else holds it.
        output.view(-1, output.shape[-1]).add_(low_TR @ stack.up_RO)
        return output


_current = threading.local()


@cache
def _sharing(kind: type[nn.Module]) -> type[nn.Module]:
    """A peft layer's class whose forward adds all adapters at once while a pass runs, and else does what it did.

    A class, not another forward on the instance: names of parameters stay, and a copy of the model, which no engine
    knows, runs as peft made it.
    """
    if issubclass(kind, _Sharing):
        return kind
    return type(kind.__name__, (_Sharing, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


class _Sharing:
    """Mixed in before a peft layer's class."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        adapters: SharedAdapters | None = getattr(_current, "adapters", None)
        if adapters is None:
            parent: Any = super()
            result: Tensor = parent.forward(x, *args, **kwargs)
            return result
        return adapters.add(layer, x, layer.base_layer(x))


def _table(stack: _Stack, members: int) -> Tensor:
    """[members, R]: a member's scaling in its own columns, 0 in the others."""
    table = torch.zeros(members, len(stack.columns))
    for column, (member, scaling) in enumerate(stack.columns):
        table[member, column] = scaling
    return table.to(stack.down_RI)


def _stack(layer: Any, adapters: Sequence[str | None], dtype: torch.dtype) -> _Stack | None:
    """Stack the adapters of one layer; None where it has none of them."""
    here = [(member, name) for member, name in enumerate(adapters) if name is not None and name in layer.lora_A]
    if not here:
        return None
    down_RI = torch.cat([layer.lora_A[name].weight.detach().to(dtype) for _, name in here])
    up_RO = torch.cat([layer.lora_B[name].weight.detach().to(dtype).t() for _, name in here]).contiguous()
    columns: list[tuple[int, float]] = []
    for member, name in here:
        rank = layer.lora_A[name].weight.shape[0]
        own = slice(len(columns), len(columns) + rank)
        layer.lora_A[name].weight.data = down_RI[own]
        layer.lora_B[name].weight.data = up_RO[own].t()
        columns += [(member, float(layer.scaling[name]))] * rank
    return _Stack(columns=tuple(columns), down_RI=down_RI, up_RO=up_RO)
