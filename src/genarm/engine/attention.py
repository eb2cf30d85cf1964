"""Attention over a KV cache's rows, plugged into transformers' models through its attention interface.

A pass runs the new tokens of many rows through a model as one sequence [1, T]: the linear layers see all tokens at
once and nothing is padded for them. Attention alone knows which token belongs to which row. It stores the new keys
and values, then handles *short* feeds (a decoded token, a few drafted ones) as one batch over the cache's active
rows, and each *long* feed (a chunk of a prompt) by itself.

Shapes: T tokens of the pass, N active rows, Q queries per row (the longest short feed), S positions attended to,
R rows of the KV cache, H query heads, K key/value heads, G = H / K query heads per key/value head, C positions of a
row, D features of a head.
"""

from __future__ import annotations

import threading
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from genarm.engine.kv_cache import KVCache, Row

IMPLEMENTATION = "genarm_engine"
SHORT = 16
"""Longest feed that joins the batch of decoding rows."""

_MaskKey = tuple[int, torch.device, torch.dtype, int | None, int]


class Attends(Protocol):
    """What a pass does at each attention layer."""

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Outputs [1, T, H, D] for query [1, H, T, D] and key, value [1, K, T, D]."""


@dataclass(frozen=True)
class Feed:
    """New tokens of one row; logits are wanted after the last `want` of them."""

    row: Row
    ids: Sequence[int]
    want: int


@dataclass
class Chunk:
    """A long feed's place: tokens `first` to `last` of the pass, at positions from `start` of row `row`."""

    row: int
    first: int
    last: int
    start: int


@dataclass
class Batch:
    """The short feeds: where each of their tokens sits in a table [N, Q].

    Attributes:
        tokens: how many tokens of the pass they are; they come first.
        rows: N.
        queries: Q.
        span: S, one more than the largest position.
        positions_NQ: of each query; 0 where the table has no token.
        cells_T: flat place in the table of each token; None where tokens fill the table in order.
        alone: a single query that sees all S positions, so that no mask is needed.
    """

    tokens: int
    rows: int
    queries: int
    span: int
    positions_NQ: Tensor
    cells_T: Tensor | None
    alone: bool = False


@dataclass(frozen=True)
class _Options:
    """What a layer says of its scores."""

    scale: float | None
    window: int | None
    softcap: float | None


@dataclass
class Pass:
    """One forward of a trunk over its KV cache: its inputs as tensors, and the attention that goes with them.

    Attributes:
        ids_T, positions_T: what to run.
        rows_T: the row of each token.
        outputs_W: tokens after which logits are wanted, in the order of the feeds.
        adapters_T: index of each token's member among the trunk's.
        batch: the short feeds, if any.
        chunks: the long feeds.
        adapted: some token has an adapter to run with.
    """

    kv_cache: KVCache
    ids_T: Tensor
    positions_T: Tensor
    rows_T: Tensor
    outputs_W: Tensor
    adapters_T: Tensor
    batch: Batch | None
    chunks: Sequence[Chunk]
    adapted: bool
    masks: dict[_MaskKey, Tensor] = field(default_factory=dict)
    slots: dict[tuple[torch.device, int], Tensor] = field(default_factory=dict)

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """See `Attends`."""
        said = _Options(
            scale=options.get("scaling"), window=options.get("sliding_window"), softcap=options.get("softcap")
        )
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        keys_RKCD, values_RKCD = self.kv_cache.keys[layer], self.kv_cache.values[layer]
        slots = self._slots(keys_RKCD)
        for stored, new in ((keys_RKCD, key), (values_RKCD, value)):
            new_TKD = new[0].transpose(0, 1).to(stored.dtype)
            stored.view(-1, stored.shape[-1]).index_copy_(0, slots, new_TKD.reshape(-1, stored.shape[-1]))
        query_THD = query[0].transpose(0, 1)
        parts = [] if self.batch is None else [self._attend_batch(self.batch, query_THD, keys_RKCD, values_RKCD, said)]
        parts += [self._attend_chunk(chunk, query_THD, keys_RKCD, values_RKCD, said) for chunk in self.chunks]
        # Contiguous, as from transformers' own: some models look at it in another shape.
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None].contiguous()

    def _slots(self, stored_RKCD: Tensor) -> Tensor:
        """Where each head of each token goes in the cache's flat list of vectors, [T · K]; made once per pass."""
        at = stored_RKCD.device, stored_RKCD.shape[1]
        if at not in self.slots:
            heads_K = torch.arange(at[1], device=at[0])
            rows_T, positions_T = self.rows_T.to(at[0]), self.positions_T.to(at[0])
            slots_TK = (rows_T[:, None] * at[1] + heads_K) * stored_RKCD.shape[2] + positions_T[:, None]
            self.slots[at] = slots_TK.view(-1)
        return self.slots[at]

    def _attend_batch(
        self, batch: Batch, query_THD: Tensor, keys_RKCD: Tensor, values_RKCD: Tensor, options: _Options
    ) -> Tensor:
        n, q = batch.rows, batch.queries
        heads, size = query_THD.shape[1:]
        keys_NKSD, values_NKSD = keys_RKCD[:n, :, : batch.span], values_RKCD[:n, :, : batch.span]
        kv_heads = keys_NKSD.shape[1]
        groups = heads // kv_heads
        mask = self._mask(batch, groups, options.window, keys_NKSD)
        # Query heads that share a key/value head become more queries of it: keys are never repeated.
        if q == 1 and batch.cells_T is None:
            folded = query_THD[:n].view(n, kv_heads, groups, size)
            return _scores(folded, keys_NKSD, values_NKSD, mask, options).reshape(n, heads, -1)
        table = query_THD[: batch.tokens]
        cells_T = None if batch.cells_T is None else batch.cells_T.to(query_THD.device)
        if cells_T is not None:
            table = query_THD.new_zeros(n * q, heads, size).index_copy_(0, cells_T, table)
        folded = table.view(n, q, kv_heads, groups, size).permute(0, 2, 3, 1, 4).reshape(n, kv_heads, groups * q, size)
        out = _scores(folded, keys_NKSD, values_NKSD, mask, options)
        out = out.view(n, kv_heads, groups, q, -1).permute(0, 3, 1, 2, 4).reshape(n * q, heads, -1)
        return out if cells_T is None else out.index_select(0, cells_T)

    def _mask(self, batch: Batch, groups: int, window: int | None, like: Tensor) -> Tensor | None:
        """Additive mask [N, 1, G·Q, S], made once per pass; None where every position may be seen."""
        if batch.alone and (window is None or window >= batch.span):
            return None
        return self._made_once(batch, batch.positions_NQ, batch.span, groups, window, like)

    def _made_once(
        self, part: Batch | Chunk, positions_NQ: Tensor, span: int, groups: int, window: int | None, like: Tensor
    ) -> Tensor:
        """The mask of a part of the pass; layers that are alike share it."""
        at = (id(part), like.device, like.dtype, window, groups)
        if at not in self.masks:
            visible_NQS = _visible(positions_NQ.to(like.device)[:, :, None], span, window)
            self.masks[at] = _additive(visible_NQS, like.dtype)[:, None].repeat(1, 1, groups, 1)
        return self.masks[at]

    def _attend_chunk(
        self, chunk: Chunk, query_THD: Tensor, keys_RKCD: Tensor, values_RKCD: Tensor, options: _Options
    ) -> Tensor:
        length = chunk.last - chunk.first
        span = chunk.start + length
        heads, size = query_THD.shape[1:]
        keys_1KSD, values_1KSD = keys_RKCD[None, chunk.row, :, :span], values_RKCD[None, chunk.row, :, :span]
        kv_heads = keys_1KSD.shape[1]
        groups = heads // kv_heads
        query = query_THD[chunk.first : chunk.last].view(length, kv_heads, groups, size)
        folded = query.permute(1, 2, 0, 3).reshape(1, kv_heads, groups * length, size)
        positions_1Q = self.positions_T[None, chunk.first : chunk.last]
        mask = self._made_once(chunk, positions_1Q, span, groups, options.window, keys_1KSD)
        out = _scores(folded, keys_1KSD, values_1KSD, mask, options)
        return out.view(kv_heads, groups, length, -1).permute(2, 0, 1, 3).reshape(length, heads, -1)


def plan_pass(
    kv_cache: KVCache, feeds: Sequence[Feed], embedding_size: int, device: torch.device, adapted: Container[int] = ()
) -> Pass:
    """Lay out the tokens of `feeds`: short feeds by row, then long ones.

    Args:
        kv_cache: whose active rows the feeds extend.
        feeds: at most one per row.
        embedding_size: ids at or above it are read as 0; see `vocabulary.readable`.
        device: of the model's input.
        adapted: the trunk's members that have an adapter.
    """
    short = sorted((feed for feed in feeds if len(feed.ids) <= SHORT), key=lambda feed: feed.row.index)
    long = [feed for feed in feeds if len(feed.ids) > SHORT]
    ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    adapters: list[int] = []
    ends: dict[int, int] = {}
    chunks = []
    for feed in (*short, *long):
        start, index = len(feed.row.ids), feed.row.index
        assert start + len(feed.ids) <= kv_cache.capacity
        if len(feed.ids) > SHORT:
            chunks.append(Chunk(row=index, first=len(ids), last=len(ids) + len(feed.ids), start=start))
        ids.extend(i if i < embedding_size else 0 for i in feed.ids)
        positions.extend(range(start, start + len(feed.ids)))
        rows.extend([index] * len(feed.ids))
        adapters.extend([feed.row.member] * len(feed.ids))
        ends[id(feed)] = len(ids)
    outputs = [i for feed in feeds for i in range(ends[id(feed)] - feed.want, ends[id(feed)])]

    def tensor(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long).to(device, non_blocking=True)

    return Pass(
        kv_cache=kv_cache,
        ids_T=tensor(ids),
        positions_T=tensor(positions),
        rows_T=tensor(rows),
        outputs_W=tensor(outputs),
        adapters_T=tensor(adapters),
        batch=_batch(kv_cache, short, device) if short else None,
        chunks=chunks,
        adapted=any(feed.row.member in adapted for feed in feeds),
    )


def _batch(kv_cache: KVCache, short: Sequence[Feed], device: torch.device) -> Batch:
    rows = kv_cache.active
    queries = max(len(feed.ids) for feed in short)
    positions = [0] * (rows * queries)
    cells = []
    for feed in short:
        start, cell = len(feed.row.ids), feed.row.index * queries
        for i in range(len(feed.ids)):
            positions[cell + i] = start + i
            cells.append(cell + i)
    return Batch(
        tokens=len(cells),
        rows=rows,
        queries=queries,
        span=max(positions) + 1,
        positions_NQ=torch.tensor(positions).view(rows, queries).to(device, non_blocking=True),
        cells_T=None if len(cells) == rows * queries else torch.tensor(cells).to(device, non_blocking=True),
        alone=rows == queries == 1,
    )


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)


def _visible(positions_NQ1: Tensor, span: int, window: int | None) -> Tensor:
    """Which of the first `span` positions each query sees: those up to its own, within the window."""
    seen_S = torch.arange(span, device=positions_NQ1.device)
    visible_NQS = seen_S <= positions_NQ1
    return visible_NQS if window is None else visible_NQS & (seen_S > positions_NQ1 - window)


def _scores(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, options: _Options) -> Tensor:
    """Attention of `query` [N, K, Q, D], in its dtype; `mask` is [N, 1, Q, S].

    On a CPU torch's fused attention is many times slower than three plain products for the few queries of a decode
    step, and its bfloat16 products slower than float32 ones: there everything is float32, the KV cache included.
    """
    scale = query.shape[-1] ** -0.5 if options.scale is None else options.scale
    if options.softcap is None and query.device.type != "cpu":
        return nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    scores = (query.to(keys.dtype) * scale) @ keys.transpose(-1, -2)
    if options.softcap is not None:  # Gemma 2 squashes its scores
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if mask is not None:
        scores += mask
    return (torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype) @ values).to(query.dtype)


# --- the plug -------------------------------------------------------------------------------------------------------

_current = threading.local()


class Plug:
    """Puts the engine's attention into a model while a pass runs, and what was there before back."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        self._configs = list({id(module.config): module.config for module in self._models}.values())

    @contextmanager
    def attending(self, attends: Attends) -> Iterator[None]:
        """The model's attention layers do what `attends` says."""
        before = [config._attn_implementation for config in self._configs]
        _current.attends = attends
        try:
            for module in self._models:  # looks at the ids for padding, of which there is none, and waits for a GPU
                vars(module)[_LOOKS_FOR_PADDING] = _say_nothing
            for config in self._configs:
                # transformers makes no mask for an implementation that it has no mask function for.
                config._attn_implementation = IMPLEMENTATION
            yield
        finally:
            for config, implementation in zip(self._configs, before, strict=True):
                config._attn_implementation = implementation
            for module in self._models:
                vars(module).pop(_LOOKS_FOR_PADDING, None)
            _current.attends = None


_LOOKS_FOR_PADDING = "warn_if_padding_and_no_attention_mask"


def _say_nothing(*_: Any, **__: Any) -> None:
    """Instead of a warning."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,  # noqa: ARG001 (some models give it by name)
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    attends: Attends = _current.attends
    return attends.attend(module, query, key, value, **options), None


AttentionInterface.register(IMPLEMENTATION, _attention)
