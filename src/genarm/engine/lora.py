"""LoRA adapters that share one read of their model's weights.

All adapters of a layer are stacked into two matrices. A pass multiplies all its tokens by the first, keeps for each
token the columns of its own adapter (none, for the model itself) and multiplies by the second: two small products,
however many adapters there are. Layers with the same input share the first. On a GPU both are in the model's dtype
(bf16 enters here), as for any other layer; on a CPU in float32, where products this small take half the time. Where
the dtype is the model's own, the first matrix rides along in the layers' product and the second ones are one.

Shapes: T tokens, R columns (the ranks of all adapters together), I and O a layer's in- and output features.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from genarm.engine.fused_linears import FusedLinear, Rider, same_inputs
from genarm.model.adapters import adapter_layers

_Column = tuple[int, float]
"""One rank of one adapter: the member that it belongs to, and the adapter's scaling."""


def can_share(model: nn.Module, adapters: Sequence[str]) -> bool:
    """Whether all of `adapters` are plain low-rank sums on linear layers (no DoRA, embeddings, biases or experts)."""
    for layer in adapter_layers(model):
        if not isinstance(layer, LoraLayer):
            return False
        for name in adapters:
            if name in layer.lora_embedding_A or name in layer.lora_variant or layer.lora_bias.get(name):
                return False
            if name in layer.lora_A and not isinstance(layer.lora_A[name], nn.Linear):
                return False
            if hasattr(layer, "parameter_name"):  # peft's wrapper of a parameter, such as that of all experts
                return False
        if layer.merged:
            return False
    return True


@dataclass(eq=False)
class _Group:
    """Layers that get the same input (query, key and value, say): one product serves them all. A `Rider`.

    Attributes:
        layers: what the adapters are added to, as the model's author made it.
        rows_RI: the adapters' first matrices.
        stacks: of each layer.
        scaling: of all columns, or of each [R] where adapters differ in it.
        foreign_TR: for each token of a pass, the columns that are not its own; None outside of one.
        up_RO: all layers' second matrices as one, with zeros where a column is another layer's; where the rows ride.
    """

    layers: list[nn.Module] = field(default_factory=list)
    rows_RI: Tensor = field(default_factory=lambda: torch.empty(0))
    stacks: dict[nn.Module, _Stack] = field(default_factory=dict)
    columns: list[_Column] = field(default_factory=list)
    scaling: float | Tensor = 1.0
    foreign_TR: Tensor | None = None
    up_RO: Tensor | None = None

    def board(self, rows_RI: Tensor, layers: Sequence[nn.Module]) -> None:
        """See `Rider`."""
        self.rows_RI = rows_RI
        sizes = [int(layer.out_features) for layer in layers]  # type: ignore[arg-type]
        self.up_RO = rows_RI.new_zeros(len(rows_RI), sum(sizes))
        for base, stack in zip(self.layers, self.stacks.values(), strict=True):
            place = list(layers).index(base)
            start, size = sum(sizes[:place]), sizes[place]
            stack.up_RO = self.up_RO[stack.first : stack.last, start : start + size].copy_(stack.up_RO)
        for layer, stack in self.stacks.items():
            _make_views(layer, stack)

    def finish(self, output_TO: Tensor, low_TR: Tensor) -> None:
        """See `Rider`."""
        if self.foreign_TR is not None and self.up_RO is not None:  # in a pass with adapters
            # In place: the outputs are fresh, nobody else holds them.
            own_TR = self.own(low_TR[:, : len(self.columns)], self.foreign_TR)
            output_TO.addmm_(own_TR, self.up_RO, alpha=self.factor)

    def own(self, low_TR: Tensor, foreign_TR: Tensor) -> Tensor:
        """`low_TR` with nothing but each token's own columns, in place."""
        # Filled, not multiplied by 0: another's columns may overflow for this token, and inf · 0 is NaN.
        low_TR.masked_fill_(foreign_TR, 0.0)
        return low_TR.mul_(self.scaling) if isinstance(self.scaling, Tensor) else low_TR

    @property
    def factor(self) -> float:
        """What is left to multiply by."""
        return 1.0 if isinstance(self.scaling, Tensor) else self.scaling


@dataclass(eq=False)
class _Stack:
    """The adapters of one layer: its columns of the group's product, and the matrix that they are multiplied by.

    `adapters` has the name and the rank of each.
    """

    group: _Group
    first: int
    last: int
    up_RO: Tensor
    adapters: Sequence[tuple[str, int]]


class SharedAdapters:
    """The adapters of one model, ready to run side by side. Outside of `masked` the model runs as before."""

    def __init__(
        self, model: nn.Module, adapters: Sequence[str | None], dtype: torch.dtype, run_once: Callable[[], None]
    ) -> None:
        """Stack the adapters; peft's own parameters become views of the stacks, so nothing is held twice.

        Args:
            model: carries them.
            adapters: of each member of the trunk, by index; None for the model itself.
            dtype: of the stacks.
            run_once: runs the model on anything, which shows which layers get the same input.
        """
        layers: list[Any] = [*adapter_layers(model)]
        self._stacks: dict[nn.Module, _Stack] = {}
        for alike in same_inputs([layer for layer in layers if _members_of(layer, adapters)], run_once):
            self._stacks.update(_stack(alike, adapters, dtype))
        self._groups = list({id(stack.group): stack.group for stack in self._stacks.values()}.values())
        self._tables: dict[tuple[Any, ...], Tensor] = {}
        self._table_of: list[Tensor] = []
        for group in self._groups:
            key = (group.rows_RI.device, *group.columns)
            if key not in self._tables:
                self._tables[key] = _foreign(group.columns, len(adapters)).to(group.rows_RI.device)
            self._table_of.append(self._tables[key])
        self._done: tuple[_Group, Tensor] | None = None
        self._low_TR = torch.empty(0)

    @property
    def riders(self) -> Sequence[Rider]:
        """What can go along in the products of the layers themselves."""
        return self._groups

    @contextmanager
    def masked(self, adapters_T: Tensor) -> Iterator[None]:
        """Run tokens each with the adapter of its member, in this thread."""
        masks = {id(t): t.index_select(0, adapters_T.to(t.device)) for t in self._tables.values()}
        for group, table in zip(self._groups, self._table_of, strict=True):
            group.foreign_TR = masks[id(table)]
        _current.adapters = self
        try:
            yield
        finally:
            _current.adapters = self._done = None
            for group in self._groups:
                group.foreign_TR = None

    def add(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """`output` of the layer's base for `x`, plus the low-rank parts."""
        stack = self._stacks.get(layer)
        if stack is None:  # it carries adapters of another engine only
            return output
        group = stack.group
        if group.up_RO is not None or group.foreign_TR is None:  # `finish` has added it
            return output
        if self._done is None or self._done[0] is not group or self._done[1] is not x:  # see FusedLinears.output
            self._done = group, x  # held, so that no other tensor can be taken for it
            self._low_TR = group.own(_product(x, group.rows_RI), group.foreign_TR)
        # In place: the layer's output is fresh, nobody else holds it. [T, O] fits [1, T, O].
        return output.add_(self._low_TR[:, stack.first : stack.last] @ stack.up_RO, alpha=group.factor)


def _product(x: Tensor, rows_RI: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(rows_RI.dtype) @ rows_RI.t()


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
        base = layer._modules["base_layer"]  # nn.Module's lookup and call cost as much as the adapters' products
        return adapters.add(layer, x, base.forward(x) if type(base) is FusedLinear else base(x))


def _foreign(columns: Sequence[_Column], members: int) -> Tensor:
    """Bool [members, R]: the columns that are not a member's own."""
    owners_R = torch.tensor([member for member, _ in columns])
    return torch.arange(members)[:, None] != owners_R


def _scaling(columns: Sequence[_Column], like: Tensor) -> float | Tensor:
    """One number for all columns, as nearly always; else one for each, on the device and in the dtype of `like`."""
    scalings = [scaling for _, scaling in columns]
    return scalings[0] if len(set(scalings)) == 1 else torch.tensor(scalings).to(like)


def _members_of(layer: Any, adapters: Sequence[str | None]) -> list[tuple[int, str]]:
    """The members that have an adapter on a layer, by index and name."""
    return [(member, name) for member, name in enumerate(adapters) if name is not None and name in layer.lora_A]


def _stack(layers: Sequence[Any], adapters: Sequence[str | None], dtype: torch.dtype) -> dict[nn.Module, _Stack]:
    """Stack the adapters of layers with the same input, and let their forwards use them."""
    group = _Group()
    parts: list[Tensor] = []
    for layer in layers:
        first = len(group.columns)
        here = _members_of(layer, adapters)
        for member, name in here:
            parts.append(layer.lora_A[name].weight.detach().to(dtype))
            group.columns += [(member, float(layer.scaling[name]))] * len(parts[-1])
        up_RO = torch.cat([layer.lora_B[name].weight.detach().to(dtype).t() for _, name in here]).contiguous()
        ranks = [(name, int(layer.lora_A[name].weight.shape[0])) for _, name in here]
        group.stacks[layer] = _Stack(group=group, first=first, last=len(group.columns), up_RO=up_RO, adapters=ranks)
        group.layers.append(layer.get_base_layer())
        kind: Any = type(layer)
        layer.__class__ = _sharing(kind)
    group.rows_RI = torch.cat(parts)
    group.scaling = _scaling(group.columns, group.rows_RI)
    parts.clear()
    for layer, stack in group.stacks.items():
        _make_views(layer, stack)
    return group.stacks


def _make_views(layer: Any, stack: _Stack) -> None:
    start = 0
    for name, rank in stack.adapters:
        end = start + rank
        layer.lora_A[name].weight.data = stack.group.rows_RI[stack.first + start : stack.first + end]
        layer.lora_B[name].weight.data = stack.up_RO[start:end].t()
        start = end
