"""Trajectory rewards as a policy learns from them: each with its name and its weight in the sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from genarm.lab.training.rlhf import WeightedReward, parse_rewards
from genarm.lab.trajectory import TrajectoryReward


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A frozen reward model, by name, with its weight in the sum."""

    name: str
    weight: float
    model: TrajectoryReward

    def score(self, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]]) -> list[float]:
        """r(x, y) of each reply to its prompt."""
        return self.model.score(prompts, replies)


def load_rewards(text: str, tokenizer: PreTrainedTokenizerBase) -> list[Reward]:
    """The rewards of --rewards, each checked to read the policy's tokens.

    Raises:
        MemberError: a folder that holds no trajectory reward model.
        VocabularyError: a reward whose tokenizer has other tokens than `tokenizer`.
    """
    return [_load(spec, tokenizer) for spec in parse_rewards(text)]


def _load(spec: WeightedReward, tokenizer: PreTrainedTokenizerBase) -> Reward:
    model = TrajectoryReward.load(spec.folder, name=spec.name, device=PartialState().device)
    model.check(tokenizer)
    return Reward(name=spec.name, weight=spec.weight, model=model)
