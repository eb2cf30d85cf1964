"""Rows of tokens that a model has read, with its cache of them: what batched decoding goes on from.

A row is an unbroken run of tokens that ends at the right edge; left of it there is padding. Rows may be selected,
repeated, copied, replaced and taken back token by token, and stay unbroken whatever is done: keys carry their
positions, so a row's cache may be moved from one column to another.

Shapes: B rows, T columns.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from genarm.errors import UnsupportedError
from genarm.model.cache import GuidedCache
from genarm.model.config import GuidedConfig
from genarm.model.generation import last_positions

Ids: TypeAlias = Sequence[int]
Counter: TypeAlias = Callable[[int, int], None]
"""Called at each forward with the rows that it ran, and with the positions that it computed (without padding)."""


def uncounted(forwards: int, positions: int) -> None:
    """A `Counter` for work that is no method's."""


class Prefix:
    """What `model` has read, a row for each prompt; `extend` with the prompts comes first.

    Attributes:
        lengths: tokens of each row.
        options: further arguments of every forward.
    """

    def __init__(
        self, model: PreTrainedModel, *, count: Counter = uncounted, options: Mapping[str, Any] | None = None
    ) -> None:
        """Nothing is read yet.

        Args:
            model: a causal LM, a guided model, or the trunk of one.
            count: counts the forwards.
            options: further arguments of every forward.

        Raises:
            UnsupportedError: the model has no cache of keys and values.
        """
        self.model = model
        self.lengths: list[int] = []
        self._width = 0
        self._count = count
        self.options = dict(options or {})
        self._arguments = frozenset(inspect.signature(model.forward).parameters)
        if "past_key_values" not in self._arguments:
            raise UnsupportedError(f"{type(model).__name__} has no cache of keys and values, so it cannot go on")
        self._cache = _new_cache(model)
        self._pad_id = _pad_id(model)

    @torch.no_grad()
    def extend(self, chunks: Sequence[Ids], *, keep: int = 1) -> Any:
        """Read one more chunk of tokens in each row.

        The first chunks are padded on the left, later ones of different lengths on the right.

        Args:
            chunks: ids for each row; no chunk is empty.
            keep: how many last positions a causal LM computes logits for.

        Returns:
            The model's output.
        """
        sizes = [len(chunk) for chunk in chunks]
        assert all(sizes)
        first = self._width == 0
        before = [0] * len(sizes) if first else self.lengths
        self.lengths = [old + new for old, new in zip(before, sizes, strict=True)]
        longest = max(sizes)
        starts = [longest - size for size in sizes] if first else [self._width - old for old in before]
        output = self.model(**self._inputs(padded(chunks, self._pad_id, left=first), starts, keep))
        self._cache = output.past_key_values
        self._width += longest
        self._count(len(sizes), sum(sizes))
        if not first and min(sizes) < longest:
            self._move([start + length for start, length in zip(starts, self.lengths, strict=True)])
        return output

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order; a row may come several times."""
        if list(rows) == list(range(len(self.lengths))):
            return
        assert self._cache is not None
        self.lengths = [self.lengths[row] for row in rows]
        index = torch.tensor(rows, device=self.model.device)
        if not self._movable:
            self._cache.batch_select_indices(index)
            return
        # Columns that were padding for all but rows that have gone are dropped.
        first = self._width - max(self.lengths, default=self._width)
        self._change(lambda states: states[:, :, first:].index_select(0, index.to(states.device)))
        self._width -= first

    def fork(self, rows: Sequence[int]) -> Prefix:
        """These rows as a prefix of their own; this one stays as it is."""
        twin = copy.copy(self)
        twin._cache = _copy(self._cache)
        twin.select(rows)
        return twin

    def replace(self, rows: Sequence[int], other: Prefix) -> None:
        """Put the rows of `other` in the place of `rows`."""
        index = torch.tensor(rows, device=self.model.device)
        width = max(self._width, other._width)
        theirs = iter([states for layer in other._layers() for states in (layer.keys, layer.values)])

        def change(states: Tensor) -> Tensor:
            wide = F.pad(states, (0, 0, width - self._width, 0))
            new = F.pad(next(theirs), (0, 0, width - other._width, 0))
            return wide.index_copy(0, index.to(states.device), new)

        self._change(change)
        lengths = dict(zip(rows, other.lengths, strict=True))
        self.lengths = [lengths.get(row, length) for row, length in enumerate(self.lengths)]
        self._width = width

    def rewind(self, counts: Sequence[int]) -> None:
        """Forget this many last tokens of each row."""
        if any(counts):
            self.lengths = [length - count for length, count in zip(self.lengths, counts, strict=True)]
            self._move([self._width - count for count in counts])

    def _inputs(self, ids_BT: Tensor, starts: Sequence[int], keep: int) -> dict[str, Any]:
        """Arguments of a forward; `starts` are the columns where the rows begin."""
        columns_T = torch.arange(self._width + ids_BT.shape[1])
        starts_B1, lengths_B1 = torch.tensor(starts)[:, None], torch.tensor(self.lengths)[:, None]
        places_BT = columns_T - starts_B1
        inputs: dict[str, Any] = {
            "input_ids": ids_BT,
            "attention_mask": ((places_BT >= 0) & (places_BT < lengths_B1)).long(),
            "position_ids": places_BT[:, self._width :].clamp(min=0).minimum(lengths_B1 - 1),
        }
        arguments = {name: value.to(self.model.device) for name, value in inputs.items() if name in self._arguments}
        if "logits_to_keep" in self._arguments:
            arguments["logits_to_keep"] = last_positions(keep, ids_BT)
        return {**arguments, **self.options, "past_key_values": self._cache, "use_cache": True, "return_dict": True}

    def _move(self, ends: Sequence[int]) -> None:
        """Make rows that end before the columns `ends` end at the right edge, and drop columns that no row needs."""
        width = max(self.lengths)
        index_BT = (torch.tensor(ends)[:, None] - width + torch.arange(width)).clamp(min=0).to(self.model.device)

        def change(states: Tensor) -> Tensor:
            _, heads, _, size = states.shape
            return states.gather(2, index_BT[:, None, :, None].to(states.device).expand(-1, heads, -1, size))

        self._change(change)
        self._width = width

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put `change` of the keys, then of the values, of each layer in their place."""
        for layer in self._layers():
            layer.keys, layer.values = change(layer.keys), change(layer.values)

    @property
    def _movable(self) -> bool:
        if self._cache is None or getattr(self._cache, "extra", None):  # columns of a wish are not those of others
            return False
        return all(type(layer) is DynamicLayer for layer in self._cache.layers)

    def _layers(self) -> list[Any]:
        """The layers of the cache, each with keys and values [B, heads, T, size]."""
        assert self._movable
        assert self._cache is not None
        return list(self._cache.layers)


def next_logits(prefix: Prefix, chunks: Sequence[Ids]) -> Tensor:
    """Float32 logits [B, V] of the token after `chunks`, which `prefix` (of a causal LM) reads."""
    logits: Tensor = prefix.extend(chunks).logits
    return logits[:, -1].float()


def padded(chunks: Sequence[Ids], pad_id: int, *, left: bool) -> Tensor:
    """Ids [B, T] of chunks of different lengths."""
    longest = max(map(len, chunks))
    ids: list[int] = []
    for chunk in chunks:
        fill = (pad_id,) * (longest - len(chunk))
        ids.extend((*fill, *chunk) if left else (*chunk, *fill))
    return torch.tensor(ids).view(-1, longest)


def batches(lengths: Sequence[int], *, tokens: int) -> Iterator[list[int]]:
    """Indices of rows that are run together: of like length, and about `tokens` with padding at the most."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, tokens // lengths[order[0]])
        yield order[:size]
        order = order[size:]


def require_movable(models: Sequence[PreTrainedModel], method: str) -> None:
    """Refuse models whose cache tokens cannot be taken back from (raises UnsupportedError)."""
    for model in models:
        if _new_cache(model) is None:
            raise UnsupportedError(
                f"{method} takes tokens back, which the cache of {type(model).__name__} cannot; use a plain model "
                "with attention layers alone"
            )


def _new_cache(model: PreTrainedModel) -> Cache | None:
    """A cache whose rows can be moved, where there is one for the model; None: the model makes its own.

    Layers with a sliding window get a whole cache too, as what has left a window could not come back.
    """
    if isinstance(model.config, GuidedConfig):
        return None
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    return DynamicCache() if kinds <= {DynamicLayer, DynamicSlidingWindowLayer} else None


def _copy(cache: Cache | None) -> Any:
    """A cache that grows on its own; tensors are shared until then, as no layer is written in place."""
    if isinstance(cache, GuidedCache):
        return GuidedCache({name: _copy(member) for name, member in cache.members.items()}, cache.extra)
    twin = copy.copy(cache)
    if twin is not None:
        twin.layers = [copy.copy(layer) for layer in twin.layers]
    return twin


def _pad_id(model: PreTrainedModel) -> int:
    """An id to fill up with; a reward model's own padding where it has one."""
    found = getattr(model.config.get_text_config(), "pad_token_id", None)
    return found if found is not None and found >= 0 else 0
