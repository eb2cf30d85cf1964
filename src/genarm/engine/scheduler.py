"""Which requests run, and what every member reads in a step: decoding tokens, drafts to verify, chunks of prompts.

Requests wait in order of arrival and are admitted while the KV caches have rows for all of their members. Prefill is
chunked: a step runs at most `chunk` prompt tokens, beside the tokens of all requests that decode, so that a long prompt
delays nobody's next token by more than that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from genarm.engine.attention import Feed
from genarm.engine.members import Members, Read
from genarm.engine.request import Ending
from genarm.engine.request_state import BASE_MEMBER, RequestState


class Schedule(NamedTuple):
    """What the members read now, and the requests that get a token from it."""

    reads: list[Read]
    ready: list[RequestState]


class Scheduler:
    """Requests that wait and requests that run. Not thread-safe.

    Attributes:
        streams: the most requests that run at once.
        chunk: the most prompt tokens run per step, over all rows.
        waiting, running: in order of arrival.
    """

    def __init__(self, members: Members, *, streams: int, chunk: int) -> None:
        self.members = members
        self.streams = streams
        self.chunk = chunk
        self.waiting: deque[RequestState] = deque()
        self.running: list[RequestState] = []

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.running)

    @property
    def decoding(self) -> list[RequestState]:
        """Running requests whose prompts have been read."""
        return [state for state in self.running if state.decoding]

    def add(self, state: RequestState) -> None:
        """Let a request wait for its turn."""
        self.waiting.append(state)

    def admit(self) -> None:
        """Let waiting requests run, in their order, while there are rows; each takes over the prefix that is cached."""
        while self.waiting and self._fits(self.waiting[0]):
            state = self.waiting.popleft()
            for member in self.members.readers(state):
                known = state.read_by(member)
                # Log-probs are wanted at every token of a prompt that is scored, so every token must be run.
                if state.scores_prompt and member not in state.contexts:
                    known = known[:1]
                trunk, place = self.members.places[member]
                state.rows[member] = self.members.trunks[trunk].kv_cache.take(place, known)
            state.reused = len(state.rows[BASE_MEMBER].ids)
            self.running.append(state)

    def _fits(self, state: RequestState) -> bool:
        if len(self.running) >= self.streams:
            return False
        needed = [self.members.places[member][0] for member in self.members.readers(state)]
        return all(trunk.kv_cache.free >= needed.count(i) for i, trunk in enumerate(self.members.trunks))

    def schedule(self, drafts: Mapping[RequestState, Sequence[int]]) -> Schedule:
        """What every member reads in this step, where `drafts` are the tokens to verify of some decoding requests."""
        reads: list[Read] = []
        ready = self.decoding
        for state in ready:
            reads += self._decode(state, drafts.get(state, ()))
        budget = self.chunk
        for state in self.running:
            if state.decoding or budget <= 0:
                continue
            prefill, whole = self._prefill(state, budget)
            reads += prefill
            budget -= sum(len(read.feed.ids) for read in prefill)
            if whole:
                state.decoding = True
                ready.append(state)
        return Schedule(reads, ready)

    def _decode(self, state: RequestState, drafts: Sequence[int]) -> list[Read]:
        """The last token and the drafts after it.

        A member that drafts has read all but the last draft while it drafted, so it has no part in verification: its
        row is one token behind those of the others until the drafts are accepted or forgotten.
        """
        reads = []
        for member in state.rows:
            if member in state.guessers and (drafts or self.members.is_draft_model(member)):
                continue
            ids = [*state.missing(member), *drafts]
            reads.append(Read(state, member, Feed(state.rows[member], ids, len(drafts) + 1)))
        return reads

    def _prefill(self, state: RequestState, budget: int) -> tuple[list[Read], bool]:
        """The next chunk of a prompt, about `budget` tokens over all members, and whether it is the last one."""
        missing = {member: state.missing(member) for member in state.rows}
        whole = sum(map(len, missing.values())) <= max(budget, len(missing))
        share = max(1, budget // len(missing))
        reads = []
        for member, ids in missing.items():
            # All members read the prompt's last token in one step: their log-probabilities are combined there.
            part = ids if whole else ids[: min(len(ids) - 1, share)]
            if part:
                scores = state.scores_prompt and self._speaks_of_prompts(state, member)
                reads.append(Read(state, member, Feed(state.rows[member], part, len(part) if scores else int(whole))))
        return reads, whole

    def _speaks_of_prompts(self, state: RequestState, member: int) -> bool:
        """Whether a member has a say in a prompt's own tokens: not one that drafts, nor one that reads another."""
        return not self.members.is_draft_model(member) and member not in state.contexts

    # --- ends ---------------------------------------------------------------------------------------------------

    def end(self, state: RequestState, ending: Ending) -> None:
        """Free the request's rows, whose content stays for requests that begin alike, and deliver its completion."""
        self._free(state, sound=ending != "cancelled" or bool(state.tokens))
        state.deliver(state.completion(ending))

    def end_with(self, state: RequestState, error: Exception) -> None:
        """End one request with an error that is nobody else's matter."""
        self._free(state, sound=False)
        state.deliver(error)

    def end_cancelled(self) -> None:
        """Free what cancelled requests hold."""
        for state in [state for state in self.running if state.cancelled]:
            self.end(state, "cancelled")
        for state in [state for state in self.waiting if state.cancelled]:
            self.waiting.remove(state)
            state.deliver(state.completion("cancelled"))

    def fail(self, error: BaseException) -> None:
        """End every request with `error` and free everything."""
        states = [*self.running, *self.waiting]
        self.running.clear()
        self.waiting.clear()
        for trunk in self.members.trunks:
            trunk.kv_cache.forget()
        for state in states:
            state.deliver(error)

    def _free(self, state: RequestState, *, sound: bool) -> None:
        self.running.remove(state)
        for member, row in state.rows.items():
            self.members.trunk(member).kv_cache.give_back(row, sound=sound)
        state.rows = {}
