"""An ARM trained through the policy that it will make, so that its optimum is that of the KL-regularised problem.

L = −E log σ(β_r · (r(x, y⁺) − r(x, y⁻))) with r(x, y) = (log π_guided(y|x) − log π_b(y|x)) / w, where π_guided =
π_b · ρ^w / Z at every token, the base π_b is frozen, and ρ = π_r/π_r0 or π_r. With β = β_r / w this is
−E log σ(β · margin of log π_guided/π_b), whose minimum is the optimum of E[r] − β KL(π_guided ‖ π_b).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from genarm.errors import ConfigError
from genarm.training.arm import Arm

if TYPE_CHECKING:
    from genarm.provenance import Record
    from genarm.training.config import TrainConfig
    from genarm.training.kinds import Setup
    from genarm.training.trainer import ArmTrainer


class Product(Arm):
    """Learns what the base that it guides does not know yet, at the weight that it will have."""

    name = "product"
    takes: ClassVar = {
        **Arm.takes,
        "lora_dropout": 0.0,
        "through": None,
        "through_weight": "1",
        "start": "zero",
    }
    split_weights = False
    plots: ClassVar = {"loss": "loss", "accuracy": "policy accuracy of pairs"}
    title = "an autoregressive reward model, trained through the policy that it makes"
    score = (
        "Policy accuracy: share of held-out pairs of which the guided model, at the weight that it was trained for "
        "(the middle of a range), raises the chosen response more over the base than the rejected one. The lower rows "
        "show how far the length of a response alone sways it."
    )

    def check(self, config: TrainConfig) -> None:
        """Weights that can be read (raises ConfigError)."""
        weight_range(config)

    def resolved(self, config: TrainConfig) -> dict[str, Any]:
        """The base and the weights that it is trained through."""
        return through_resolved(self, config)

    def learns_from(self, config: TrainConfig) -> Record:
        """The base."""
        return through_record(config)

    def trainer_class(self) -> type[ArmTrainer]:
        """Whose rewards are the guided policy's."""
        from genarm.training.losses.trainers import ProductTrainer

        return ProductTrainer

    def trainer_options(self, setup: Setup) -> dict[str, Any]:
        """The base, and the model as it starts."""
        from genarm.training.losses.frozen import through_options

        return through_options(setup, starts_at_zero(self, setup.config))

    def introduction(self, config: TrainConfig) -> str:
        """What it is trained on, and what it is for."""
        what = "log π − log π_start" if starts_at_zero(self, config) else "its log-probability"
        return (
            f"A {config.made_of} `{config.model}`, trained on preference pairs "
            f"through the policy that it makes of the frozen base `{self.base(config)}` at weight "
            f"{config.through_weight or 1}: base · reward^w, normalised at every token. The reward of a token is "
            f"{what}. It is meant for that base, at such weights."
        )

    def base(self, config: TrainConfig) -> str:
        """The one that it was trained through."""
        return config.through or model_name(config)

    def weight(self, config: TrainConfig) -> float:
        """The one that it was trained for; of a range, 1 if it may be."""
        low, high = weight_range(config)
        return min(max(1.0, low), high)

    def summary(self, metrics: Mapping[str, float]) -> list[str]:
        """The accuracy of the policy, and of the ARM alone."""
        from genarm.training.report import accuracies

        return [
            *(f"held-out policy accuracy, {label}: {found}" for label, found in accuracies(metrics).items()),
            *(
                f"held-out reward accuracy, {label}: {found}"
                for label, found in accuracies(metrics, "reward_accuracy").items()
            ),
        ]

    def held_out(self, metrics: Mapping[str, float]) -> list[str]:
        """Likewise."""
        from genarm.training.report import accuracies

        alone = accuracies(metrics, "reward_accuracy").get("all")
        more = [] if alone is None else ["", f"Of the reward alone, without the base: {alone}."]
        return [*super().held_out(metrics), *more]


def starts_at_zero(kind: Arm, config: TrainConfig) -> bool:
    """Whether the reward is a difference to its own start."""
    return (config.start or kind.takes["start"]) == "zero"


def model_name(config: TrainConfig) -> str:
    """The model that is trained, as commands name it: a folder, a hub id, or ID@REVISION."""
    return config.model if config.revision is None else f"{config.model}@{config.revision}"


def through_resolved(kind: Arm, config: TrainConfig) -> dict[str, Any]:
    """The settings of what is trained through a base, filled in."""
    from genarm.training.loading import absolute

    low, high = weight_range(config)
    return {
        "through": absolute(config.through or model_name(config)),
        "through_weight": f"{low:g}" if low == high else f"{low:g}-{high:g}",
        "start": config.start or kind.takes["start"],
    }


def through_record(config: TrainConfig) -> Record:
    """The base by its content."""
    from genarm.provenance import model_record

    where, _, revision = str(config.through).partition("@")
    return {"the base of --through": model_record(where, revision or None)}


def weight_range(config: TrainConfig) -> tuple[float, float]:
    """(lowest, highest) weight of --through-weight.

    Raises:
        ConfigError: not W or LOW-HIGH, or not above 0 and finite.
    """
    text = config.through_weight or "1"
    try:
        low, high = (float(part) for part in (text.split("-") if text.count("-") == 1 else (text, text)))
    except ValueError:
        low = high = 0.0
    if not 0 < low <= high < float("inf"):
        raise ConfigError(
            f"--through-weight is {text!r}; give a weight above 0, or a range of them from low to high, as in 0.5-2"
        )
    return low, high
