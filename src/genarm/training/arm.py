"""The autoregressive reward model (GenARM, arXiv 2410.08193, section 4.2)."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Any, ClassVar

from genarm.training.kinds import Kind, Setup

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import Trainer

    from genarm.training.config import TrainConfig
    from genarm.training.trainer import ArmTrainer


class Arm(Kind):
    """Learns which response is preferred from log-probabilities, token by token.

    Other losses than the paper's begin with this class: each says by its trainer what it learns, and by `base` and
    `weight` how its result is composed.
    """

    name = "arm"
    takes: ClassVar = {"beta": 0.05, "early_stopping": None, "load_in_4bit": False, "head": None, "lora_dropout": 0.05}
    split_weights = True
    title = "an autoregressive reward model"
    tags = ("reward-model", "autoregressive-reward-model")
    score = (
        "Share of held-out pairs whose chosen response has the higher summed log-probability; tokens of the "
        "response and its end-of-turn token count, without normalisation by length. The lower rows show how far "
        "the length of a response alone sways it."
    )

    def trainer_class(self) -> type[ArmTrainer]:
        """Whose loss it is."""
        from genarm.training.trainer import ArmTrainer

        return ArmTrainer

    def make_trainer(self, setup: Setup) -> Trainer:
        """An `ArmTrainer`, or what `trainer_class` says."""
        from transformers import TrainingArguments

        from genarm.training.arguments import one_gpu_each
        from genarm.training.loading import load_model

        arguments = one_gpu_each(
            TrainingArguments(**setup.options)
        )  # first: DeepSpeed splits the weights while they are loaded
        return self.trainer_class()(
            load_model(setup.config, setup.tokenizer),
            arguments,
            beta=setup.config.resolved_beta,
            train_pairs=list(setup.data.training),
            eval_pairs=list(setup.data.held_out) if setup.data.held_out else None,
            callbacks=setup.callbacks,
            **self.trainer_options(setup),
        )

    def trainer_options(self, setup: Setup) -> dict[str, Any]:
        """What the trainer is made of beside the model and the pairs."""
        return {}

    def save(self, config: TrainConfig, trainer: Trainer, folder: Path) -> None:
        """A head as the adapter of the output layer that it is."""
        if config.head:
            from genarm.training.head import unfold

            unfold(trainer.accelerator.unwrap_model(trainer.model))
        super().save(config, trainer, folder)

    def introduction(self, config: TrainConfig) -> str:
        """What it is trained on, and what it is for."""
        return (
            f"A {config.made_of} `{config.model}`, trained on preference pairs "
            "with the GenARM loss ([arXiv 2410.08193](https://arxiv.org/abs/2410.08193)). Its log-probabilities are "
            "token-level rewards: they steer a frozen language model with the same tokenizer while it decodes. It is "
            "not meant to be sampled from alone."
        )

    def base(self, config: TrainConfig) -> str:
        """The base that its use is shown with."""
        return "BASE"

    def weight(self, config: TrainConfig) -> float:
        """The weight that it is shown with."""
        return 1.0

    def compose_command(self, config: TrainConfig) -> str:
        """How it is put together with a base."""
        name = config.output.name if re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", config.output.name) else "arm"
        weight = "" if self.weight(config) == 1 else f":{self.weight(config):g}"
        reward = shlex.quote(f"{name}={config.output}{weight}")
        return f"genarm compose --base {shlex.quote(self.base(config))} --reward {reward} --output guided"

    def use(self, config: TrainConfig) -> list[str]:
        """Composed with a base."""
        return ["```bash", self.compose_command(config), 'genarm generate guided --prompt "…"', "```"]

    def closing(self, config: TrainConfig) -> list[str]:
        """Likewise."""
        return [f"guide a model with it: {self.compose_command(config)}"]
