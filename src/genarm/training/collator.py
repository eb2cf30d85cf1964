"""Batches of pairs, packed: `[prompt | chosen | rejected] [prompt | chosen | rejected] …` in one row.

Shapes: as in `rows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from genarm.data.tokens import TokenPair
from genarm.training.rows import sequences


def collate(pairs: Sequence[TokenPair]) -> dict[str, Any]:
    """A batch of `pairs`.

    Returns:
        `input_ids` and `position_ids` [1, T]: those of each rejected response go on from its prompt.
        `lengths`: [P, C, R] of each pair.
        `sources` [N]: the position of the row that predicts each token of the responses, sequence by sequence.
        `labels` [N]: these tokens.
        `sequences` [N]: the sequence of each.
    """
    parts = [(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in pairs]
    lengths = [[len(part) for part in three] for three in parts]
    rows, responses = sequences(lengths), [len(ids) for side in (1, 2) for ids in [three[side] for three in parts]]
    return {
        "input_ids": torch.tensor([[token for three in parts for ids in three for token in ids]]),
        "position_ids": torch.cat(
            [
                torch.arange(start, start + size)
                for prompt, chosen, rejected in lengths
                for start, size in ((0, prompt + chosen), (prompt, rejected))
            ]
        )[None],
        "lengths": lengths,
        "sources": torch.cat([row[-size - 1 : -1] for row, size in zip(rows, responses, strict=True)]),
        "labels": torch.tensor([token for side in (1, 2) for three in parts for token in three[side]]),
        "sequences": torch.arange(len(rows)).repeat_interleave(torch.tensor(responses)),
    }
