"""Decode steps as CUDA graphs: the same kernels at the same addresses, launched as one.

A step whose rows all run one token has the same shape as the next one but for its number of rows and the positions it
looks at. Both are rounded up to a few sizes; each pair is captured at its first use and replayed from then on with its
inputs copied into place. Everything else (prompts, drafts to verify) runs launch by launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from genarm.engine.attention import Batch, Pass
from genarm.engine.kv_cache import KVCache

_SPANS = 256
"""Positions attended to are rounded up to a multiple of this."""


@dataclass
class _Captured:
    plan: Pass
    replay: Callable[[], Tensor]


class DecodeGraphs:
    """Captured decode steps of one trunk.

    The first use of a size runs it eagerly on the padded inputs; on CUDA it is then captured. On other devices
    every use runs eagerly on the same static inputs, which is how the tests run this code.
    """

    def __init__(self, kv_cache: KVCache, logits: Callable[[Pass], Tensor]) -> None:
        self.kv_cache = kv_cache
        self.logits = logits
        self.captured: dict[tuple[int, int], _Captured] = {}
        self._pool: Any = None

    def run(self, plan: Pass) -> Tensor:
        """Logits of a pass, [W, V]."""
        batch = plan.batch
        if batch is None or batch.queries != 1 or plan.chunks or batch.cells_T is not None:
            return self.logits(plan)
        rows = _round_rows(batch.rows, len(self.kv_cache.rows) + 1)
        span = min(-(-batch.span // _SPANS) * _SPANS, self.kv_cache.capacity)
        found = self.captured.get((rows, span))
        if found is None:
            static = self._static(plan, rows, span)
            _fill(static, plan)
            self.captured[rows, span] = found = _Captured(plan=static, replay=self._capture(static))
        _fill(found.plan, plan)
        # The graph's output is overwritten by its next replay; log-probabilities are taken from it before that.
        return found.replay()[: batch.rows].index_select(0, plan.outputs_W)

    def _static(self, plan: Pass, rows: int, span: int) -> Pass:
        """Inputs for `rows` rows: those without a token write to the spare row and see position 0 alone."""
        spare = len(self.kv_cache.rows)
        device = plan.ids_T.device
        zeros = torch.zeros(rows, dtype=torch.long, device=device)
        batch = Batch(
            tokens=rows,
            rows=rows,
            queries=1,
            span=span,
            positions_NQ=zeros[:, None].clone(),
            cells_T=None,
        )
        return replace(
            plan,
            ids_T=zeros.clone(),
            positions_T=zeros.clone(),
            rows_T=torch.full_like(zeros, spare),
            outputs_W=torch.arange(rows, device=device),
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
        with torch.cuda.stream(side):  # libraries allot their workspaces before anything is captured
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = run()
        self._pool = self._pool or graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


def _fill(static: Pass, plan: Pass) -> None:
    """Copy a step's inputs into the first places of the static ones; the others go to the spare row."""
    assert static.batch is not None
    assert plan.batch is not None
    rows = plan.batch.rows
    static.ids_T[:rows].copy_(plan.ids_T)
    static.positions_T[:rows].copy_(plan.positions_T)
    static.positions_T[rows:].zero_()
    static.rows_T[:rows].copy_(plan.rows_T)
    static.rows_T[rows:].fill_(len(static.kv_cache.rows))
    static.adapters_T[:rows].copy_(plan.adapters_T)
    static.batch.positions_NQ[:rows].copy_(plan.batch.positions_NQ)
    static.batch.positions_NQ[rows:].zero_()


def _round_rows(rows: int, most: int) -> int:
    """1, 2, 4, 8, then multiples of 8."""
    for size in (1, 2, 4, 8):
        if rows <= size:
            return min(size, most)
    return min(-(-rows // 8) * 8, most)
