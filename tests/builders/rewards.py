"""Trajectory rewards, and what they and other models say of one row alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from builders.tiny import tiny_model, tiny_tokenizer
from genarm.lab.trajectory import TrajectoryReward


def tiny_reward(family: str = "llama", *, seed: int = 0, tokenizer: Any = None, **changes: Any) -> TrajectoryReward:
    """A random reward model; padding is <pad>, which no reply ends with, unless `pad_token_id` says otherwise."""
    tokenizer = tokenizer or tiny_tokenizer()
    config = tiny_model(family, seed=seed, vocab_size=len(tokenizer)).config
    config.num_labels = 1
    for name, value in {"pad_token_id": 0, **changes}.items():
        setattr(config, name, value)
    torch.manual_seed(seed + 100)
    return TrajectoryReward(model=AutoModelForSequenceClassification.from_config(config), tokenizer=tokenizer)


@torch.no_grad()
def score_alone(reward: TrajectoryReward, ids: list[int]) -> float:
    """The head's value at the last token that is not padding."""
    hidden = reward.model.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state
    last = max(i for i, token in enumerate(ids) if token != reward.model.config.pad_token_id)
    return float(reward.model.score(hidden)[0, last, 0])


@torch.no_grad()
def alone(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Logits after `ids`, without cache, batch or padding."""
    return model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()
