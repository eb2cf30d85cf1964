"""Speculative decoding: the small members draft, and all others verify the drafts in one forward.

What comes out has exactly the combined distribution (Leviathan et al. 2023, arXiv 2211.17192): a draft x from q stays
with probability min(1, p(x) / q(x)), and where one is refused, the token is drawn from the residual max(0, p − q).

Shapes: P positions, over all requests, V ids of the base's vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from genarm.engine.attention import Feed
from genarm.engine.log_prob_table import LogProbTable, make_table
from genarm.engine.members import Members, Outputs, Read
from genarm.engine.noise import Purpose, uniform
from genarm.engine.request_state import RequestState
from genarm.engine.sampler import acceptance, draw, shape
from genarm.engine.speculation import guess


@dataclass
class Draft:
    """Tokens drafted for one request, the shaped distributions they came from, and what the drafting members said.

    `sound` is False where one of the tokens led to NaN.
    """

    tokens: list[int] = field(default_factory=list)
    shaped: list[Tensor] = field(default_factory=list)
    members: dict[int, list[Tensor]] = field(default_factory=dict)
    sound: bool = True


class Drafter:
    """Drafts with the members that may, and says how many drafts stay."""

    def __init__(self, members: Members) -> None:
        self.members = members

    def draft(self, states: Sequence[RequestState]) -> dict[RequestState, Draft]:
        """Drafts for those of the decoding requests for which it pays."""
        lengths = {state: state.drafts() for state in states}
        drafts = {state: Draft() for state, length in lengths.items() if length}
        for i in range(max(lengths.values(), default=0)):
            now = [state for state in drafts if lengths[state] > i]
            outputs = self._run_guessers(now, drafts)
            shaped_PV = shape(self._guess(now, outputs), [state.place(drafts[state].tokens) for state in now])
            settings = [state.request.sampling for state in now]
            tokens = draw(shaped_PV, settings, [state.key(i, Purpose.DRAFT) for state in now]).tolist()
            for row, (state, token) in enumerate(zip(now, tokens, strict=True)):
                drafts[state].tokens.append(token)
                drafts[state].shaped.append(shaped_PV[row : row + 1])
        return drafts

    def _run_guessers(self, states: Sequence[RequestState], drafts: Mapping[RequestState, Draft]) -> Outputs:
        """Bring the drafting members up to the last draft; what they say of the next token."""
        reads = []
        for state in states:
            done = drafts[state].tokens
            for member in state.guessers:
                row = state.rows[member]
                reads.append(Read(state, member, Feed(row, [*state.ids, *done][len(row.ids) :], 1)))
        outputs = self.members.run(reads)
        for state in states:
            for member in state.guessers:
                drafts[state].members.setdefault(member, []).append(outputs[state, member])
        return outputs

    def _guess(self, states: Sequence[RequestState], outputs: Outputs) -> Tensor:
        """What the next token of each may be, [P, V]."""
        members = sorted({member for state in states for member in state.guessers})
        columns = [self._column(states, member, outputs) for member in members]
        powers_PM = torch.tensor([[state.guessers.get(member, 0.0) for member in members] for state in states])
        unknown = [self.members.unknown[member - 1] for member in members]
        return guess(columns, powers_PM.to(self.members.device), unknown)

    def _column(self, states: Sequence[RequestState], member: int, outputs: Outputs) -> Tensor:
        """One member's log-probs at one position of each request, 0 where it does not run."""
        rows = [outputs.get((state, member)) for state in states]
        some = next(row for row in rows if row is not None)
        none = torch.zeros_like(some[:1])
        return torch.cat([none if row is None else row for row in rows]).to(self.members.device)

    def accept(
        self, drafts: Mapping[RequestState, Draft], table: LogProbTable, outputs: Outputs
    ) -> dict[RequestState, int]:
        """How many drafts of each request stay, where `table` has the combined distributions at all drafts.

        The numbers that decide are named by position, so a position after a refused draft has the same ones again in
        the next step. That leaves no bias: nothing that was drawn there with them was kept or looked at.
        """
        if not drafts:
            return {}
        spots = [(state, i) for state, draft in drafts.items() for i in range(len(draft.tokens))]
        target_PV = shape(table.guided(spots), [state.place(drafts[state].tokens[:i]) for state, i in spots])
        draft_PV = torch.cat([row for draft in drafts.values() for row in draft.shaped])
        tokens_P = torch.tensor([drafts[state].tokens[i] for state, i in spots]).to(target_PV.device)
        numbers = [acceptance(target_PV, draft_PV, tokens_P)]
        # What follows the last draft is looked at later or never, but it must not leave NaN behind.
        verifying = {state: [m for m in state.members if m not in state.guessers] for state in drafts}
        for state, members in verifying.items():
            numbers += [outputs[state, m][-1, drafts[state].tokens[-1:]].to(target_PV.device) for m in members]
        found = iter(torch.cat(numbers).tolist())
        chances = {state: [next(found) for _ in draft.tokens] for state, draft in drafts.items()}
        accepted = {}
        for state, draft in drafts.items():
            last = [next(found) for _ in verifying[state]]
            draft.sound = not any(map(math.isnan, (*chances[state], *last)))
            mine = [0.0 if math.isnan(chance) else chance for chance in chances[state]]
            stays = [uniform(state.key(i, Purpose.ACCEPT)) < chance for i, chance in enumerate(mine)]
            accepted[state] = stays.index(False) if False in stays else len(stays)
            state.length.saw(mine[: accepted[state] + 1])
            state.drafted += len(mine)
            state.accepted += accepted[state]
        return accepted

    def after_all(
        self, states: Sequence[RequestState], drafts: Mapping[RequestState, Draft], outputs: Outputs
    ) -> LogProbTable:
        """The position after the last draft of requests that keep them all; the ARMs that drafted read it only now."""
        at = self.members.run(
            [
                Read(state, member, Feed(state.rows[member], drafts[state].tokens[-1:], 1))
                for state in states
                for member in state.guessers
                if not self.members.is_draft_model(member)
            ]
        )
        for state in states:
            for member in state.members:
                if member not in state.guessers:
                    at[state, member] = outputs[state, member][-1:]
        spots = [(state, len(drafts[state].tokens)) for state in states]
        return make_table(spots, at, self.members.unknown, self.members.device)
