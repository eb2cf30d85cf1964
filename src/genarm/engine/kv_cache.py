"""Memory for keys and values: rows of fixed length, allotted once.

One row holds the tokens of one request as one member of a trunk sees them. Rows in use are the first `active` ones,
so a decode step reads a contiguous view and copies nothing; when a row is given back, the last active row takes its
place. Rows not in use keep what they hold until the memory is needed: a request that begins with the same tokens
(a system prompt, the turns of a chat so far) goes on from there.

Tensors are [rows, K, C, D]: K key/value heads, C positions of a row, D features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What one attention layer stores per position, and where."""

    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        """Of one position."""
        return self.heads * (self.key_size + self.value_size) * self.dtype.itemsize


@dataclass(eq=False)
class Row:
    """One row. `ids` are the tokens whose keys and values it holds; `index` is its place, which moves.

    `sound` is False where some of them may be NaN or infinite.
    """

    index: int
    member: int = -1
    ids: list[int] = field(default_factory=list)
    used: int = 0
    sound: bool = True


class KVCache:
    """The rows of one trunk.

    Attributes:
        active: how many rows are in use: those with an index below.
        capacity: positions of a row.
    """

    def __init__(self, layers: Sequence[LayerShape], *, rows: int, capacity: int) -> None:
        """Allot everything now."""
        self.capacity = capacity
        self.keys = [_zeros(shape, shape.key_size, rows, capacity) for shape in layers]
        self.values = [_zeros(shape, shape.value_size, rows, capacity) for shape in layers]
        self.bytes = sum(t.nbytes for t in (*self.keys, *self.values))
        self.rows = [Row(index=i) for i in range(rows)]
        self.active = 0
        self._clock = 0

    @property
    def free(self) -> int:
        """How many rows may still be taken."""
        return len(self.rows) - self.active

    def take(self, member: int, ids: Sequence[int]) -> Row:
        """A row for `ids` as `member` sees them; it comes with the longest beginning that some row already holds.

        The last token is never taken over: it must be run to know what follows.
        """
        assert self.free
        source, length = self._longest(member, ids[:-1])
        idle = self.rows[self.active :]
        if source is not None and source in idle and length == len(source.ids):
            row = source
        else:
            others = [r for r in idle if r is not source] or idle
            row = min(others, key=lambda r: r.used)
        # A row that holds no more than the shared beginning is continued; from others the beginning is copied.
        if source is not None and source is not row:
            self._copy(source, row, length)
        if not row.sound:
            self.clean(row, length, len(row.ids))
        row.ids = list(ids[:length])
        row.member = member
        row.sound = True
        self._exchange(row, self.rows[self.active])
        self.active += 1
        return row

    def give_back(self, row: Row, *, sound: bool = True) -> None:
        """The row is idle from now on; what it holds may serve another request.

        Unless it is `sound` (every token in it led to finite log-probs), what another request does not take over is
        cleaned before the row is used again: positions beyond a request's own count 0 times what they hold, and 0
        times NaN is NaN.
        """
        assert row.index < self.active
        self._clock += 1
        row.used = self._clock
        row.sound = sound
        self._exchange(row, self.rows[self.active - 1])
        self.active -= 1

    def clean(self, row: Row, first: int, last: int | None = None) -> None:
        """Zeros at the row's positions from `first` on."""
        for tensor in (*self.keys, *self.values):
            tensor[row.index, :, first:last] = 0

    def forget(self) -> None:
        """No row is in use and none holds anything (after a failure in the middle of a step)."""
        for row in self.rows:
            if row.index < self.active or not row.sound:
                self.clean(row, 0)
            row.ids, row.member, row.used, row.sound = [], -1, 0, True
        self.active = 0

    def _longest(self, member: int, ids: Sequence[int]) -> tuple[Row | None, int]:
        best, length = None, 0
        for row in self.rows:
            if row.member == member and row.ids:
                shared = _shared(row.ids, ids)
                if shared > length:
                    best, length = row, shared
        return best, length

    def _copy(self, source: Row, target: Row, length: int) -> None:
        for tensor in (*self.keys, *self.values):
            tensor[target.index, :, :length] = tensor[source.index, :, :length]

    def _exchange(self, one: Row, other: Row) -> None:
        """Swap two rows with what they hold."""
        if one is other:
            return
        length = max(len(one.ids), len(other.ids))
        if length:
            for tensor in (*self.keys, *self.values):
                kept = tensor[one.index, :, :length].clone()
                tensor[one.index, :, :length] = tensor[other.index, :, :length]
                tensor[other.index, :, :length] = kept
        one.index, other.index = other.index, one.index
        self.rows[one.index], self.rows[other.index] = one, other


def _zeros(shape: LayerShape, size: int, rows: int, capacity: int) -> Tensor:
    # Zeros, not empty: a row that takes part in a step without a token of its own must not read NaN. One row more
    # than can be taken: padded steps write there.
    # Head by head, positions side by side: what a decode step reads for one head is one stretch of memory.
    return torch.zeros(rows + 1, shape.heads, capacity, size, dtype=shape.dtype, device=shape.device)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning, by bisection over slices, which Python compares fast."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if list(one[low:middle]) == list(other[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low
