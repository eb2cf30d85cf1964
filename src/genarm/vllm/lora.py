"""LoRA adapters on vLLM's layers: several at once, each for its own member's rows.

vLLM fuses projections that read the same input (query, key and value; gate and up) and splits layers over ranks; a
checkpoint does neither. So an adapter's up-projection is given to vLLM's own loader of the layer's weight, as if it
were one, and its down-projections are stacked.

Shapes: N tokens of a step, S members, rows [N·S] token by token; I inputs and O outputs of a layer on this rank, r the
ranks of a member's parts on it together, R those of all members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.models.utils import PPMissingLayer

from genarm.model.adapter_files import AdapterFiles, LowRank, low_rank_parts, read_adapter
from genarm.model.config import MemberSpec
from genarm.model.loading import HubOptions, load_model_config
from genarm.vllm.config import INTERLEAVED, cannot_carry

if TYPE_CHECKING:
    from genarm.vllm.config import MemberStream, TrunkSpec


def add_adapters(model: nn.Module, trunk: TrunkSpec) -> None:
    """Put the adapters of `trunk` on the layers of `model`; stream i is the i-th row of each token.

    Raises:
        MemberError: an adapter is not there, is not a plain LoRA, or does not fit.
    """
    places: dict[str, dict[int, list[_Part]]] = {}
    for index, stream in enumerate(trunk.streams):
        if stream.adapter is not None:
            for layer, part in _read(model, stream, trunk):
                places.setdefault(layer, {}).setdefault(index, []).append(part)
    modules = dict(model.named_modules())
    for name, parts in places.items():
        _attach(modules[name], parts, len(trunk.streams))


class _Part:
    """One module's adapter: `down` [r, inputs], `up` [outputs, r] with the scale in it, and where it goes."""

    def __init__(self, down: Tensor, up: Tensor, shard: str | int | None) -> None:
        self.down = down
        self.up = up
        self.shard = shard


def read_parts(stream: MemberStream, trunk: TrunkSpec) -> tuple[AdapterFiles, dict[str, LowRank]]:
    """A member's adapter, and what it adds to each layer, by the checkpoint's names (raises MemberError)."""
    assert stream.adapter is not None
    files = read_adapter(stream.adapter, {"revision": stream.adapter_revision}, name=stream.name)
    spec = MemberSpec(model=trunk.model, revision=trunk.revision)
    return files, low_rank_parts(load_model_config(spec, None, HubOptions(), name=trunk.name), files)


def _read(model: nn.Module, stream: MemberStream, trunk: TrunkSpec) -> list[tuple[str, _Part]]:
    files, found = read_parts(stream, trunk)
    modules = dict(model.named_modules())
    parts = []
    for name, low_rank in found.items():
        place = _place(modules, getattr(model, "packed_modules_mapping", {}), name)
        if place is None and _is_elsewhere(modules, name):
            continue  # on another stage of the pipeline
        if place is None:
            raise cannot_carry(files.label, name, trunk)
        layer, shard = place
        parts.append((layer, _Part(low_rank.down, low_rank.up * low_rank.scale, shard)))
    return parts


def _place(
    modules: Mapping[str, nn.Module], packed: Mapping[str, Sequence[str]], name: str
) -> tuple[str, str | int | None] | None:
    """vLLM's layer for a module of the checkpoint, and which part of it if it holds several."""
    parent, _, last = name.rpartition(".")
    if isinstance(modules.get(name), LinearBase):
        return None if last in INTERLEAVED else (name, None)
    for fused, members in packed.items():
        layer = modules.get(f"{parent}.{fused}" if parent else fused)
        if last in members and isinstance(layer, LinearBase):
            at = list(members).index(last)
            return f"{parent}.{fused}", "qkv"[at] if isinstance(layer, QKVParallelLinear) else at
    return None


def _is_elsewhere(modules: Mapping[str, nn.Module], name: str) -> bool:
    steps = name.split(".")
    return any(isinstance(modules.get(".".join(steps[:i])), PPMissingLayer) for i in range(1, len(steps) + 1))


# --- a layer with adapters --------------------------------------------------------------------------------------------


def _attach(layer: Any, parts: Mapping[int, list[_Part]], copies: int) -> None:
    like = next(layer.parameters())
    # On CPUs small products are several times faster in float32 than in bfloat16.
    dtype = torch.float32 if like.device.type == "cpu" else torch.get_default_dtype()
    shards = {index: _shards(layer, own) for index, own in sorted(parts.items())}
    first = min(shards)
    downs, ups = zip(*shards.values(), strict=True)
    buffers = {"lora_down": torch.cat(downs, dim=1), "lora_up": torch.cat(ups)}
    if copies - first > 1:
        buffers["lora_own"] = _own_columns(
            {index - first: down.shape[1] for index, (down, _) in shards.items()}, copies - first
        )
    for name, tensor in buffers.items():
        layer.register_buffer(name, tensor.to(like.device, dtype), persistent=False)
    layer.lora_first = first
    layer.lora_copies = copies
    layer.lora_sums = isinstance(layer, RowParallelLinear) and layer.reduce_results and layer.tp_size > 1
    if layer.lora_sums:
        layer.reduce_results = False  # the low-rank part is partial too: both are summed together
    kind: Any = type(layer)
    layer.__class__ = _adding(kind)


def _own_columns(ranks: Mapping[int, int], members: int) -> Tensor:
    """[members, R], 1 where a column of `lora_down` is a member's own, else 0."""
    own = torch.zeros(members, sum(ranks.values()))
    start = 0
    for member, rank in ranks.items():
        own[member, start : start + rank] = 1
        start += rank
    return own


def _shards(layer: Any, parts: list[_Part]) -> tuple[Tensor, Tensor]:
    """`down` [I, r] and `up` [r, O] of this rank, with the parts of a fused layer in blocks of r."""
    ranks = [part.down.shape[0] for part in parts]
    down = torch.cat([part.down for part in parts])
    if isinstance(layer, RowParallelLinear):
        share = _parameter((down.shape[0], layer.input_size_per_partition), down.dtype, input_dim=1)
        layer.weight_loader(share, down)
        return share.data.t().contiguous(), parts[0].up.t().contiguous()
    outputs = getattr(layer, "output_size_per_partition", layer.output_size)
    up = _parameter((outputs, sum(ranks)), parts[0].up.dtype, output_dim=0)
    start = 0
    for part, rank in zip(parts, ranks, strict=True):
        padded = part.up.new_zeros(part.up.shape[0], sum(ranks))
        padded[:, start : start + rank] = part.up
        start += rank
        fused = isinstance(layer, MergedColumnParallelLinear | QKVParallelLinear)
        arguments = (part.shard,) if fused else ()
        layer.weight_loader(up, padded, *arguments)
    return down.t().contiguous(), up.data.t().contiguous()


def _parameter(shape: tuple[int, int], dtype: torch.dtype, **attributes: int) -> nn.Parameter:
    """Something that vLLM's loaders take for a weight."""
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype, device="cpu"), requires_grad=False)
    for name, value in attributes.items():
        setattr(parameter, name, value)
    return parameter


@cache
def _adding(kind: type[nn.Module]) -> type[nn.Module]:
    """A linear layer's class that adds each member's low-rank part to its rows."""
    return type(kind.__name__, (_Adding, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


class _Adding:
    """Mixed in before a class of linear layers.

    The rows of all members from the first with an adapter on go through all adapters in two products, and what is not
    a member's own is struck out between them: more arithmetic than a product per member, and far fewer calls. Nothing
    is written in place, of which compilers make loops that are not vectorised.
    """

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Any:
        layer: Any = self
        result = super().forward(x, *args, **options)  # type: ignore[misc]
        output, bias = result if isinstance(result, tuple) else (result, None)
        first, members = layer.lora_first, layer.lora_copies - layer.lora_first
        inputs_NSI = x.unflatten(0, (-1, layer.lora_copies))[:, first:]
        low = inputs_NSI.flatten(0, 1).to(layer.lora_down.dtype) @ layer.lora_down
        if members > 1:
            low = (low.unflatten(0, (-1, members)) * layer.lora_own).flatten(0, 1)
        added_NSO = (low @ layer.lora_up).unflatten(0, (-1, members))
        added_NSO = functional.pad(added_NSO, (0, 0, first, 0))  # nothing for the members before
        output = (output + added_NSO.flatten(0, 1)).to(output.dtype)
        if layer.lora_sums:
            output = tensor_model_parallel_all_reduce(output)
        return (output, bias) if isinstance(result, tuple) else output
