"""Many pairs in one row without padding, each prompt once: `[prompt | chosen | rejected] [prompt | chosen | …`.

Linear layers read the row as it is. Attention alone looks at where a pair begins: to `prompt | chosen` it is a
sequence, and to `rejected` the continuation of a sequence that begins with the prompt, as after a KV cache. So each
pair takes two calls of the attention that the model would have without us, with the masks that transformers makes for
such calls: windows, chunks, soft caps and sinks are the model's own.

Shapes: T positions of the row, H query heads, K key/value heads, D features of a head; P, C, R tokens of a prompt, a
chosen and a rejected response.
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

Lengths = Sequence[Sequence[int]]

_NAME = "genarm_packed_"
_row: ContextVar[Lengths | None] = ContextVar("genarm_packed_row", default=None)


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
    def reading(self, lengths: Lengths) -> Iterator[None]:
        """The forward inside reads a row of pairs with these [P, C, R]."""
        self.switch(True)
        token = _row.set(lengths)
        try:
            yield
        finally:
            _row.reset(token)


@dataclass(frozen=True)
class _PackedMask:
    """What attention layers get as their mask: [P, C, R] of the pairs, and for each pair the masks of its two calls."""

    lengths: Lengths
    masks: Sequence[tuple[Any, Any]]


def _mask(ordinary: str, **options: Any) -> Any:
    """In the place of transformers' function for masks."""
    make, lengths = ALL_MASK_ATTENTION_FUNCTIONS[ordinary], _row.get()
    if lengths is None:
        return make(**options)
    options |= {"batch_size": 1, "kv_offset": 0, "attention_mask": None}
    return _PackedMask(
        lengths,
        [
            (
                make(**{**options, "q_length": prompt + chosen, "kv_length": prompt + chosen, "q_offset": 0}),
                make(**{**options, "q_length": rejected, "kv_length": prompt + rejected, "q_offset": prompt}),
            )
            for prompt, chosen, rejected in lengths
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
    if not isinstance(attention_mask, _PackedMask):
        found: tuple[Tensor, Tensor | None] = attend(module, query, key, value, attention_mask, **options)
        return found
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return _attend_to_pairs(attend, module, (query, key, value), attention_mask, options), None
    # On CPUs attention's backward is ten times slower in bfloat16 than in float32.
    with torch.autocast("cpu", enabled=False):
        wide = (query.float(), key.float(), value.float())
        return _attend_to_pairs(attend, module, wide, attention_mask, options).to(query.dtype), None


def _attend_to_pairs(
    attend: Any, module: nn.Module, qkv: tuple[Tensor, Tensor, Tensor], packed: _PackedMask, options: dict[str, Any]
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


def _no_eager(module: nn.Module, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
    raise NotImplementedError(f"no eager attention beside {type(module).__name__}")
