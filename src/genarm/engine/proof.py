"""The engine proves itself when it is built: each trunk against its model's own forward.

What transformers' models do between their attention layers is their own affair, and a family whose attention fits may
still carry something from one token to the next that the engine knows nothing of: a state-space mixer, a scale that
depends on the position, a tensor that two blocks read. So every member of every trunk runs a few random tokens, two
rows of each side by side: a long chunk, a short one, a long one after it, and two decoded tokens. It must say what
the model says of the same tokens in one forward of its own, with its own attention and without a cache.

Random ids of a fixed seed reach what depends on values, and every row has others, so that rows or adapters that got
mixed up would show. A sliding window is passed where it is short (`_CHEAP`); longer ones rest on the tests, which run
each family with a short window. The cost is that of some 90 prompt tokens per member, under 2 s of one processor core
for 135 million weights in float32. No memory is allotted but for the log-probs.

Shapes: R rows of a member, T tokens of a row, V ids of the model's own vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from genarm.engine.attention import SHORT, Feed
from genarm.engine.device import input_device
from genarm.engine.trunk import Trunk, TrunkMember, cannot_run
from genarm.model.adapters import running
from genarm.model.combine import log_probs
from genarm.model.nearness import apart

_CHEAP = 64
"""The longest sliding window that the sequence is made to pass."""


@dataclass(frozen=True)
class Expected:
    """Rows of one member, and what its model says after each of their tokens."""

    ids_RT: Sequence[Sequence[int]]
    log_probs_RTV: Tensor


@torch.inference_mode()
def expect(model: PreTrainedModel, members: Sequence[TrunkMember], *, rows: int, capacity: int) -> list[Expected]:
    """What the model itself says, by member; call before a trunk changes anything in it.

    Args:
        model: loaded, frozen.
        members: of its trunk.
        rows: of each member.
        capacity: positions of a row.
    """
    embedding: Any = model.get_input_embeddings()
    size = int(embedding.weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    expected = []
    for member in members:
        ids_RT = torch.randint(size, (rows, _length(model, capacity)), generator=generator)
        with running(model, member.adapter):
            output = model(input_ids=ids_RT.to(input_device(model)), use_cache=False, return_dict=True)
        expected.append(Expected(ids_RT.tolist(), log_probs(output.logits)))
    return expected


def prove(trunk: Trunk, expected: Sequence[Expected]) -> None:
    """Run the same tokens through the trunk; its rows are clean afterwards.

    Raises:
        UnsupportedError: it says something else.
    """
    kv_cache = trunk.kv_cache
    length = len(expected[0].ids_RT[0])
    rows = [
        (kv_cache.take(member, ids), member, r, ids)
        for member, of in enumerate(expected)
        for r, ids in enumerate(of.ids_RT)
    ]
    try:
        for parts in zip(*(_parts(length, r) for _, _, r, _ in rows), strict=True):
            feeds = [
                Feed(row, ids[first:last], last - first)
                for (row, _, _, ids), (first, last) in zip(rows, parts, strict=True)
            ]
            said = trunk.run(feeds)
            for (_, member, r, _), (first, last), got_TV in zip(rows, parts, said, strict=True):
                _compare(trunk, member, got_TV, expected[member].log_probs_RTV[r, first:last])
    finally:
        for row, *_ in reversed(rows):
            kv_cache.clean(row, 0, length)
            kv_cache.give_back(row)
            row.ids = []
        trunk.passes = 0


def _length(model: PreTrainedModel, capacity: int) -> int:
    window = getattr(model.config.get_text_config(), "sliding_window", None) or 0
    return min(capacity, SHORT + 6 if window > _CHEAP else max(SHORT, window) + 6)


def _parts(length: int, row: int) -> list[tuple[int, int]]:
    """Where a row's tokens are cut, first and last of each part; as many parts in every row."""
    if length < 5:
        cuts = list(range(length + 1))
    elif row == 0:
        cuts = [0, length - 4, length - 2, length - 1, length]
    else:
        cuts = [0, 2, length - 2, length - 1, length]
    return list(pairwise(cuts))


# --- how far apart two forwards may be ------------------------------------------------------------------------------


def _compare(trunk: Trunk, member: int, got_TV: Tensor, want_TV: Tensor) -> None:
    if (difference := apart(got_TV, want_TV, exact=_exact(trunk))) is not None:
        name = trunk.members[member].name
        raise cannot_run(trunk.model, f"log-probs of {name} would differ from its own by {difference:.2g}")


def _exact(trunk: Trunk) -> bool:
    """Whether products are float32 throughout."""
    quantised = getattr(trunk.model, "hf_quantizer", None) is not None
    shortened = trunk.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return trunk.model.dtype in (torch.float32, torch.float64) and not (quantised or shortened)
