"""A trajectory-level reward model: a scalar head on the last token, by trl's `RewardTrainer`.

The loss is Bradley–Terry on whole responses, −log σ(r(x, y⁺) − r(x, y⁻)). Prompts, responses and their end-of-turn
tokens are those that an ARM is trained on. The result is a plain `AutoModelForSequenceClassification` folder.

The head reads the last token that is not the padding of the model's configuration. So padding must be a token that no
response ends with: the tokenizer's own, or its unknown or first token where that one is none or ends responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from genarm.data.tokens import TokenPair
from genarm.lab.training.trainers import PairBaseline, TranslatedLog, make, pair_metrics_of
from genarm.training.arguments import one_gpu_each
from genarm.training.kinds import Setup
from genarm.training.loading import add_adapter, load_weights
from genarm.training.reader import Batch


class TrajectoryTrainer(PairBaseline, RewardTrainer, TranslatedLog):
    """trl's `RewardTrainer`, evaluated by pair accuracy."""

    def rewards(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """r(x, y) of both responses of each pair: float32 [2, B], chosen then rejected."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
        return logits.squeeze(-1).float().view(2, -1)

    def translated(self, logs: Mapping[str, float]) -> dict[str, float]:
        """The figures of an entry of trl's log of the training, under our names."""
        mean, margin = logs["mean_reward"], logs["margin"]
        return {
            "accuracy": logs["accuracy"],
            "margin": margin,
            "chosen_reward": mean + margin / 2,
            "rejected_reward": mean - margin / 2,
        }


def make_trainer(setup: Setup) -> TrajectoryTrainer:
    """The trainer of a reward model; `tokenizer` gets the padding that the model is trained with.

    Raises:
        GenarmError: the model or the settings do not serve.
    """
    config, tokenizer, data = setup.config, setup.tokenizer, setup.data
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(_pad_id(tokenizer))
    # Frozen weights are float32 too, as an adapter is merged into them in the end.
    model: Any = load_weights(config, tokenizer, AutoModelForSequenceClassification, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    if config.lora:
        model = add_adapter(model, config, "SEQ_CLS")

    def build() -> TrajectoryTrainer:
        return TrajectoryTrainer(
            model=model,
            args=one_gpu_each(RewardConfig(**setup.options, max_length=None, disable_dropout=False)),
            train_dataset=_dataset(data.training),
            eval_dataset=_dataset(data.held_out) if data.held_out else None,
            processing_class=tokenizer,
            compute_metrics=pair_metrics_of(config.resolved_beta),
            callbacks=setup.callbacks,
        )

    return make(build, config)


def save_merged(trainer: Any, folder: Path) -> None:
    """Write the model of `trainer` with its adapter merged into the weights, from the main process."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    assert isinstance(model, PeftModel)
    if trainer.accelerator.is_main_process:
        model.merge_and_unload().save_pretrained(folder)


def _dataset(pairs: Sequence[TokenPair]) -> Dataset:
    return Dataset.from_dict(
        {
            "chosen_ids": [[*pair.prompt_ids, *pair.chosen_ids] for pair in pairs],
            "rejected_ids": [[*pair.prompt_ids, *pair.rejected_ids] for pair in pairs],
        }
    )


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    ids = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id)
    fit = [i for i in ids if i is not None and i != tokenizer.eos_token_id]
    # GPT-2 has one special token for everything: then the head reads the token before it, in training and in use.
    return int([*fit, *(i for i in (tokenizer.eos_token_id, 0) if i is not None)][0])
