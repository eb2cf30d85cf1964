"""One step of the engine: the next token, or several, of every request that runs.

A step (1) ends requests that were cancelled and admits waiting ones while there are rows, (2) lets the small members
draft for requests that decode, (3) runs every trunk once over all new tokens: one per decoding row, the drafts to
verify, and a bounded chunk of prompts, (4) combines the members' log-probabilities, at a prompt's tokens too where that
is asked for, (5) accepts drafts and samples, (6) delivers tokens and ends requests that are complete.

Shapes: P positions that are sampled at, over all requests, V ids of the base's vocabulary, R rewards.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from genarm.engine.attention import Feed
from genarm.engine.live import BASE_MEMBER, Live
from genarm.engine.noise import Purpose, uniform
from genarm.engine.request import Ending, Token
from genarm.engine.sampler import acceptance, draw, residual, shape
from genarm.engine.speculation import guess
from genarm.engine.table import Outputs, Spot, Table, join, make_table
from genarm.engine.trunk import Trunk
from genarm.errors import GenarmError, MemberError, WeightsError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which trunk runs each member, and as which of that trunk's own members: `places[member]`.

    Members are the base (0), the rewards (1 … R) and perhaps a draft model (R + 1). `unknown` has for
    every member but the base a mask [V] of the ids that it does not know, or None.
    """

    trunks: Sequence[Trunk]
    places: Sequence[tuple[int, int]]
    reward_names: Sequence[str]
    unknown: Sequence[Tensor | None]

    @property
    def device(self) -> torch.device:
        """Where distributions are combined: the base's."""
        return self.trunks[self.places[BASE_MEMBER][0]].device

    def is_draft_model(self, member: int) -> bool:
        """Whether a member only drafts and has no part in the combination."""
        return member > len(self.reward_names)


@dataclass
class _Draft:
    """Tokens drafted for one request, the shaped distributions they came from, and what the members said.

    `sound` is False where one of the tokens led to NaN.
    """

    tokens: list[int] = field(default_factory=list)
    shaped: list[Tensor] = field(default_factory=list)
    members: dict[int, list[Tensor]] = field(default_factory=dict)
    sound: bool = True


class Stepper:
    """Requests that wait, requests that run, and the trunks that run them. Not thread-safe.

    Attributes:
        streams: the most requests that run at once.
        chunk: the most prompt tokens run per step, over all rows.
        waiting, running: in order of arrival.
    """

    def __init__(self, layout: Layout, *, streams: int, chunk: int) -> None:
        self.layout = layout
        self.streams = streams
        self.chunk = chunk
        self.waiting: deque[Live] = deque()
        self.running: list[Live] = []
        self.steps = 0

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.running)

    def add(self, live: Live) -> None:
        """Let a request wait for its turn."""
        self.waiting.append(live)

    @torch.inference_mode()
    def step(self) -> None:
        """One step; see above."""
        self.steps += 1
        self.end_cancelled()
        self._admit()
        if not self.running:
            return
        before = [(live, live.state()) for live in self.running]
        try:
            self._advance()
        except Exception:
            if not self._end_culprits():
                raise
            for live, state in before:
                if live.rows:
                    live.restore(state)

    def _advance(self) -> None:
        """(2) to (6)."""
        decoding = [live for live in self.running if live.decoding]
        drafts = self._draft(decoding)
        feeds, ready = self._feeds(decoding, drafts)
        outputs = self._run(feeds)
        self._score_prompts(feeds, outputs)
        ready = self._finish_prompts(ready)
        if ready:
            self._sample(ready, drafts, outputs)

    def _end_culprits(self) -> bool:
        """After an error in a step: end the requests whose own settings raise one; whether there are any."""
        flaws = [(live, live.flaw(self._trunk(BASE_MEMBER).embedding_size)) for live in self.running]
        for live, error in flaws:
            if error is not None:
                self._end_with(live, error)
        return any(error is not None for _, error in flaws)

    def fail(self, error: BaseException) -> None:
        """End every request with `error` and free everything."""
        lives = [*self.running, *self.waiting]
        self.running.clear()
        self.waiting.clear()
        for trunk in self.layout.trunks:
            trunk.arena.forget()
        for live in lives:
            live.deliver(error)

    # --- (1) who runs -------------------------------------------------------------------------------------------

    def end_cancelled(self) -> None:
        """Free what cancelled requests hold."""
        for live in [live for live in self.running if live.cancelled]:
            self._end(live, "cancelled")
        for live in [live for live in self.waiting if live.cancelled]:
            self.waiting.remove(live)
            live.deliver(live.completion("cancelled"))

    def _end(self, live: Live, ending: Ending) -> None:
        self._free(live, sound=ending != "cancelled" or bool(live.tokens))
        live.deliver(live.completion(ending))

    def _end_with(self, live: Live, error: Exception) -> None:
        """End one request with an error that is nobody else's matter."""
        self._free(live, sound=False)
        live.deliver(error)

    def _free(self, live: Live, *, sound: bool) -> None:
        self.running.remove(live)
        for member, row in live.rows.items():
            self._trunk(member).arena.give_back(row, sound=sound)
        live.rows = {}

    def _admit(self) -> None:
        while self.waiting and self._fits(self.waiting[0]):
            live = self.waiting.popleft()
            # Log-probs are wanted at every token of a prompt that is scored, so every token must be run.
            known = live.ids[:1] if live.scores_prompt else live.ids
            for member in live.members:
                trunk, place = self.layout.places[member]
                live.rows[member] = self.layout.trunks[trunk].arena.take(place, known)
            live.reused = len(live.rows[BASE_MEMBER].ids)
            self.running.append(live)

    def _fits(self, live: Live) -> bool:
        if len(self.running) >= self.streams:
            return False
        needed = [self.layout.places[member][0] for member in live.members]
        return all(trunk.arena.free >= needed.count(i) for i, trunk in enumerate(self.layout.trunks))

    def _trunk(self, member: int) -> Trunk:
        return self.layout.trunks[self.layout.places[member][0]]

    # --- (2) drafts ---------------------------------------------------------------------------------------------

    def _draft(self, lives: Sequence[Live]) -> dict[Live, _Draft]:
        lengths = {live: live.drafts() for live in lives}
        drafts = {live: _Draft() for live, length in lengths.items() if length}
        for i in range(max(lengths.values(), default=0)):
            now = [live for live in drafts if lengths[live] > i]
            outputs = self._run_guessers(now, drafts)
            shaped_PV = shape(self._guess(now, outputs), [live.place(drafts[live].tokens) for live in now])
            settings = [live.request.sampling for live in now]
            tokens = draw(shaped_PV, settings, [live.key(i, Purpose.DRAFT) for live in now]).tolist()
            for row, (live, token) in enumerate(zip(now, tokens, strict=True)):
                drafts[live].tokens.append(token)
                drafts[live].shaped.append(shaped_PV[row : row + 1])
        return drafts

    def _run_guessers(self, lives: Sequence[Live], drafts: Mapping[Live, _Draft]) -> Outputs:
        """Bring the drafting members up to the last draft; what they say of the next token."""
        feeds: list[tuple[Live, int, Feed]] = []
        for live in lives:
            done = drafts[live].tokens
            for member in live.guessers:
                row = live.rows[member]
                feeds.append((live, member, Feed(row, [*live.ids, *done][len(row.ids) :], 1)))
        outputs = self._run(feeds)
        for live in lives:
            for member in live.guessers:
                drafts[live].members.setdefault(member, []).append(outputs[live, member])
        return outputs

    def _guess(self, lives: Sequence[Live], outputs: Outputs) -> Tensor:
        """What the next token of each may be, [P, V]."""
        members = sorted({member for live in lives for member in live.guessers})
        columns = [self._column(lives, member, outputs) for member in members]
        powers_PM = torch.tensor([[live.guessers.get(member, 0.0) for member in members] for live in lives])
        return guess(columns, powers_PM.to(self.layout.device), [self.layout.unknown[member - 1] for member in members])

    def _column(self, lives: Sequence[Live], member: int, outputs: Outputs) -> Tensor:
        """One member's log-probs at one position of each request, 0 where it does not run."""
        rows = [outputs.get((live, member)) for live in lives]
        some = next(row for row in rows if row is not None)
        none = torch.zeros_like(some[:1])
        return torch.cat([none if row is None else row for row in rows]).to(self.layout.device)

    # --- (3) one pass of every trunk ----------------------------------------------------------------------------

    def _feeds(
        self, decoding: Sequence[Live], drafts: Mapping[Live, _Draft]
    ) -> tuple[list[tuple[Live, int, Feed]], list[Live]]:
        """What every trunk runs now, and the requests that get a token from it."""
        feeds: list[tuple[Live, int, Feed]] = []
        ready = list(decoding)
        for live in decoding:
            tokens = drafts[live].tokens if live in drafts else []
            for member in live.members:
                if member in live.guessers and (tokens or self.layout.is_draft_model(member)):
                    continue  # it has run already, or need not run now
                ids = [*live.missing(member), *tokens]
                feeds.append((live, member, Feed(live.rows[member], ids, len(tokens) + 1)))
        budget = self.chunk
        for live in self.running:
            if live.decoding or budget <= 0:
                continue
            missing = {member: live.missing(member) for member in live.members}
            total = sum(map(len, missing.values()))
            whole = total <= max(budget, len(live.members))
            share = max(1, budget // len(missing))
            for member, ids in missing.items():
                # All rows run the prompt's last token together: their log-probabilities are combined there.
                part = ids if whole else ids[: min(len(ids) - 1, share)]
                if part:
                    scores = live.scores_prompt and not self.layout.is_draft_model(member)
                    want = len(part) if scores else int(whole)
                    feeds.append((live, member, Feed(live.rows[member], part, want)))
                    budget -= len(part)
            if whole:
                live.decoding = True
                ready.append(live)
        return feeds, ready

    def _run(self, feeds: Sequence[tuple[Live, int, Feed]]) -> Outputs:
        outputs: Outputs = {}
        for index, trunk in enumerate(self.layout.trunks):
            mine = [entry for entry in feeds if self.layout.places[entry[1]][0] == index]
            if mine:
                results = trunk.forward([feed for _, _, feed in mine])
                for (live, member, _), log_probs in zip(mine, results, strict=True):
                    outputs[live, member] = log_probs
        return outputs

    # --- (4) to (6) ---------------------------------------------------------------------------------------------

    def _score_prompts(self, feeds: Sequence[tuple[Live, int, Feed]], outputs: Outputs) -> None:
        """Note what is said of the prompts' tokens that were run; of `outputs`, what follows the last one stays."""
        spots: list[Spot] = []
        tokens: list[int] = []
        at: Outputs = {}
        for live in {live: None for live, _, _ in feeds if live.scores_prompt and not live.tokens}:
            members = [member for member in live.members if not self.layout.is_draft_model(member)]
            run = len(outputs[live, BASE_MEMBER])  # as many tokens by every member
            end = len(live.rows[BASE_MEMBER].ids)
            next_ids = live.ids[end - run + 1 : end + 1]
            spots += [(live, i) for i in range(len(next_ids))]
            tokens += next_ids
            for member in members:
                if next_ids:
                    at[live, member] = outputs[live, member][: len(next_ids)]
                outputs[live, member] = outputs[live, member][-1:]
        if not spots:
            return
        table = make_table(spots, at, self.layout.unknown, self.layout.device)
        tops = [live.request.prompt_log_probs or 0 for live, _ in spots]
        looked_up = table.look_up(spots, tokens, tops, self.layout.reward_names)
        for (live, _), token in zip(spots, looked_up, strict=True):
            if live.rows and math.isnan(token.log_prob):
                self._end_with(live, _not_a_number(live, token))
            live.scored.append(token)

    def _finish_prompts(self, ready: Sequence[Live]) -> list[Live]:
        """Those of `ready` that go on with a reply."""
        for live in ready:
            if live.rows and not live.tokens:
                ending = live.prompt_done()
                if ending is not None:
                    self._end(live, ending)
        return [live for live in ready if live.rows]

    def _sample(self, ready: Sequence[Live], drafts: Mapping[Live, _Draft], outputs: Outputs) -> None:
        table = self._first_table(ready, drafts, outputs)
        accepted = self._accept(drafts, table, outputs)
        whole = [live for live, draft in drafts.items() if accepted[live] == len(draft.tokens)]
        ended = [live for live in whole if live.ends_in(drafts[live].tokens)]
        whole = [live for live in whole if live not in ended]
        if whole:
            table = join(table, self._table_after_drafts(whole, drafts, outputs))
        kept = {live: drafts[live].tokens[: accepted[live]] if live in drafts else [] for live in ready}
        sampled = self._draw([live for live in ready if live not in ended], drafts, kept, table)
        spots: list[Spot] = []
        tokens: list[int] = []
        for live in ready:
            new = [*kept[live], *sampled.get(live, ())]
            spots += [(live, i) for i in range(len(new))]
            tokens += new
        tops = [live.request.top_log_probs for live, _ in spots]
        looked_up = table.look_up(spots, tokens, tops, self.layout.reward_names)
        for live in ready:
            live.keep_rows(len(kept[live]))
            if live in drafts and not drafts[live].sound:
                for member, row in live.rows.items():
                    self._trunk(member).arena.clean(row, len(row.ids))
        for (live, _), token in zip(spots, looked_up, strict=True):
            if live.rows:  # an earlier token may have ended it
                self._append(live, token)

    def _append(self, live: Live, token: Token) -> None:
        try:
            if math.isnan(token.log_prob):
                raise _not_a_number(live, token)
            self._check_readable(token.id)
            ending = live.append(token)
        except Exception as error:  # of its numbers or its text
            self._end_with(live, error)
            return
        if ending is not None:
            self._end(live, ending)

    def _check_readable(self, token: int) -> None:
        size = self._trunk(BASE_MEMBER).embedding_size
        if token >= size:
            raise MemberError(
                f"the base said the token id {token}, which it cannot read: its output layer has more rows than its "
                f"embedding, which has {size}; forbid such ids with a logit bias of -100 or resize the model's layers"
            )

    def _first_table(self, ready: Sequence[Live], drafts: Mapping[Live, _Draft], outputs: Outputs) -> Table:
        """The positions that drafts are verified at, or the only one of a request without drafts."""
        spots: list[Spot] = []
        at: Outputs = {}
        for live in ready:
            draft = drafts.get(live)
            count = len(draft.tokens) if draft else 1
            spots += [(live, i) for i in range(count)]
            for member in live.members:
                if self.layout.is_draft_model(member):
                    continue
                if draft and member in live.guessers:
                    at[live, member] = torch.cat(draft.members[member])
                else:
                    at[live, member] = outputs[live, member][:count]
        return make_table(spots, at, self.layout.unknown, self.layout.device)

    def _table_after_drafts(self, lives: Sequence[Live], drafts: Mapping[Live, _Draft], outputs: Outputs) -> Table:
        """The position after the last draft of requests that keep them all; the drafting ARMs run only now."""
        feeds = [
            (live, member, Feed(live.rows[member], drafts[live].tokens[-1:], 1))
            for live in lives
            for member in live.guessers
            if not self.layout.is_draft_model(member)
        ]
        at = self._run(feeds)
        for live in lives:
            for member in live.members:
                if member not in live.guessers:
                    at[live, member] = outputs[live, member][-1:]
        spots = [(live, len(drafts[live].tokens)) for live in lives]
        return make_table(spots, at, self.layout.unknown, self.layout.device)

    def _accept(self, drafts: Mapping[Live, _Draft], table: Table, outputs: Outputs) -> dict[Live, int]:
        """How many drafts of each request stay."""
        if not drafts:
            return {}
        spots = [(live, i) for live, draft in drafts.items() for i in range(len(draft.tokens))]
        target_PV = shape(table.guided(spots), [live.place(drafts[live].tokens[:i]) for live, i in spots])
        draft_PV = torch.cat([row for draft in drafts.values() for row in draft.shaped])
        tokens_P = torch.tensor([drafts[live].tokens[i] for live, i in spots]).to(target_PV.device)
        numbers = [acceptance(target_PV, draft_PV, tokens_P)]
        # What follows the last draft is looked at later or never, but it must not leave NaN behind.
        verifying = {live: [m for m in live.members if m not in live.guessers] for live in drafts}
        for live, members in verifying.items():
            numbers += [outputs[live, m][-1, drafts[live].tokens[-1:]].to(target_PV.device) for m in members]
        found = iter(torch.cat(numbers).tolist())
        chances = {live: [next(found) for _ in draft.tokens] for live, draft in drafts.items()}
        accepted = {}
        for live, draft in drafts.items():
            last = [next(found) for _ in verifying[live]]
            draft.sound = not any(map(math.isnan, (*chances[live], *last)))
            mine = [0.0 if math.isnan(chance) else chance for chance in chances[live]]
            stays = [uniform(live.key(i, Purpose.ACCEPT)) < chance for i, chance in enumerate(mine)]
            accepted[live] = stays.index(False) if False in stays else len(stays)
            live.length.saw(mine[: accepted[live] + 1])
            live.drafted += len(mine)
            live.accepted += accepted[live]
        return accepted

    def _draw(
        self, lives: Sequence[Live], drafts: Mapping[Live, _Draft], kept: Mapping[Live, list[int]], table: Table
    ) -> dict[Live, list[int]]:
        """The token after the kept drafts of each request: from the residual where the next draft was refused."""
        if not lives:
            return {}
        ahead = [len(kept[live]) for live in lives]
        shaped_PV = shape(
            table.guided(list(zip(lives, ahead, strict=True))), [live.place(kept[live]) for live in lives]
        )
        refused = [i for i, live in enumerate(lives) if live in drafts and ahead[i] < len(drafts[live].tokens)]
        if refused:
            rows = torch.tensor(refused, device=shaped_PV.device)
            draft_PV = torch.cat([drafts[lives[i]].shaped[ahead[i]] for i in refused])
            shaped_PV = shaped_PV.index_copy(0, rows, residual(shaped_PV[rows], draft_PV))
        settings = [live.request.sampling for live in lives]
        keys = [live.key(i, Purpose.TOKEN) for live, i in zip(lives, ahead, strict=True)]
        tokens = draw(shaped_PV, settings, keys).tolist()
        return {live: [token] for live, token in zip(lives, tokens, strict=True)}


def _not_a_number(live: Live, token: Token) -> GenarmError:
    """Whose log-probs are NaN; where all members' are numbers, the weights were too much for their sum."""
    said = {"the base": token.base, **{f"the reward {name!r}": value for name, value in token.rewards.items()}}
    silent = [name for name, value in said.items() if value is None or math.isnan(value)]
    if silent:
        return MemberError(
            f"{' and '.join(silent)} gave NaN instead of log-probabilities after {len(live.ids)} tokens; the weights "
            "of that model are broken, or too large for its dtype: try --dtype float32"
        )
    return WeightsError("the sum of log-probabilities overflows with these reward weights; use smaller ones")
