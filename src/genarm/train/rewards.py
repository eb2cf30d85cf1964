"""Trajectory rewards as a policy learns from them: scores of prompts and replies in token ids.

Shapes: B replies, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from genarm.errors import MemberError, VocabularyError
from genarm.train.kinds import RewardSpec, parse_rewards

# Replies scored in one forward.
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A frozen reward model, by name, with its weight in the sum."""

    name: str
    weight: float
    model: Any

    @torch.no_grad()
    def score(self, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]]) -> list[float]:
        """r(x, y) of each reply to its prompt; end-of-turn tokens count as they are."""
        rows = [torch.tensor([*prompt, *reply]) for prompt, reply in zip(prompts, replies, strict=True)]
        scores: list[float] = []
        for first in range(0, len(rows), BATCH):
            part = rows[first : first + BATCH]
            ids_BT = pad_sequence(part, batch_first=True, padding_value=self.model.config.pad_token_id)
            mask_BT = pad_sequence([torch.ones_like(row) for row in part], batch_first=True)
            device = self.model.device
            logits = self.model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), use_cache=False).logits
            scores += logits.squeeze(-1).float().tolist()
        return scores


def load_rewards(text: str, tokenizer: PreTrainedTokenizerBase) -> list[Reward]:
    """The rewards of --rewards, each checked to read the policy's tokens.

    Raises:
        MemberError: a folder that holds no trajectory reward model.
        VocabularyError: a reward whose tokenizer has other tokens than `tokenizer`.
    """
    return [_load(spec, tokenizer) for spec in parse_rewards(text)]


def _load(spec: RewardSpec, tokenizer: PreTrainedTokenizerBase) -> Reward:
    try:
        own = AutoTokenizer.from_pretrained(spec.folder)
        model = AutoModelForSequenceClassification.from_pretrained(spec.folder)
    except (OSError, ValueError) as error:
        raise MemberError(f"cannot load the reward {spec.name} from {spec.folder}: {error}") from error
    if model.config.num_labels != 1 or model.config.pad_token_id is None:
        raise MemberError(
            f"the reward {spec.name} in {spec.folder} is no trajectory reward model with one score and a padding "
            "token; train one with genarm train --kind trajectory"
        )
    if own.get_vocab() != tokenizer.get_vocab():
        raise VocabularyError(
            f"the reward {spec.name} in {spec.folder} has other tokens than the policy; train it on a model of the "
            "same family"
        )
    model = model.eval().requires_grad_(False).to(PartialState().device)
    return Reward(name=spec.name, weight=spec.weight, model=model)
