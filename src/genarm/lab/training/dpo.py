"""A policy by direct preference optimisation (arXiv 2305.18290)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from genarm.lab.training.baseline import NO_DROPOUT, Baseline

if TYPE_CHECKING:
    from transformers import Trainer

    from genarm.training.config import TrainConfig
    from genarm.training.kinds import Setup


class Dpo(Baseline):
    """A policy that learns from the pairs of an ARM, near the model that it starts from."""

    name = "dpo"
    takes: ClassVar = {"beta": 0.1, "early_stopping": None, "load_in_4bit": False}
    lacks: ClassVar = {"lora_dropout": NO_DROPOUT}
    title = "a policy by direct preference optimisation"
    tags = ("dpo",)
    score = (
        "Share of held-out pairs whose chosen response has the higher implicit reward, log π − log π_start, over all "
        "and by length."
    )

    def make_trainer(self, setup: Setup) -> Trainer:
        """trl's `DPOTrainer`."""
        from genarm.lab.training.dpo_trainer import make_trainer

        return make_trainer(setup)

    def introduction(self, config: TrainConfig) -> str:
        """What it is trained on."""
        return (
            f"A {'LoRA adapter on' if config.lora else 'fine-tuned'} `{config.model}`, trained on preference pairs "
            "with the DPO loss ([arXiv 2305.18290](https://arxiv.org/abs/2305.18290))."
        )
