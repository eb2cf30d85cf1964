"""Many pairs in one row without padding, each prompt once: `[prompt | chosen | rejected] [prompt | chosen | …`.

Linear layers read the row as it is. Attention alone looks at where a pair begins, and it is the attention that the
model would have without us, with the masks that transformers makes: windows, chunks, soft caps and sinks are the
model's own. On a CPU each pair takes two calls, so that nothing is computed for padding: `prompt | chosen` is a
sequence, and `rejected` the continuation of one that begins with the prompt, as after a KV cache. Elsewhere launches
cost more than padding, and sequences of about one length take one call together.

Shapes: T positions of the row, H query heads, K key/value heads, D features of a head; P, C, R tokens of a prompt, a
chosen and a rejected response; G sequences of W tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from genarm.training.rows import Lengths, SideBySide, side_by_side

_NAME = "genarm_packed_"
_row: ContextVar[Lengths | SideBySide | None] = ContextVar("genarm_packed_row", default=None)


class Packing:
    """Teaches a model's attention to read packed rows; other inputs are read as ever."""

    def __init__(self, model: nn.Module) -> None:
        models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        configs = {id(module.config): module.config for module in models}.values()
        self._ordinary = [
            (config, config._attn_implementation.removeprefix(_NAME))
            for config in configs
            if config._attn_implementation is not None
        ]
        for _, name in self._ordinary:
            AttentionInterface.register(_NAME + name, partial(_attention, name))
            AttentionMaskInterface.register(_NAME + name, partial(_mask, name))

    def switch(self, on: bool) -> None:
        """On for forwards of packed rows and their backwards, which may run layers again."""
        for config, name in self._ordinary:
            config._attn_implementation = _NAME + name if on else name

    @contextmanager
    def reading(self, lengths: Lengths, device: torch.device) -> Iterator[None]:
        """The forward inside, on `device`, reads a row of pairs with these [P, C, R]."""
        self.switch(True)
        token = _row.set(lengths if _pair_by_pair(device) else side_by_side(lengths, device))
        try:
            yield
        finally:
            _row.reset(token)


def _pair_by_pair(device: torch.device) -> bool:
    return device.type == "cpu"


@dataclass(frozen=True)
class _Pairs:
    """What attention layers get as their mask: [P, C, R] of the pairs, and for each pair the masks of its two calls."""

    lengths: Lengths
    masks: Sequence[tuple[Any, Any]]


@dataclass(frozen=True)
class _Groups:
    """The same for sequences side by side: the mask of each group's call."""

    rows: SideBySide
    masks: Sequence[Any]


def _mask(ordinary: str, **options: Any) -> Any:
    """In the place of transformers' function for masks."""
    make, row = ALL_MASK_ATTENTION_FUNCTIONS[ordinary], _row.get()
    if row is None:
        return make(**options)
    options |= {"batch_size": 1, "q_offset": 0, "kv_offset": 0, "attention_mask": None}
    if isinstance(row, SideBySide):  # what stands after a sequence is behind each of its tokens, where none looks
        widths = [places_GW.shape[1] for places_GW in row.groups]
        return _Groups(row, [make(**{**options, "q_length": width, "kv_length": width}) for width in widths])
    return _Pairs(
        row,
        [
            (
                make(**{**options, "q_length": prompt + chosen, "kv_length": prompt + chosen}),
                make(**{**options, "q_length": rejected, "kv_length": prompt + rejected, "q_offset": prompt}),
            )
            for prompt, chosen, rejected in row
        ],
    )


def _attention(
    ordinary: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """In the place of the model's attention: query [1, H, T, D], key and value [1, K, T, D] to [1, T, H, D]."""
    home = sys.modules[type(module).__module__]
    interface = getattr(home, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    attend = interface.get_interface(ordinary, getattr(home, "eager_attention_forward", _no_eager))
    if isinstance(attention_mask, _Groups):
        return _attend_to_groups(attend, module, (query, key, value), attention_mask, options), None
    if not isinstance(attention_mask, _Pairs):
        found: tuple[Tensor, Tensor | None] = attend(module, query, key, value, attention_mask, **options)
        return found
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return _attend_to_pairs(attend, module, (query, key, value), attention_mask, options), None
    # On CPUs attention's backward is ten times slower in bfloat16 than in float32.
    with torch.autocast("cpu", enabled=False):
        wide = (query.float(), key.float(), value.float())
        return _attend_to_pairs(attend, module, wide, attention_mask, options).to(query.dtype), None


def _attend_to_pairs(
    attend: Any, module: nn.Module, qkv: tuple[Tensor, Tensor, Tensor], packed: _Pairs, options: dict[str, Any]
) -> Tensor:
    """Two calls for each pair, [1, T, H, D]."""
    sizes = [size for prompt, chosen, rejected in packed.lengths for size in (prompt + chosen, rejected)]
    parts = zip(*(iter(tensor.split(sizes, dim=2)) for tensor in qkv), strict=True)
    outputs = []
    for (prompt, _, _), (mask, continued) in zip(packed.lengths, packed.masks, strict=True):
        (whole, keys, values), (rest, *more) = next(parts), next(parts)
        outputs.append(attend(module, whole, keys, values, mask, **options)[0])
        joined = [torch.cat([a[:, :, :prompt], b], dim=2) for a, b in zip((keys, values), more, strict=True)]
        outputs.append(attend(module, rest, *joined, continued, **options)[0])
    return torch.cat(outputs, dim=1)


def _attend_to_groups(
    attend: Any, module: nn.Module, qkv: tuple[Tensor, Tensor, Tensor], packed: _Groups, options: dict[str, Any]
) -> Tensor:
    """A call for each group, [1, T, H, D]."""
    outputs, device = [], qkv[0].device  # of this layer, where a model is spread over several
    for places_GW, mask in zip(packed.rows.groups, packed.masks, strict=True):
        places_GW, mask = places_GW.to(device), mask if mask is None else mask.to(device)
        rows = [tensor[0].transpose(0, 1).index_select(0, places_GW.flatten()) for tensor in qkv]
        parts = [row.unflatten(0, places_GW.shape).transpose(1, 2) for row in rows]  # [G, H or K, W, D]
        if options.get("position_ids") is not None:  # by those of the whole row, flash attention would cut the group
            positions_W = torch.arange(places_GW.shape[1], device=places_GW.device)
            options = {**options, "position_ids": positions_W.expand_as(places_GW)}
        outputs.append(attend(module, *parts, mask, **options)[0].flatten(0, 1))
    return torch.cat(outputs).index_select(0, packed.rows.back_T.to(device))[None]


def _no_eager(module: nn.Module, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
    raise NotImplementedError(f"no eager attention beside {type(module).__name__}")
