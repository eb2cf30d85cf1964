"""An ARM anchored at its start: the reward is what it says more than the model that it was trained from.

L = −E log σ(β · (r(x, y⁺) − r(x, y⁻))) with r(x, y) = log π_r(y|x) − log π_r0(y|x): the loss of DPO (arXiv 2305.18290),
whose result is composed as a tuned reward (model.config.RewardSpec).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from genarm.errors import ConfigError
from genarm.training.arm import Arm

if TYPE_CHECKING:
    from genarm.training.config import TrainConfig
    from genarm.training.kinds import Setup
    from genarm.training.trainer import ArmTrainer


class Reference(Arm):
    """Starts at zero, and so learns from its first pair on; neither sharpens nor favours short replies by itself."""

    name = "reference"
    takes: ClassVar = {**Arm.takes, "lora_dropout": 0.0, "start": "zero"}
    split_weights = False
    title = "an autoregressive reward model anchored at its start"
    score = (
        "Share of held-out pairs whose chosen response has the higher reward, the sum of log π − log π_start over its "
        "tokens, its end-of-turn token included. The lower rows show how far the length of a response alone sways it."
    )

    def check(self, config: TrainConfig) -> None:
        """Nothing but zero is a difference to the start (raises ConfigError)."""
        if config.start not in (None, "zero"):
            raise ConfigError(f"--loss reference starts at zero, so --start {config.start} is not for it; leave it out")

    def resolved(self, config: TrainConfig) -> dict[str, Any]:
        """By which `compose` knows that it has a reference."""
        return {"start": "zero"}

    def trainer_class(self) -> type[ArmTrainer]:
        """Whose rewards are differences."""
        from genarm.training.losses.trainers import ReferenceTrainer

        return ReferenceTrainer

    def trainer_options(self, setup: Setup) -> dict[str, Any]:
        """The model as it starts."""
        from genarm.training.losses.frozen import start_of

        return {"start": start_of(setup.config)}

    def introduction(self, config: TrainConfig) -> str:
        """What it is trained on, and what it is for."""
        return (
            f"A {config.made_of} `{config.model}`, trained on preference pairs "
            "anchored at that model: the reward of a token is what the trained model says more than it, log π − "
            "log π_start (trained by the loss of DPO, [arXiv 2305.18290](https://arxiv.org/abs/2305.18290)). It steers "
            "a frozen language model with the same tokenizer while it decodes; `genarm compose` reads the reference "
            f"from its settings. At weight 1 on `{config.model}` the guided model is the trained one."
        )

    def base(self, config: TrainConfig) -> str:
        """Its own start, which costs no forward as a reference."""
        return config.model
