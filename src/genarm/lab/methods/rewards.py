"""Several rewards as one: Σ_i w_i r_i(x, y), where a reward whose weight is 0 is not run.

Shapes: B rows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genarm.lab.methods.interface import Meter, Parts
from genarm.lab.methods.loop import check_sampling, shared_ids
from genarm.lab.prefix import Ids
from genarm.lab.trajectory import ScoredPrefix, TrajectoryReward
from genarm.model.weights import weight_row
from genarm.sampling import Sampling, stop_ids


class RewardOfReplies(Protocol):
    """Scores whole replies, with so many `passes` through a model for each."""

    @property
    def passes(self) -> int:
        """Forwards of a model that a score takes."""
        ...

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a policy with another vocabulary (raises VocabularyError)."""
        ...

    def score(self, prompts: Sequence[Ids], replies: Sequence[Ids]) -> list[float]:
        """r(x, y) of each reply to its prompt; end-of-turn tokens count as they are."""
        ...


R = TypeVar("R", bound=RewardOfReplies)


class WeightedScores(Generic[R]):
    """Rewards of whole replies by name, with their weights."""

    def __init__(
        self,
        rewards: Mapping[str, R],
        weights: Mapping[str, float],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Put them together with the policy's tokenizer.

        Args:
            rewards: by name.
            weights: by the same names; 1 where not given.
            tokenizer: the policy's.

        Raises:
            WeightsError: a weight of no reward, or one that is not finite.
            VocabularyError: a reward with other tokens than the policy.
        """
        row = weight_row(weights, dict.fromkeys(rewards, 1.0))
        self._parts = [(n, r, w) for (n, r), w in zip(rewards.items(), row, strict=True) if w != 0]
        for _, reward, _ in self._parts:
            reward.check(tokenizer)

    def score(self, prompts: Sequence[Ids], replies: Sequence[Ids], meter: Meter) -> list[float]:
        """Σ_i w_i r_i of each reply to its prompt."""
        positions = sum(map(len, prompts)) + sum(map(len, replies))
        totals = [0.0] * len(replies)
        for name, reward, weight in self._parts:
            scores = reward.score(prompts, replies)
            meter.add(name, forwards=reward.passes * len(replies), positions=reward.passes * positions)
            totals = [total + weight * score for total, score in zip(totals, scores, strict=True)]
        return totals


class WeightedRewards(WeightedScores[TrajectoryReward]):
    """Rewards that can follow a reply as it grows, too."""

    @property
    def models(self) -> list[TrajectoryReward]:
        """Those that are run."""
        return [reward for _, reward, _ in self._parts]

    def prefix(self, meter: Meter) -> WeightedPrefix:
        """Rows to be scored again and again as they grow."""
        return WeightedPrefix([(weight, reward.prefix(meter.counter(name))) for name, reward, weight in self._parts])


class WeightedPrefix:
    """What the rewards have read; every method does the same as that of `ScoredPrefix`."""

    def __init__(self, parts: Sequence[tuple[float, ScoredPrefix]]) -> None:
        self._parts = list(parts)

    def extend(self, chunks: Sequence[Ids]) -> Tensor:
        """Σ_i w_i r_i of each row after one more chunk of tokens, float32 [B] on the CPU."""
        total_B = torch.zeros(len(chunks))
        for weight, prefix in self._parts:
            total_B += weight * prefix.extend(chunks)
        return total_B

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order; a row may come several times."""
        for _, prefix in self._parts:
            prefix.select(rows)

    def fork(self, rows: Sequence[int]) -> WeightedPrefix:
        """These rows as a prefix of their own; this one stays as it is."""
        twin = copy.copy(self)
        twin._parts = [(weight, prefix.fork(rows)) for weight, prefix in self._parts]
        return twin

    def replace(self, rows: Sequence[int], other: WeightedPrefix) -> None:
        """Put the rows of `other` in the place of `rows`."""
        for (_, prefix), (_, theirs) in zip(self._parts, other._parts, strict=True):
            prefix.replace(rows, theirs)

    def rewind(self, counts: Sequence[int]) -> None:
        """Forget this many last tokens of each row, of its last chunk at the most."""
        for _, prefix in self._parts:
            prefix.rewind(counts)


@dataclass(frozen=True)
class Guidance:
    """What every method has in which rewards choose among the tokens of a base.

    Attributes:
        base: whose tokens are chosen from.
        tokenizer: of all models.
        sampling: length and temperature.
        rewards: by name.
        weights: w_i by the same names; 1 where not given.
    """

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    rewards: Mapping[str, TrajectoryReward]
    weights: Mapping[str, float]

    @classmethod
    def of(cls, parts: Parts) -> Guidance:
        """That of a recipe's row."""
        return cls(parts.model("base"), parts.tokenizer, parts.sampling, parts.rewards, parts.spec.weights)


class RewardGuided:
    """A method in which rewards choose among the tokens of a base.

    Attributes:
        title: of the method, for messages.
        greedy: whether it can be asked for at temperature 0.
    """

    title: ClassVar[str]
    greedy: ClassVar[bool] = True

    def __init__(self, guidance: Guidance, *, others: Sequence[PreTrainedModel] = ()) -> None:
        """Ready to answer; `others` are more models that read the same tokens.

        Raises:
            WeightsError, VocabularyError, UnsupportedError: weights, models or settings that do not serve.
        """
        self.base, self.tokenizer, self.sampling = guidance.base, guidance.tokenizer, guidance.sampling
        check_sampling(self.sampling, self.title, greedy=self.greedy)
        self.rewards = WeightedRewards(guidance.rewards, guidance.weights, self.tokenizer)
        self.stops = stop_ids(self.base, self.tokenizer)
        models = [self.base, *others, *(reward.model for reward in self.rewards.models)]
        self.known = shared_ids(models, self.tokenizer)
