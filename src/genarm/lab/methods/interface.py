"""What every method of the comparison is: something that answers a batch of prompts, with its model calls counted.

A call is counted per row: one forward of a model over a batch of B rows is B forwards, whatever the number of
positions, because that is what a user waits or pays for; positions are counted beside it. Padding is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from genarm.lab.prefix import Counter
from genarm.lab.replies import SampledReply


@dataclass(kw_only=True)
class Count:
    """Work of one model: `forwards` of single rows, and the `positions` that they computed."""

    forwards: int = 0
    positions: int = 0


@dataclass(kw_only=True)
class Meter:
    """Counts the work of models by the name of what they are (base, a reward's name, …)."""

    counts: dict[str, Count] = field(default_factory=dict)

    def add(self, member: str, *, forwards: int, positions: int) -> None:
        """Count work of one model."""
        count = self.counts.setdefault(member, Count())
        count.forwards += forwards
        count.positions += positions

    def counter(self, *members: str) -> Counter:
        """Counts the forwards of a model once for each of `members`: a guided model runs several in one forward."""

        def count(forwards: int, positions: int) -> None:
            for member in members:
                self.add(member, forwards=forwards, positions=positions)

        return count


class Method(Protocol):
    """Answers prompts. Methods that train a model beforehand are the sampling of that model."""

    def answer(self, prompts: Sequence[Sequence[int]], *, seed: int, meter: Meter) -> list[SampledReply]:
        """A reply to each prompt (token ids), all decoded together.

        A row draws random numbers of its own, named by `seed` and its place in the batch, so that its reply does
        not depend on the other rows.
        """
        ...

    def log_probs(self, prompts: Sequence[Sequence[int]], replies: Sequence[SampledReply]) -> list[float] | None:
        """log π(reply | prompt) of each reply in nats, EOS included; None where the method has no known density.

        This is bookkeeping for the divergence from the base, never counted as work of the method.
        """
        ...
