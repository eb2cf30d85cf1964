"""Linear layers that get the same input (query, key and value; gate and up) as one product.

A decode step is bound by reading weights, and one large matrix is read faster than three small ones: 3 to 5% of a step
on a CPU. The layers' own weights become views of the large one, so nothing is held twice and everything else that
uses the model finds what it expects.

Shapes: T tokens, I input features, O output features of a layer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class _Group:
    weight_OI: Tensor
    bias_O: Tensor | None


@dataclass(eq=False)
class _Part:
    """One layer's outputs among those of its group."""

    group: _Group
    first: int
    last: int


class FusedLinears:
    """The plain linear layers of one model, fused where they can be. Outside of `active` each runs by itself."""

    def __init__(self, model: nn.Module, run_once: Callable[[], None]) -> None:
        """Fuse.

        Args:
            model: frozen.
            run_once: runs the model on anything, which shows which layers get the same input.
        """
        self._parts: dict[nn.Module, _Part] = {}
        self._done: tuple[_Group, Tensor] | None = None
        self._output = torch.empty(0)
        plain = [module for module in model.modules() if type(module) in (nn.Linear, FusedLinear) and _alone(module)]
        for layers in same_inputs(plain, run_once):
            if len(layers) > 1 and len({_kind(layer) for layer in layers}) == 1:
                self._parts.update(_fuse(layers))

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
        if self._done is None or self._done[0] is not part.group or self._done[1] is not x:
            self._done = part.group, x  # held, so that no other tensor can be taken for it
            self._output = nn.functional.linear(x, part.group.weight_OI, part.group.bias_O)
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


def _fuse(layers: Sequence[Any]) -> dict[nn.Module, _Part]:
    group = _Group(
        weight_OI=torch.cat([layer.weight.detach() for layer in layers]),
        bias_O=None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers]),
    )
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
