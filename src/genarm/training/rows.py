"""Where the sequences of packed pairs stand: `[prompt | chosen | rejected] [prompt | chosen | rejected] …` in one row.

Shapes: B pairs, S = 2B sequences (the chosen ones first), T positions of the row, N tokens of responses; P, C, R
tokens of a prompt, a chosen and a rejected response; W tokens of the longest sequence; G sequences of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Lengths: TypeAlias = Sequence[Sequence[int]]
"""[P, C, R] of each pair."""


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
    rows = sequences(lengths)
    responses = [size for side in (1, 2) for size in [three[side] for three in lengths]]
    width = max(map(len, rows))
    sources = [
        torch.arange(len(row) - size - 1, len(row) - 1) + number * width
        for number, (row, size) in enumerate(zip(rows, responses, strict=True))
    ]
    return Padded(
        places_SW=pad_sequence(rows, batch_first=True),
        mask_SW=pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        sources_N=torch.cat(sources),
    )


def sequences(lengths: Lengths) -> list[Tensor]:
    """The positions of the packed row that each sequence stands at."""
    chosen_rows, rejected_rows, start = [], [], 0
    for prompt, chosen, rejected in lengths:
        row = torch.arange(start, start + prompt + chosen + rejected)
        chosen_rows.append(row[: prompt + chosen])
        rejected_rows.append(torch.cat([row[:prompt], row[prompt + chosen :]]))
        start += len(row)
    return chosen_rows + rejected_rows


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """The sequences of a batch in rows of their own, those of about one length together.

    Attributes:
        groups: for each group, the position [G, W] of the packed row that each token stands at; any after its end.
        back_T: where each position of the packed row is among all that the groups have, one after the other. A prompt
            is there twice, and the same.
    """

    groups: Sequence[Tensor]
    back_T: Tensor


def side_by_side(lengths: Lengths, device: torch.device) -> SideBySide:
    """Groups in which no sequence is shorter than half of the longest, so that less than half is padding."""
    groups: list[list[Tensor]] = []
    for row in sorted(sequences(lengths), key=len, reverse=True):
        if not groups or 2 * len(row) < len(groups[-1][0]):
            groups.append([])
        groups[-1].append(row)
    back_T = torch.empty(sum(map(sum, lengths)), dtype=torch.long)
    start = 0
    for group in groups:
        for row in group:
            back_T[row] = torch.arange(start, start + len(row))
            start += len(group[0])
    places = [pad_sequence(group, batch_first=True).to(device) for group in groups]
    return SideBySide(groups=places, back_T=back_T.to(device))
