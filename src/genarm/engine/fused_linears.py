"""Linear layers that get the same input (query, key and value; gate and up) as one product.

A decode step is bound by reading weights, and one large matrix is read faster than three small ones: 3 to 5% of a step
on a CPU. The layers' own weights become views of the large one, so nothing is held twice and everything else that
uses the model finds what it expects. Adapters' first matrices ride along as more rows: on a GPU, where a product this
small costs its launch, they are then free.

Shapes: T tokens, I input features, O output features of a layer or of all that are fused, R rows that ride along.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_EVEN = 8
"""Rows are filled up to a multiple of this, which matrix units and their loads ask for."""


class Rider(Protocol):
    """Rows that want the same input as some layers."""

    @property
    def layers(self) -> Sequence[nn.Module]:
        """Whose outputs are changed."""

    @property
    def rows_RI(self) -> Tensor:
        """What is multiplied by the layers' input."""

    def board(self, rows_RI: Tensor, layers: Sequence[nn.Module]) -> None:
        """Use these rows from now on, which are the same; told is also which layers the product serves, in order."""

    def finish(self, output_TO: Tensor, low_TR: Tensor) -> None:
        """Change the fresh outputs of those layers by the rows' product, in place."""


@dataclass(eq=False)
class _Group:
    weight_OI: Tensor
    bias_O: Tensor | None
    rider: Rider | None
    size: int
    """Outputs of the layers; then come the rider's."""


@dataclass(eq=False)
class _Part:
    """One layer's outputs among those of its group."""

    group: _Group
    first: int
    last: int


class FusedLinears:
    """The plain linear layers of one model, fused where they can be. Outside of `active` each runs by itself."""

    def __init__(self, model: nn.Module, run_once: Callable[[], None], riders: Sequence[Rider] = ()) -> None:
        """Fuse.

        Args:
            model: frozen.
            run_once: runs the model on anything, which shows which layers get the same input.
            riders: to take along where their layers are fused or can be.
        """
        self._parts: dict[nn.Module, _Part] = {}
        self._done: tuple[_Group, Tensor] | None = None
        self._output = torch.empty(0)
        plain = [module for module in model.modules() if type(module) in (nn.Linear, FusedLinear) and _alone(module)]
        for layers in same_inputs(plain, run_once):
            if len({_kind(layer) for layer in layers}) == 1:
                rider = next((rider for rider in riders if _fits(rider, layers)), None)
                if len(layers) > 1 or rider is not None:
                    self._parts.update(_fuse(layers, rider))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Fused layers compute together, in this thread."""
        _current.fused = self
        try:
            yield
        finally:
            _current.fused = self._done = None

    def output(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """What `layer` makes of `x`; None where it is not fused."""
        part = self._parts.get(layer)
        if part is None:
            return None
        # Two groups may read one tensor: attention and MLP do, where they run side by side.
        group = part.group
        if self._done is None or self._done[0] is not group or self._done[1] is not x:
            self._done = group, x  # held, so that no other tensor can be taken for it
            self._output = nn.functional.linear(x, group.weight_OI, group.bias_O)
            if group.rider is not None:
                flat = self._output.view(-1, self._output.shape[-1])
                group.rider.finish(flat[:, : group.size], flat[:, group.size :])
        return self._output[..., part.first : part.last]


_current = threading.local()


class FusedLinear(nn.Linear):
    """A linear layer that may be part of a larger one."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`."""
        fused: FusedLinears | None = getattr(_current, "fused", None)
        output = None if fused is None else fused.output(self, x)
        return super().forward(x) if output is None else output


def same_inputs(layers: Sequence[nn.Module], run_once: Callable[[], None]) -> list[list[Any]]:
    """`layers` in the order in which they run, those that get the very same input one after the other together.

    Layers that did not run (experts that no token went to) come last, each by itself.
    """
    groups: list[list[Any]] = []
    last: list[tuple[Tensor, Tensor]] = []
    waiting = dict.fromkeys(layers)

    def note(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if layer not in waiting:
            return
        del waiting[layer]
        x = arguments[0]
        # The same tensor may have been changed in between.
        if last and x is last[0][0] and torch.equal(x, last[0][1]):
            groups[-1].append(layer)
        else:
            groups.append([layer])
            last[:] = [(x, x.clone())]

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        run_once()
    finally:
        for hook in hooks:
            hook.remove()
    return [*groups, *([layer] for layer in waiting)]


def _alone(layer: nn.Module) -> bool:
    """Whether nobody else has a hand in the layer: no hook that moves weights, no other layer with the same weight."""
    return not (hasattr(layer, "_hf_hook") or layer._forward_hooks or layer._forward_pre_hooks)


def _kind(layer: Any) -> tuple[Any, ...]:
    return layer.weight.dtype, layer.weight.device, layer.bias is None, layer.in_features


def _fits(rider: Rider, layers: Sequence[Any]) -> bool:
    weight = layers[0].weight
    same = (rider.rows_RI.dtype, rider.rows_RI.device) == (weight.dtype, weight.device)
    return same and {*rider.layers} <= {*layers}


def _fuse(layers: Sequence[Any], rider: Rider | None) -> dict[nn.Module, _Part]:
    weights = [layer.weight.detach() for layer in layers]
    biases = [] if layers[0].bias is None else [layer.bias.detach() for layer in layers]
    size = sum(map(len, weights))
    if rider is not None:
        rows = len(rider.rows_RI)
        weights += [rider.rows_RI, rider.rows_RI.new_zeros(-rows % _EVEN, rider.rows_RI.shape[1])]
        if biases:
            biases.append(biases[0].new_zeros(rows + -rows % _EVEN))
    group = _Group(weight_OI=torch.cat(weights), bias_O=torch.cat(biases) if biases else None, rider=rider, size=size)
    if rider is not None:
        rider.board(group.weight_OI[size : size + rows], layers)
    parts: dict[nn.Module, _Part] = {}
    first = 0
    for layer in layers:
        last = first + layer.out_features
        layer.weight.data = group.weight_OI[first:last]
        if group.bias_O is not None:
            layer.bias.data = group.bias_O[first:last]
        layer.__class__ = FusedLinear
        parts[layer] = _Part(group=group, first=first, last=last)
        first = last
    return parts
