"""What every method of the comparison is: something that answers a batch of prompts, with its model calls counted.

A call is counted per row: one forward of a model over a batch of B rows is B forwards, whatever the number of
positions, because that is what a user waits or pays for; positions are counted beside it. Padding is not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from genarm.lab.prefix import Counter as ForwardCounter
from genarm.lab.replies import SampledReply

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from genarm.lab.methods.arm_reward import ArmReward
    from genarm.lab.methods.models import Models
    from genarm.lab.methods.sample import Reader
    from genarm.lab.trajectory import TrajectoryReward
    from genarm.sampling import Sampling


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

    def counter(self, *members: str) -> ForwardCounter:
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


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """One row of the table.

    Attributes:
        kind: the name of a `Kind`.
        name: as the table shows it.
        family: the curve that it is a point of.
        roles: {role: model}.
        table: what `named` are: "rewards", "policies", "tuned" models, or "wishes".
        named: {name: model, or system text of a wish}.
        weights: a weight for each of `named`; of a policy, the preference that it was trained for, if it has one.
        references: {name: untuned model} of tuned ones, where it is not the base.
        system: a text that the model reads with every prompt.
        settings: numbers of the method itself.
        sampling: replaces numbers of the recipe's sampling.
    """

    kind: str
    name: str
    family: str
    roles: Mapping[str, str] = field(default_factory=dict)
    table: str | None = None
    named: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    references: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    settings: Mapping[str, float] = field(default_factory=dict)
    sampling: Mapping[str, float] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """The model that it steers, whose tokenizer reads its prompts; of methods without one, the first model."""
        return self.models[0]

    @property
    def models(self) -> tuple[str, ...]:
        """All of them, as often as they are named."""
        named = () if self.table == "wishes" else self.named.values()
        return (*self.roles.values(), *named, *self.references.values())

    @property
    def texts(self) -> tuple[str, ...]:
        """The system texts that prompts are read with, beside as they are."""
        wishes = self.named.values() if self.table == "wishes" else ()
        return (*wishes, *([] if self.system is None else [self.system]))

    @property
    def used(self) -> list[str]:
        """Those of `named` whose weight is not 0."""
        return [self.named[name] for name, weight in self.weights.items() if weight]

    @property
    def only_trained(self) -> str | None:
        """The ARM trained for the run that guides by itself, by its name there."""
        used = self.used if self.kind == "genarm" else []
        return used[0].removeprefix("@train/") if len(used) == 1 and used[0].startswith("@train/") else None

    @property
    def numbers(self) -> dict[str, Any]:
        """The settings that are none of how replies are drawn."""
        return {name: value for name, value in self.settings.items() if name != "temperature"}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a method is built of: its row of a recipe, the models, the tokenizer, and how replies are drawn.

    `reader` reads prompts with the system texts of the row, where it has any.
    """

    spec: MethodSpec
    models: Models
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    reader: Reader | None = None

    def model(self, role: str) -> PreTrainedModel:
        """The model of a role."""
        return self.models.policy(self.spec.roles[role])

    @property
    def policies(self) -> dict[str, PreTrainedModel]:
        """The named models as policies."""
        return {name: self.models.policy(reference) for name, reference in self.spec.named.items()}

    @property
    def rewards(self) -> dict[str, TrajectoryReward]:
        """The named models as classic rewards."""
        return {name: self.models.reward(reference) for name, reference in self.spec.named.items()}

    @property
    def rewards_of_replies(self) -> dict[str, TrajectoryReward | ArmReward]:
        """The named models as rewards of whole replies, which ARMs are, too."""
        return {name: self.models.reward_of_replies(reference) for name, reference in self.spec.named.items()}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of method: all that a recipe, a plan and a report need to know of it.

    Attributes:
        name: as recipes have it.
        build: makes the method, ready to answer.
        forwards: {model: forwards of single rows} for one reply of so many tokens, at most.
        roles: single models that it must be given.
        named: the table that goes with its weights: of models ("rewards", "policies", "tuned"), of system texts
            ("wishes"), or None. A tuned model may have a reference in the table "references".
        system: whether it must be given a system text.
        settings: its own numbers, and what they are where the recipe leaves them out; None where there is none then.
        kl_bound: what the divergence from the base, or from the base at the temperature that it draws with, is at most
            where theory says so, in nats per reply.
        total: what the coefficients of the log-probs, or logits, that it adds up for a token come to; None where it is
            no such sum. Over the temperature, it is the power of the base that is left where nothing was learnt.
    """

    name: str
    build: Callable[[Parts], Method]
    forwards: Callable[[MethodSpec, int], Mapping[str, float]]
    roles: tuple[str, ...] = ()
    named: str | None = None
    system: bool = False
    settings: Mapping[str, float | None] = field(default_factory=dict)
    kl_bound: Callable[[MethodSpec], float | None] = lambda _: None
    total: Callable[[MethodSpec, Models], float | None] = lambda *_: None


def tally(*work: tuple[str, int]) -> Counter[str]:
    """Forwards by model, those of one that comes twice added up."""
    total: Counter[str] = Counter()
    for reference, count in work:
        total[reference] += count
    return total
