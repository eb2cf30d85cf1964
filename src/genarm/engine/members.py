"""The members of a guided model as the engine runs them: which trunk has each, and one pass of all trunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from genarm.engine.attention import Feed
from genarm.engine.request_state import BASE_MEMBER, RequestState
from genarm.engine.trunk import Trunk

Outputs: TypeAlias = dict[tuple[RequestState, int], Tensor]
"""{(request, member): float32 log-probs [positions, V]}."""


class Read(NamedTuple):
    """New tokens of one request that one member reads."""

    state: RequestState
    member: int
    feed: Feed


@dataclass(frozen=True, kw_only=True)
class Members:
    """Which trunk runs each member, and as which of that trunk's own members: `places[member]`.

    Members are the base (0), the rewards (1 … R), references that are none of these (up to S) and perhaps a draft
    model (S + 1). The last of the rewards stand for wishes that a request has of its own. Members with a wish read
    prompts of their own; they may have the same place as the member that they are without it. Those that are adapters
    of the base's output layer read nothing at all: what they say is told from the base's hidden states.

    Attributes:
        reward_names: of members 1 … R.
        wishes: {member: system text} of the model's wishes.
        own_wishes: the members that stand for a request's own.
        references: of each reward, the member that it is compared with, if any.
        of_the_output: {member: which of the base trunk's adapters of the output layer}; their place is the base's.
        unknown: for every member but the base a mask [V] of the ids that it does not know, or None.
    """

    trunks: Sequence[Trunk]
    places: Sequence[tuple[int, int]]
    reward_names: Sequence[str]
    references: Sequence[int | None]
    unknown: Sequence[Tensor | None]
    wishes: Mapping[int, str]
    own_wishes: Sequence[int]
    of_the_output: Mapping[int, int]

    @property
    def device(self) -> torch.device:
        """Where distributions are combined: the base's."""
        return self.trunk(BASE_MEMBER).device

    @property
    def embedding_size(self) -> int:
        """How many ids the base can read."""
        return self.trunk(BASE_MEMBER).embedding_size

    def is_draft_model(self, member: int) -> bool:
        """Whether a member only drafts and has no part in the combination."""
        return member > self.combined

    @property
    def combined(self) -> int:
        """S, how many members beside the base the combination is made of."""
        return max((len(self.reward_names), *(place or 0 for place in self.references)))

    def trunk(self, member: int) -> Trunk:
        """The trunk that runs a member."""
        return self.trunks[self.places[member][0]]

    def readers(self, state: RequestState) -> list[int]:
        """Those of a request's members that have rows, and read."""
        return [member for member in state.members if member not in self.of_the_output]

    def run(self, reads: Sequence[Read]) -> Outputs:
        """One forward of every trunk that has something to read; the rows then hold it."""
        outputs: Outputs = {}
        for index, trunk in enumerate(self.trunks):
            mine = [read for read in reads if self.places[read.member][0] == index]
            if mine:
                told = [self._told_by(read) for read in mine]
                riders = [[self.of_the_output[member] for member in of] for of in told]
                results = trunk.forward([read.feed for read in mine], riders)
                for read, of, said in zip(mine, told, results, strict=True):
                    outputs.update(
                        ((read.state, member), s) for member, s in zip((read.member, *of), said, strict=True)
                    )
        return outputs

    def _told_by(self, read: Read) -> list[int]:
        """The members that what is read here tells of, too."""
        if read.member != BASE_MEMBER or not self.of_the_output:
            return []
        return [member for member in read.state.members if member in self.of_the_output]
