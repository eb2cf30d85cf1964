"""One step of the engine: the next token, or several, of every request that runs.

A step admits waiting requests and lets the small members draft (`schedule`), runs every trunk once over all new tokens
(`run`), then combines the members' log-probabilities, samples, delivers tokens and ends requests that are complete
(`postprocess`).

Shapes: P positions that are sampled at, over all requests, V ids of the base's vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from genarm.engine.drafting import Draft, Drafter
from genarm.engine.log_prob_table import LogProbTable, Spot, join, make_table
from genarm.engine.members import Members, Outputs, Read
from genarm.engine.noise import Purpose
from genarm.engine.request import Token
from genarm.engine.request_state import BASE_MEMBER, RequestState
from genarm.engine.sampler import draw, residual, shape
from genarm.engine.scheduler import Schedule, Scheduler
from genarm.errors import GenarmError, MemberError, WeightsError

_Drafts = Mapping[RequestState, Draft]


class Stepper:
    """Makes steps for the scheduler's requests. Not thread-safe.

    Attributes:
        scheduler: the requests.
        steps: made so far.
    """

    def __init__(self, members: Members, *, streams: int, chunk: int) -> None:
        self.members = members
        self.scheduler = Scheduler(members, streams=streams, chunk=chunk)
        self.steps = 0
        self._drafter = Drafter(members)

    @torch.inference_mode()
    def step(self) -> None:
        """One step; where a request's own settings raise an error, it alone ends, and the others are as before."""
        self.steps += 1
        self.scheduler.end_cancelled()
        self.scheduler.admit()
        if not self.scheduler.running:
            return
        before = [(state, state.snapshot()) for state in self.scheduler.running]
        try:
            self._advance()
        except Exception:
            if not self._end_culprits():
                raise
            for state, snapshot in before:
                if state.rows:
                    state.restore(snapshot)

    def _advance(self) -> None:
        drafts = self._drafter.draft(self.scheduler.decoding)
        schedule = self.scheduler.schedule({state: draft.tokens for state, draft in drafts.items()})
        outputs = self.members.run(schedule.reads)
        self._postprocess(schedule, drafts, outputs)

    def _postprocess(self, schedule: Schedule, drafts: _Drafts, outputs: Outputs) -> None:
        """From log-probs to tokens, endings and free rows."""
        outputs = self._score_prompts(schedule.reads, outputs)
        ready = self._finish_prompts(schedule.ready)
        if not ready:
            return
        table = self._first_table(ready, drafts, outputs)
        accepted = self._drafter.accept(drafts, table, outputs)
        whole = [state for state, draft in drafts.items() if accepted[state] == len(draft.tokens)]
        ended = [state for state in whole if state.ends_in(drafts[state].tokens)]
        whole = [state for state in whole if state not in ended]
        if whole:
            table = join(table, self._drafter.after_all(whole, drafts, outputs))
        kept = {state: drafts[state].tokens[: accepted[state]] if state in drafts else [] for state in ready}
        sampled = self._sample([state for state in ready if state not in ended], drafts, kept, table)
        self._deliver({state: [*kept[state], *sampled.get(state, ())] for state in ready}, kept, drafts, table)

    def _end_culprits(self) -> bool:
        """After an error in a step: end the requests whose own settings raise one; whether there are any."""
        flaws = [(state, state.flaw(self.members.embedding_size)) for state in self.scheduler.running]
        for state, error in flaws:
            if error is not None:
                self.scheduler.end_with(state, error)
        return any(error is not None for _, error in flaws)

    # --- prompts ------------------------------------------------------------------------------------------------

    def _score_prompts(self, reads: Sequence[Read], outputs: Outputs) -> Outputs:
        """Note what is said of the prompts' tokens that were read; what is left of `outputs` follows the last one."""
        spots: list[Spot] = []
        tokens: list[int] = []
        at: Outputs = {}
        last = dict(outputs)
        for state in {state: None for state, _, _ in reads if state.scores_prompt and not state.tokens}:
            if (state, BASE_MEMBER) not in outputs:  # all but a wish have read it but for its last token
                continue
            members = [m for m in state.members if not self.members.is_draft_model(m) and m not in state.contexts]
            read = len(outputs[state, BASE_MEMBER])  # as many tokens by every one of these
            end = len(state.rows[BASE_MEMBER].ids)
            next_ids = state.ids[end - read + 1 : end + 1]
            spots += [(state, i) for i in range(len(next_ids))]
            tokens += next_ids
            for member in members:
                if next_ids:
                    at[state, member] = outputs[state, member][: len(next_ids)]
                last[state, member] = outputs[state, member][-1:]
        if spots:
            table = make_table(spots, at, self.members.unknown, self.members.device, of_prompts=True)
            tops = [state.request.prompt_log_probs or 0 for state, _ in spots]
            looked_up = table.look_up(spots, tokens, tops, self.members)
            for (state, _), token in zip(spots, looked_up, strict=True):
                if state.rows and math.isnan(token.log_prob):
                    self.scheduler.end_with(state, _not_a_number(state, token))
                state.scored.append(token)
        return last

    def _finish_prompts(self, ready: Sequence[RequestState]) -> list[RequestState]:
        """Those of `ready` that go on with a reply."""
        for state in ready:
            if state.rows and not state.tokens:
                ending = state.prompt_done()
                if ending is not None:
                    self.scheduler.end(state, ending)
        return [state for state in ready if state.rows]

    # --- replies ------------------------------------------------------------------------------------------------

    def _first_table(self, ready: Sequence[RequestState], drafts: _Drafts, outputs: Outputs) -> LogProbTable:
        """The positions that drafts are verified at, or the only one of a request without drafts."""
        spots: list[Spot] = []
        at: Outputs = {}
        for state in ready:
            draft = drafts.get(state)
            count = len(draft.tokens) if draft else 1
            spots += [(state, i) for i in range(count)]
            for member in state.members:
                if self.members.is_draft_model(member):
                    continue
                if draft and member in state.guessers:
                    at[state, member] = torch.cat(draft.members[member])
                else:
                    at[state, member] = outputs[state, member][:count]
        return make_table(spots, at, self.members.unknown, self.members.device)

    def _sample(
        self,
        states: Sequence[RequestState],
        drafts: _Drafts,
        kept: Mapping[RequestState, Sequence[int]],
        table: LogProbTable,
    ) -> dict[RequestState, list[int]]:
        """The token after the kept drafts of each request: from the residual where the next draft was refused."""
        if not states:
            return {}
        ahead = [len(kept[state]) for state in states]
        places = [state.place(kept[state]) for state in states]
        shaped_PV = shape(table.guided(list(zip(states, ahead, strict=True))), places)
        refused = [i for i, state in enumerate(states) if state in drafts and ahead[i] < len(drafts[state].tokens)]
        if refused:
            rows = torch.tensor(refused, device=shaped_PV.device)
            draft_PV = torch.cat([drafts[states[i]].shaped[ahead[i]] for i in refused])
            shaped_PV = shaped_PV.index_copy(0, rows, residual(shaped_PV[rows], draft_PV))
        settings = [state.request.sampling for state in states]
        keys = [state.key(i, Purpose.TOKEN) for state, i in zip(states, ahead, strict=True)]
        tokens = draw(shaped_PV, settings, keys).tolist()
        return {state: [token] for state, token in zip(states, tokens, strict=True)}

    def _deliver(
        self,
        new: Mapping[RequestState, Sequence[int]],
        kept: Mapping[RequestState, Sequence[int]],
        drafts: _Drafts,
        table: LogProbTable,
    ) -> None:
        """Append the new tokens of each request, of which `kept` were drafts, and end those that are complete."""
        spots = [(state, i) for state, tokens in new.items() for i in range(len(tokens))]
        tokens = [token for tokens in new.values() for token in tokens]
        tops = [state.request.top_log_probs for state, _ in spots]
        looked_up = table.look_up(spots, tokens, tops, self.members)
        for state in new:
            state.keep_rows(len(kept[state]))
            if state in drafts and not drafts[state].sound:
                for member, row in state.rows.items():
                    self.members.trunk(member).kv_cache.clean(row, len(row.ids))
        for (state, _), token in zip(spots, looked_up, strict=True):
            if state.rows:  # an earlier token may have ended it
                self._append(state, token)

    def _append(self, state: RequestState, token: Token) -> None:
        try:
            if math.isnan(token.log_prob):
                raise _not_a_number(state, token)
            self._check_readable(token.id)
            ending = state.append(token)
        except Exception as error:  # of its numbers or its text
            self.scheduler.end_with(state, error)
            return
        if ending is not None:
            self.scheduler.end(state, ending)

    def _check_readable(self, token: int) -> None:
        size = self.members.embedding_size
        if token >= size:
            raise MemberError(
                f"the base said the token id {token}, which it cannot read: its output layer has more rows than its "
                f"embedding, which has {size}; forbid such ids with a logit bias of -100 or resize the model's layers"
            )


def _not_a_number(state: RequestState, token: Token) -> GenarmError:
    """Whose log-probs are NaN; where all members' are numbers, the weights were too much for their sum."""
    said = {"the base": token.base, **{f"the reward {name!r}": value for name, value in token.rewards.items()}}
    silent = [name for name, value in said.items() if value is None or math.isnan(value)]
    if silent:
        return MemberError(
            f"{' and '.join(silent)} gave NaN instead of log-probabilities after {len(state.ids)} tokens; the weights "
            "of that model are broken, or too large for its dtype: try --dtype float32"
        )
    return WeightsError("the sum of log-probabilities overflows with these reward weights; use smaller ones")
