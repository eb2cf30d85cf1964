"""A classic reward model: a scalar head on the last token, with the Bradley–Terry loss on whole responses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from genarm.lab.training.baseline import Baseline

if TYPE_CHECKING:
    from transformers import Trainer

    from genarm.training.config import TrainConfig
    from genarm.training.kinds import Setup


class Trajectory(Baseline):
    """Learns scores of whole responses; the result is a plain model for sequence classification."""

    name = "trajectory"
    takes: ClassVar = {"early_stopping": None, "lora_dropout": 0.05}
    lacks: ClassVar = {
        "beta": "Bradley–Terry on a scalar head has no such scale",
        "load_in_4bit": "the adapter is merged into the weights that are written, which 4 bits would spoil",
    }
    title = "a trajectory-level reward model"
    tags = ("reward-model",)
    task = "text-classification"
    loader = "AutoModelForSequenceClassification"
    merged = True
    score = "Share of held-out pairs whose chosen response has the higher score, over all and by length."
    unit = ""

    def make_trainer(self, setup: Setup) -> Trainer:
        """trl's `RewardTrainer`."""
        from genarm.lab.training.trajectory_trainer import make_trainer

        return make_trainer(setup)

    def save(self, config: TrainConfig, trainer: Trainer, folder: Path) -> None:
        """The whole model, into which an adapter is merged."""
        from genarm.lab.training.trajectory_trainer import save_merged

        if config.lora:
            save_merged(trainer, folder)
        else:
            super().save(config, trainer, folder)

    def introduction(self, config: TrainConfig) -> str:
        """What it is trained on, and what its scores mean."""
        how = " through a LoRA adapter, merged into its weights," if config.lora else ""
        return (
            f"`{config.model}` with a scalar head on the last token, trained{how} on preference pairs with the "
            "Bradley–Terry loss. It scores whole responses; differences between scores of responses to the same "
            "prompt are what it means."
        )
