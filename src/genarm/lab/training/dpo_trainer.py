"""A policy by direct preference optimisation (DPO, arXiv 2305.18290), by trl's `DPOTrainer`.

The loss is −log σ(β · (r(x, y⁺) − r(x, y⁻))) with the implicit reward r(x, y) = log π(y|x) − log π_ref(y|x), where
π_ref is the model that training starts from. Pairs are in the same tokens as an ARM's. Rewards in the log are in
nats, not multiplied by β. There is no dropout, which would blur the ratio of the two models.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, TrainerCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from genarm.data.tokens import TokenPair
from genarm.lab.training.trainers import (
    PairBaseline,
    TranslatedLog,
    float32_adapter,
    make,
    pair_metrics_of,
    reference,
    reference_options,
    sequence_log_probs,
)
from genarm.training.config import TrainConfig
from genarm.training.data import TrainData
from genarm.training.loading import adapter_config, load_weights
from genarm.training.trainer import Batch


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


def make_trainer(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    data: TrainData[TokenPair],
    options: Mapping[str, Any],
    callbacks: list[TrainerCallback],
) -> DpoTrainer:
    """The trainer of a policy.

    Raises:
        GenarmError: the model or the settings do not serve.
    """
    model = load_weights(config, tokenizer, AutoModelForCausalLM)

    def build() -> DpoTrainer:
        return DpoTrainer(
            model=model,
            args=DPOConfig(
                **options,
                **reference_options(config),
                beta=config.resolved_beta,
                max_length=None,
                disable_dropout=True,
            ),
            train_dataset=_dataset(data.training),
            eval_dataset=_dataset(data.held_out) if data.held_out else None,
            processing_class=copy.deepcopy(tokenizer),  # trl may give it a padding token
            compute_metrics=pair_metrics_of(config.resolved_beta),
            callbacks=callbacks,
            peft_config=adapter_config(model, config, "CAUSAL_LM") if config.lora else None,
        )

    trainer = make(build, config)
    float32_adapter(trainer)
    return trainer


def _dataset(pairs: Sequence[TokenPair]) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt_ids": [list(pair.prompt_ids) for pair in pairs],
            "chosen_ids": [list(pair.chosen_ids) for pair in pairs],
            "rejected_ids": [list(pair.rejected_ids) for pair in pairs],
        }
    )
