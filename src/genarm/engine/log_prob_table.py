"""What every member says at the positions where tokens are chosen, and the combination of it.

Shapes: P positions ("spots"), of several requests together, V ids of the base's vocabulary, R rewards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from genarm.engine.members import Members, Outputs
from genarm.engine.request import Token
from genarm.engine.request_state import BASE_MEMBER, RequestState
from genarm.model.combine import Coefficients, combine, divergence, within_budget

Spot: TypeAlias = tuple[RequestState, int]
"""The token of a request that comes so many places after its next one."""


@dataclass(frozen=True)
class LogProbTable:
    """Combined log-probs [P, V], those of the members they are made of, and the combined ones' KL from the base's.

    A member's are zeros where it did not run.
    """

    rows: Mapping[Spot, int]
    guided_PV: Tensor
    members: Mapping[int, Tensor]
    kl_P: Tensor

    def guided(self, spots: Sequence[Spot]) -> Tensor:
        """Combined log-probs at `spots`, in their order."""
        rows = [self.rows[spot] for spot in spots]
        if rows == list(range(len(self.rows))):
            return self.guided_PV
        return self.guided_PV.index_select(0, torch.tensor(rows).to(self.guided_PV.device))

    def look_up(
        self, spots: Sequence[Spot], tokens: Sequence[int], tops: Sequence[int], rewards: Members
    ) -> Iterator[Token]:
        """Each chosen token with what the members say of it and the likeliest `tops` tokens, without its text."""
        device = self.guided_PV.device
        rows_P = torch.tensor([self.rows[spot] for spot in spots]).to(device)
        tokens_P = torch.tensor(tokens).to(device)
        sources = [self.guided_PV, *self.members.values()]
        said_P = [source[rows_P, tokens_P] for source in sources]
        guided, distances, *members = torch.stack([said_P[0], self.kl_P[rows_P], *said_P[1:]]).tolist()
        likeliest = self._likeliest(rows_P, tops)
        for i, ((state, _), token) in enumerate(zip(spots, tokens, strict=True)):
            said = {member: column[i] for member, column in zip(self.members, members, strict=True)}
            yield Token(
                id=token,
                text="",
                log_prob=guided[i],
                base=said[BASE_MEMBER],
                rewards=_parts(said, state, rewards),
                kl=distances[i] if math.isfinite(distances[i]) else None,
                top=likeliest.get(i, ()),
            )

    def _likeliest(self, rows_P: Tensor, tops: Sequence[int]) -> dict[int, tuple[tuple[int, float], ...]]:
        """{place in `rows_P`: (id, log-prob) of its likeliest tokens} where any are wanted."""
        wanted = [i for i, count in enumerate(tops) if count]
        if not wanted:
            return {}
        most = min(max(tops), self.guided_PV.shape[-1])
        values_PK, ids_PK = self.guided_PV[rows_P[wanted]].topk(most)
        rows = zip(wanted, ids_PK.tolist(), values_PK.tolist(), strict=True)
        return {i: tuple(zip(ids[: tops[i]], values[: tops[i]], strict=True)) for i, ids, values in rows}


def _parts(said: Mapping[int, float], state: RequestState, members: Members) -> dict[str, float]:
    """What each reward that runs says of a token: what its member does, less its reference."""
    parts = {}
    for place, (name, reference) in enumerate(zip(members.reward_names, members.references, strict=True), start=1):
        streams = {place} if reference is None else {place, reference}
        if place in state.rewards and streams <= state.factors.keys() & said.keys():
            parts[name] = said[place] if reference is None else said[place] - said[reference]
    return parts


def make_table(
    spots: Sequence[Spot],
    outputs: Outputs,
    unknown: Sequence[Tensor | None],
    device: torch.device,
    *,
    of_prompts: bool = False,
) -> LogProbTable:
    """Combine the members' log-probs, each request with its own weights.

    Args:
        spots: all of one request side by side, in order.
        outputs: {(request, member): log-probs}, a row per spot of that request.
        unknown: masks of the ids that each member but the base cannot judge, or None.
        device: of the base.
        of_prompts: the tokens are the prompts' own, not the replies'.
    """
    counts: dict[RequestState, int] = {}
    for state, _ in spots:
        counts[state] = counts.get(state, 0) + 1
    base_PV = _stacked([outputs[state, BASE_MEMBER] for state in counts])
    others = sorted({member for _, member in outputs} - {BASE_MEMBER})
    members = {BASE_MEMBER: base_PV}
    for member in others:
        found = [outputs.get((state, member)) for state in counts]
        members[member] = _stacked(
            [
                torch.zeros(count, base_PV.shape[-1], device=device) if row is None else row.to(device)
                for row, count in zip(found, counts.values(), strict=True)
            ]
        )
    states = [state for state, _ in spots]
    factors = [state.prompt_factors if of_prompts else state.factors for state in states]
    base = [of[BASE_MEMBER] for of in factors]
    given = Coefficients(
        base_B=None if all(factor == 1 for factor in base) else torch.tensor(base),
        streams_BS=torch.tensor([[of.get(member, 0.0) for member in others] for of in factors]),
        guided_B=torch.tensor([len(of) > 1 for of in factors]),
    ).to(device)
    base_P1V = base_PV[:, None]
    guided_P1V = combine(
        base_P1V, [members[member][:, None] for member in others], given, [unknown[member - 1] for member in others]
    )
    budgets = [math.inf if state.request.max_kl is None else float(state.request.max_kl) for state in states]
    if min(budgets) < math.inf:
        guided_P1V = within_budget(base_P1V, guided_P1V, torch.tensor(budgets).to(device))
    kl_P1 = divergence(guided_P1V, base_P1V) if others else base_PV.new_zeros(len(spots), 1)
    rows = {spot: i for i, spot in enumerate(spots)}
    return LogProbTable(rows=rows, guided_PV=guided_P1V[:, 0], members=members, kl_P=kl_P1[:, 0])


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def join(one: LogProbTable, other: LogProbTable) -> LogProbTable:
    """Both tables' spots in one."""
    size = one.guided_PV.shape[-1]

    def both(member: int) -> Tensor:
        parts = (table.members.get(member) for table in (one, other))
        lengths = (len(one.rows), len(other.rows))
        return torch.cat(
            [one.guided_PV.new_zeros(n, size) if p is None else p for p, n in zip(parts, lengths, strict=True)]
        )

    offset = len(one.rows)
    return LogProbTable(
        rows={**one.rows, **{spot: offset + row for spot, row in other.rows.items()}},
        guided_PV=torch.cat([one.guided_PV, other.guided_PV]),
        members={member: both(member) for member in one.members},
        kl_P=torch.cat([one.kl_P, other.kl_P]),
    )
