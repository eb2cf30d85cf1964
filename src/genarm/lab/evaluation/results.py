"""What a comparison measured, row by row, before any statistics: figures and report are made from this alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from genarm.statistics import Outcome, Proportion, points


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a method's replies cost.

    Attributes:
        seconds: wall time of each batch, models loaded already; methods that are timed in turns answer the same
            prompts in the same batch.
        tokens: of the replies that were given, the ends included.
        forwards: {member: forwards of single rows}, as `genarm.lab.methods.interface` counts them.
        positions: {member: positions computed}.
    """

    seconds: tuple[float, ...]
    tokens: int
    forwards: Mapping[str, int]
    positions: Mapping[str, int]

    def per_token(self, amount: float) -> float:
        """`amount` for each token of the replies; NaN where no token was given."""
        return amount / self.tokens if self.tokens else float("nan")

    @property
    def seconds_per_token(self) -> float:
        """NaN where no token was given."""
        return self.per_token(sum(self.seconds))

    @property
    def forwards_per_token(self) -> float:
        """Of all members together; NaN where no token was given."""
        return self.per_token(sum(self.forwards.values()))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One method: a row of the table. Sequences are in the order of the prompts.

    Attributes:
        name: of the row.
        family: the curve that the row is a point of.
        weights: its weight for each reward or policy, where it has any; a row that stands for a preference has one
            for each objective, by the objective's name.
        replies, tokens: text and length in tokens of each reply.
        scores: {judge: score of each reply}, of the judges that score single replies.
        kl: of each reply in nats, Σ_t KL(π_t ‖ π_base,t) along it, or log π(y|x) − log π_base(y|x) where the whole
            distributions are not known; the mean of either estimates the KL divergence from the base. None where the
            method's density is not known.
        kl_bound: an upper bound of the divergence where theory has one (Best-of-N: log N − (N − 1)/N).
        cost: of all replies together.
        exponent: what the coefficients of its log-probs add up to, over the temperature: where what it adds to the base
            says nothing, it is the base with every probability to this power. None where it is no such sum.
        reward: the reward trained for this run that guides it, where that is one alone.
        steers_another: whether it steers another base than the first row, from which its KL is then measured.
    """

    name: str
    family: str
    weights: Mapping[str, float]
    replies: tuple[str, ...]
    tokens: tuple[int, ...]
    scores: Mapping[str, tuple[float, ...]]
    kl: tuple[float, ...] | None
    kl_bound: float | None
    cost: Cost
    exponent: float | None = None
    reward: str | None = None
    steers_another: bool = False

    @property
    def distances(self) -> tuple[float, ...] | None:
        """How far each reply is from the run's base in nats, or at most; None where that is not known."""
        if self.steers_another:
            return None
        bound = None if self.kl_bound is None else (self.kl_bound,) * len(self.replies)
        return bound if self.kl is None else self.kl


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """A judge's verdict on `first` against `second` for each prompt; None where its reply could not be parsed."""

    judge: str
    first: str
    second: str
    outcomes: tuple[Outcome | None, ...]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model that was trained for the run.

    Attributes:
        name, kind: as in the recipe; the kind is one of `genarm train`.
        loss: of an ARM.
        metrics: of its training, as in its metrics.json (eval_accuracy with its interval, train_seconds, …).
        policy: of held-out pairs, how many the policy that it makes of the base at weight 1 ranks right.
    """

    name: str
    kind: str
    metrics: Mapping[str, float]
    loss: str | None = None
    policy: Proportion | None = None


@dataclass(frozen=True, kw_only=True)
class Results:
    """One run.

    Attributes:
        title, scale: of the recipe.
        command, date, versions, machine: how, when and on what it was made.
        settings: seed, number of prompts, sampling.
        prompts: their texts.
        reference: the method that all others are compared with.
        measured: the methods, in the recipe's order; the first one is the base.
        verdicts: of judges that compare; of those that score, the higher score wins.
        trained: the models trained for it.
        published: the recipe's published figures, as its tables say.
        notes: what a reader must know, such as replies of a judge that could not be parsed.
    """

    title: str
    scale: str
    command: str
    date: str
    versions: Mapping[str, str]
    machine: str
    settings: Mapping[str, Any]
    prompts: tuple[str, ...]
    reference: str
    measured: tuple[Measured, ...]
    verdicts: tuple[Verdicts, ...]
    trained: tuple[Trained, ...] = ()
    published: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    def row(self, name: str) -> Measured:
        """The method of this name."""
        return next(row for row in self.measured if row.name == name)

    def outcomes(self, judge: str, first: str, second: str) -> tuple[Outcome | None, ...] | None:
        """What `judge` says of `first` against `second`, prompt by prompt; None where it says nothing.

        Its verdicts, whichever side they were given from, or else its scores, of which the higher wins.
        """
        for verdicts in self.verdicts:
            if verdicts.judge == judge and (verdicts.first, verdicts.second) == (first, second):
                return verdicts.outcomes
            if verdicts.judge == judge and (verdicts.first, verdicts.second) == (second, first):
                return tuple(_TURNED[outcome] for outcome in verdicts.outcomes)
        mine, theirs = (self.row(name).scores.get(judge) for name in (first, second))
        if mine is None or theirs is None:
            return None
        return tuple(_higher_wins(a, b) for a, b in zip(mine, theirs, strict=True))

    def quality(self, judge: str, name: str) -> tuple[float, ...] | None:
        """How good `judge` finds each reply of a method; None where it says nothing.

        Its scores, or, where it only compares, the points of its verdicts on the method against the reference.
        """
        scores = self.row(name).scores.get(judge)
        if scores is not None:
            return scores
        if name == self.reference:
            return (0.5,) * len(self.prompts)
        outcomes = self.outcomes(judge, name, self.reference)
        return None if outcomes is None else points(outcomes)


_TURNED: Mapping[Outcome | None, Outcome | None] = {"win": "lose", "tie": "tie", "lose": "win", None: None}


def _higher_wins(mine: float, theirs: float) -> Outcome:
    if mine == theirs:
        return "tie"
    return "win" if mine > theirs else "lose"
