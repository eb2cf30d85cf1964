"""Batches of pairs, packed: `[prompt | chosen | rejected] [prompt | chosen | rejected] …` in one row.

Shapes: B pairs, S = 2B sequences (the chosen ones first), T positions of the row, N tokens of responses; P, C, R
tokens of a prompt, a chosen and a rejected response; W tokens of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genarm.data.tokens import TokenPair
from genarm.training.packing import Lengths


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
    rows, responses = _sequences(lengths), [len(ids) for side in (1, 2) for ids in [three[side] for three in parts]]
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


@dataclass(frozen=True, kw_only=True)
class Padded:
    """The sequences of a batch in rows of their own.

    Attributes:
        places_SW: the position of the packed row that each token stands at; any where the mask is 0.
        mask_SW: 1 for tokens, 0 for padding on the right.
        sources_N: as in a batch, in S · W.
    """

    places_SW: Tensor
    mask_SW: Tensor
    sources_N: Tensor


def padded(lengths: Lengths) -> Padded:
    """How the pairs of a batch with these `lengths` become rows of one sequence each."""
    rows = _sequences(lengths)
    responses = [size for side in (1, 2) for size in [three[side] for three in lengths]]
    width = max(map(len, rows))
    sources = [
        torch.arange(len(row) - size - 1, len(row) - 1) + number * width
        for number, (row, size) in enumerate(zip(rows, responses, strict=True))
    ]
    return Padded(
        places_SW=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        mask_SW=torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        sources_N=torch.cat(sources),
    )


def _sequences(lengths: Lengths) -> list[Tensor]:
    """The positions of the packed row that each sequence stands at."""
    chosen_rows, rejected_rows, start = [], [], 0
    for prompt, chosen, rejected in lengths:
        row = torch.arange(start, start + prompt + chosen + rejected)
        chosen_rows.append(row[: prompt + chosen])
        rejected_rows.append(torch.cat([row[:prompt], row[prompt + chosen :]]))
        start += len(row)
    return chosen_rows + rejected_rows
