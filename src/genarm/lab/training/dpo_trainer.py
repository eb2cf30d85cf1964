"""A policy by direct preference optimisation (DPO, arXiv 2305.18290), by trl's `DPOTrainer`.

The loss is −log σ(β · (r(x, y⁺) − r(x, y⁻))) with the implicit reward r(x, y) = log π(y|x) − log π_ref(y|x), where
π_ref is the model that training starts from. Pairs are in the same tokens as an ARM's. Rewards in the log are in
nats, not multiplied by β. There is no dropout, which would blur the ratio of the two models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from genarm.data.tokens import TokenPair
from genarm.lab.training.trainers import (
    PairBaseline,
    TranslatedLog,
    make_policy,
    pair_metrics_of,
    reference,
    sequence_log_probs,
)
from genarm.training.kinds import Setup
from genarm.training.reader import Batch


class DpoTrainer(PairBaseline, DPOTrainer, TranslatedLog):
    """trl's `DPOTrainer` on pairs that are tokens already, evaluated by the accuracy of its implicit rewards."""

    def rewards(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """log π(y|x) − log π_ref(y|x) of both responses of each pair: float32 [2, B], chosen then rejected."""
        inputs = (batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
        policy_B = sequence_log_probs(model, *inputs)
        with reference(self) as frozen:
            reference_B = sequence_log_probs(frozen, *inputs)
        return (policy_B - reference_B).view(2, -1)

    def translated(self, logs: Mapping[str, float]) -> dict[str, float]:
        """The figures of an entry of trl's log of the training, under our names."""
        return {
            "accuracy": logs["rewards/accuracies"],
            "margin": logs["rewards/margins"] / self.beta,
            "chosen_reward": logs["rewards/chosen"] / self.beta,
            "rejected_reward": logs["rewards/rejected"] / self.beta,
        }

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        """trl would tokenise the texts in its own way."""
        return dataset


def make_trainer(setup: Setup) -> DpoTrainer:
    """The trainer of a policy.

    Raises:
        GenarmError: the model or the settings do not serve.
    """
    metrics = pair_metrics_of(setup.config.resolved_beta)
    return make_policy(setup, DpoTrainer, DPOConfig, _dataset, {"max_length": None}, compute_metrics=metrics)


def _dataset(pairs: Sequence[TokenPair]) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt_ids": [list(pair.prompt_ids) for pair in pairs],
            "chosen_ids": [list(pair.chosen_ids) for pair in pairs],
            "rejected_ids": [list(pair.rejected_ids) for pair in pairs],
        }
    )
