"""A request while it runs."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from genarm.engine.kv_cache import Row
from genarm.engine.noise import Purpose, key
from genarm.engine.reply import GrowingReply
from genarm.engine.request import Ending, ScoredPrompt, Token
from genarm.engine.sampler import Place, draw, shape
from genarm.engine.speculation import DraftLength

BASE_MEMBER = 0


class Snapshot(NamedTuple):
    """What a step changes of a request before it delivers anything."""

    row_lengths: Mapping[int, int]
    scored: int
    decoding: bool
    length: DraftLength
    drafted: int
    accepted: int


@dataclass(eq=False, kw_only=True)
class RequestState(GrowingReply):
    """A request that waits or runs.

    Attributes:
        ids: the prompt's and the reply's tokens so far.
        contexts: {member: token ids of the prompt as it reads it} of those that read another one.
        factors: what the log-probs of each member that runs for it are multiplied by, the base's (0) first; members
            that only draft have none.
        prompt_factors: likewise for the prompt's own tokens, of which wishes say nothing.
        rewards: those of them that are rewards with a weight.
        members: members that run for it, the base (0) first; rewards count from 1.
        guessers: {member: power} of those that draft for it.
        rows: {member: row} once it is admitted.
        cancelled: set from outside; it ends at the next step.
        scored: numbers of the prompt's tokens so far, where they are asked for.
    """

    ids: list[int]
    contexts: Mapping[int, Sequence[int]]
    factors: Mapping[int, float]
    prompt_factors: Mapping[int, float]
    rewards: frozenset[int]
    members: Sequence[int]
    guessers: Mapping[int, float]
    length: DraftLength
    rows: dict[int, Row] = field(default_factory=dict)
    cancelled: bool = False
    decoding: bool = False
    scored: list[Token] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.ids)
        self._prompt = frozenset(self.ids) if self.request.sampling.repetition_penalty != 1 else frozenset()

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probs are wanted at every token of the prompt."""
        return self.request.prompt_log_probs is not None

    def read_by(self, member: int) -> Sequence[int]:
        """The prompt as a member reads it."""
        return self.contexts.get(member, self.ids[: self.prompt_tokens])

    def missing(self, member: int) -> list[int]:
        """Tokens that the member's row does not hold yet."""
        held = len(self.rows[member].ids)
        context = self.contexts.get(member)
        if context is None:
            return self.ids[held:]
        if held < len(context):
            return [*context[held:], *self.ids[self.prompt_tokens :]]
        return self.ids[held - len(context) + self.prompt_tokens :]

    def length_for(self, member: int) -> int:
        """How many tokens a member has to read, up to the last that is known."""
        context = self.contexts.get(member)
        return len(self.ids) + (0 if context is None else len(context) - self.prompt_tokens)

    def place(self, drafts: Sequence[int] = ()) -> Place:
        """Where the token after `drafts` is sampled."""
        sampling, counts = self.request.sampling, self.counts
        if drafts and sampling.counts:
            counts = counts + Counter(drafts)
        early = len(self.tokens) + len(drafts) < sampling.min_new_tokens
        return Place(sampling=sampling, counts=counts, prompt=self._prompt, banned=self.stops if early else ())

    def key(self, ahead: int, purpose: Purpose) -> int:
        """Names the random numbers for the token `ahead` places after the next one."""
        return key(self.request.seed, len(self.ids) + ahead, purpose)

    def drafts(self) -> int:
        """How many tokens to draft now: never more than may still come, less the one that is sampled anyway."""
        if not self.guessers:
            return 0
        return max(0, min(self.length.next(), self.limit - len(self.tokens) - 1))

    def ends_in(self, drafts: Sequence[int]) -> bool:
        """Whether one of `drafts` ends the reply."""
        return not self.stops.isdisjoint(drafts)

    def keep_rows(self, accepted: int) -> None:
        """Let rows forget the drafts that were not accepted; call before `append`."""
        for member, row in self.rows.items():
            del row.ids[self.length_for(member) + accepted :]

    def flaw(self, size: int) -> Exception | None:
        """What goes wrong where its settings are applied to log-probs of `size` ids, if anything does."""
        try:
            shaped_1V = shape(torch.zeros(1, size), [self.place()])
            draw(shaped_1V, [self.request.sampling], [self.key(0, Purpose.TOKEN)])
        except Exception as error:
            return error
        return None

    def snapshot(self) -> Snapshot:
        """For `restore`, should the step fail."""
        lengths = {member: len(row.ids) for member, row in self.rows.items()}
        return Snapshot(lengths, len(self.scored), self.decoding, copy.copy(self.length), self.drafted, self.accepted)

    def restore(self, before: Snapshot) -> None:
        """Be as before the step."""
        for member, row in self.rows.items():
            del row.ids[before.row_lengths[member] :]
        del self.scored[before.scored :]
        self.decoding, self.length = before.decoding, before.length
        self.drafted, self.accepted = before.drafted, before.accepted

    def prompt_done(self) -> Ending | None:
        """Deliver the prompt's numbers, if they are wanted, and say whether the request ends here."""
        if self.scores_prompt:
            self.deliver(ScoredPrompt(tokens=tuple(self.scored)))
        return None if self.request.reply else "length"

    def append(self, token: Token) -> Ending | None:
        """As any reply does; and the next forward reads the token."""
        self.ids.append(token.id)
        self.counts[token.id] += 1
        return super().append(token)
