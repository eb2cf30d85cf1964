"""Decode steps as CUDA graphs: the same kernels at the same addresses, launched as one.

A step whose rows run one token each, or the few of a draft, has the same shape as the next one but for the number of
rows, the most tokens of a row and the positions it looks at. All are rounded up to a few sizes; each combination is
captured at its first use and replayed from then on with its inputs copied into place. Prompts run launch by launch,
and so does a model whose forward waits for the device: one that routes tokens to experts by their number, or rescales
positions by the longest.

Shapes: N rows of a step, Q tokens of each, T tokens of a pass, W of them with logits wanted.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from genarm.engine.attention import SHORT, Batch, Pass
from genarm.engine.kv_cache import KVCache

_SPANS = 256
"""Positions attended to are rounded up to a multiple of this."""
_QUERIES = (1, 2, 3, 5, 9, SHORT)
"""Tokens of a row are rounded up to one of these: a token, or one after drafts of 1, 2, 4 or 8."""


@dataclass
class _Captured:
    plan: Pass
    replay: Callable[[], Tensor]


class DecodeGraphs:
    """Captured decode steps of one trunk.

    The first use of a size runs it eagerly on the padded inputs; on CUDA it is then captured. On other devices
    every use runs eagerly on the same static inputs, which is how the tests run this code.

    Attributes:
        captured: by rows, tokens of each and positions.
        refused: why the model cannot be captured; None while nothing speaks against it.
    """

    def __init__(self, kv_cache: KVCache, logits: Callable[[Pass], Tensor]) -> None:
        self.kv_cache = kv_cache
        self.logits = logits
        self.captured: dict[tuple[int, int, int], _Captured] = {}
        self.refused: str | None = None
        self._pool: Any = None

    def run(self, plan: Pass) -> Tensor:
        """Logits of a pass, [W, V]."""
        batch = plan.batch
        # Of a prompt the last token alone is wanted; its lengths are too many to capture.
        if self.refused or batch is None or plan.chunks or len(plan.outputs_W) != batch.tokens:
            return self.logits(plan)
        rows = _round_rows(batch.rows, len(self.kv_cache.rows) + 1)
        queries = next(n for n in _QUERIES if n >= batch.queries)
        span = min(-(-batch.span // _SPANS) * _SPANS, self.kv_cache.capacity)
        cells_T = _cells(batch, queries, plan.ids_T.device)
        found = self.captured.get((rows, queries, span))
        if found is None:
            static = self._static(plan, rows, queries, span)
            _fill(static, plan, cells_T)
            self.captured[rows, queries, span] = found = _Captured(plan=static, replay=self._capture(static))
        _fill(found.plan, plan, cells_T)
        # The graph's output is overwritten by its next replay; log-probabilities are taken from it before that.
        return found.replay().index_select(0, plan.outputs_W if cells_T is None else cells_T[plan.outputs_W])

    def _static(self, plan: Pass, rows: int, queries: int, span: int) -> Pass:
        """Inputs of N rows of Q tokens; `_fill` says what becomes of those that a step has not."""
        zeros = torch.zeros(rows * queries, dtype=torch.long, device=plan.ids_T.device)
        positions_T = zeros.clone()
        batch = Batch(
            tokens=rows * queries,
            rows=rows,
            queries=queries,
            span=span,
            positions_NQ=positions_T.view(rows, queries),
            cells_T=None,
        )
        return replace(
            plan,
            ids_T=zeros.clone(),
            positions_T=positions_T,
            rows_T=zeros.clone(),
            outputs_W=torch.arange(rows * queries, device=zeros.device),
            adapters_T=zeros.clone(),
            batch=batch,
            adapted=True,
            masks={},
            slots={},
        )

    def _capture(self, static: Pass) -> Callable[[], Tensor]:
        def run() -> Tensor:
            static.masks.clear()  # made of the positions, which differ from step to step
            static.slots.clear()
            return self.logits(static)

        if static.ids_T.device.type != "cuda":
            return run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), Waits() as waits:  # libraries allot their workspaces before anything is captured
            for _ in range(2):
                run()
        usual = torch.cuda.current_stream()
        usual.wait_stream(side)
        self.refused = waits.where
        if self.refused:
            return run
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = run()
        except Exception as error:
            self.refused = " ".join(str(error).split())
            _clear_away(graph, usual)
            return run
        self._pool = self._pool or graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


class Waits(TorchDispatchMode):
    """Finds out whether what runs waits for the device: for a number, a shape, or data from elsewhere.

    Such a step cannot be captured, and the attempt would leave torch's allocator and generator in a capture for good.

    Attributes:
        where: the first operation that waits, if any.
    """

    def __init__(self) -> None:
        super().__init__()
        self.where: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # what an operation is made of may wait
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        output = func(*args, **kwargs)
        if self.where is None and _waits(func, args, output):
            self.where = str(func)
        return output


def _waits(func: Any, args: Sequence[Any], output: Any) -> bool:
    if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
        return True
    # Numbers on the CPU are part of the launch; tensors are copied.
    places = {x.device for x in (*args, output) if isinstance(x, Tensor) and (x.dim() or x is output)}
    return len(places) > 1


def _clear_away(graph: torch.cuda.CUDAGraph, usual: torch.cuda.Stream) -> None:
    """After a capture that failed although nothing seemed to wait."""
    torch.cuda.set_stream(usual)
    # torch's allocator goes on asking the graph about its stream, and the graph's own end would end the process.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(graph))
    generator = torch.cuda.default_generators[usual.device_index]
    generator.graphsafe_set_state(generator.clone_state())


def _cells(batch: Batch, queries: int, device: torch.device) -> Tensor | None:
    """Where each token of the step goes in a table [N, Q] of `queries` tokens a row; None for the first places."""
    if batch.cells_T is None and batch.queries == queries:
        return None
    cells_T = torch.arange(batch.tokens, device=device) if batch.cells_T is None else batch.cells_T
    return cells_T + cells_T // batch.queries * (queries - batch.queries)


def _fill(static: Pass, plan: Pass, cells_T: Tensor | None) -> None:
    """Copy a step's inputs into their places; in the others a token goes to the spare row and sees position 0 alone."""
    static.rows_T.fill_(len(static.kv_cache.rows))
    static.positions_T.zero_()
    for target_T, source_T in (
        (static.ids_T, plan.ids_T),
        (static.positions_T, plan.positions_T),
        (static.rows_T, plan.rows_T),
        (static.adapters_T, plan.adapters_T),
    ):
        if cells_T is None:
            target_T[: len(source_T)].copy_(source_T)
        else:
            target_T.index_copy_(0, cells_T, source_T)


def _round_rows(rows: int, most: int) -> int:
    """1, 2, 4, 8, then multiples of 8."""
    for size in (1, 2, 4, 8):
        if rows <= size:
            return min(size, most)
    return min(-(-rows // 8) * 8, most)
