"""Which weights a request means: `name`, `name@preset` or `name@harmless=2,helpful=0.5`, then `reward_weights`.

An item `max_kl` among the weights of a name or a preset is the budget in nats per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from genarm.data.presets import BUDGET, check_preset_name
from genarm.errors import ConfigError, WeightsError
from genarm.model.config import GuidedConfig
from genarm.model.weights import check_max_kl, parse_weights, weight_row
from genarm.server.errors import ApiError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, kw_only=True)
class RewardInfo:
    """A reward as the server offers it."""

    name: str
    default: float
    description: str
    difference: bool = False
    """It is what a model says more than its reference."""
    wish: str | None = None
    """The text of one that is a wish."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """The served model, its rewards and its presets.

    Attributes:
        model: the name that clients ask for.
        rewards: in the model's order.
        largest: weights go from −largest to it.
        presets: {name: {reward: weight}}; rewards not named have their default, and "max_kl" is the budget.
    """

    model: str
    rewards: tuple[RewardInfo, ...]
    largest: float
    presets: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.model or "@" in self.model:
            raise ConfigError(
                f"a model cannot be served as {self.model!r}: '@' begins the weights there; give another --served-name"
            )
        if not self.largest > 0:
            raise ConfigError(f"--max-weight is {self.largest:g}; it must be above 0")
        self.check_range(self.defaults, "raise --max-weight")
        for name, weights in self.presets.items():
            check_preset_name(name)
            try:
                check_max_kl(self._budget(weights))
                self.check_range(self._complete(self._weights(weights)), "raise --max-weight")
            except WeightsError as error:
                raise ConfigError(f"the preset {name!r}: {error}") from error

    @property
    def defaults(self) -> dict[str, float]:
        """{reward: default weight}."""
        return {reward.name: reward.default for reward in self.rewards}

    @property
    def ids(self) -> list[str]:
        """What /v1/models lists."""
        return [self.model, *(f"{self.model}@{preset}" for preset in self.presets)]

    @property
    def wishes(self) -> dict[str, str]:
        """{reward: text} of those that are wishes."""
        return {reward.name: reward.wish for reward in self.rewards if reward.wish is not None}

    def preset(self, name: str) -> dict[str, float]:
        """All weights of a preset."""
        return self._complete(self._weights(self.presets[name]))

    def preset_budget(self, name: str) -> float | None:
        """The most nats from the base for each token that a preset allows, or None."""
        return self._budget(self.presets[name])

    def resolve(self, model: str, given: Mapping[str, float] | None) -> dict[str, float]:
        """All weights of a request for `model` with the field `reward_weights`.

        Raises:
            ApiError: no such model or preset.
            WeightsError: an unknown reward, a weight that is not finite or out of range.
        """
        weights = self._complete({**self._weights(self._named(model)), **(given or {})})
        self.check_range(weights, "give a smaller one")
        return weights

    def budget(self, model: str) -> float | None:
        """The most nats from the base for each token that the name `model` allows, or None.

        Raises:
            ApiError: no such model or preset.
            BudgetError: no such number.
            WeightsError: what follows the "@" cannot be read.
        """
        budget = self._budget(self._named(model))
        check_max_kl(budget)
        return budget

    def _named(self, model: str) -> Mapping[str, float]:
        """What the name of a model says, as it is written there."""
        name, _, setting = model.partition("@")
        if name != self.model or (setting and "=" not in setting and setting not in self.presets):
            raise self._no_model(model)
        if not setting:
            return {}
        return parse_weights(setting) if "=" in setting else self.presets[setting]

    def _budget(self, named: Mapping[str, float]) -> float | None:
        return None if BUDGET in self.defaults else named.get(BUDGET)

    def _weights(self, named: Mapping[str, float]) -> dict[str, float]:
        return {name: weight for name, weight in named.items() if name != BUDGET or name in self.defaults}

    def _complete(self, weights: Mapping[str, float]) -> dict[str, float]:
        return dict(zip(self.defaults, weight_row(weights, self.defaults), strict=True))

    def check_range(self, weights: Mapping[str, float], remedy: str) -> None:
        """Raise WeightsError for a weight beyond what this server takes, with what to do against it."""
        for name, weight in weights.items():
            if abs(weight) > self.largest:
                raise WeightsError(
                    f"the weight of {name!r} is {weight:g}; this server takes weights from {-self.largest:g} to "
                    f"{self.largest:g}; {remedy}"
                )

    def _no_model(self, model: str) -> ApiError:
        return ApiError(
            404,
            f"The model {model!r:.200} does not exist; this server has {', '.join(self.ids)}, and takes weights as in "
            f"{self.model}@{self.rewards[0].name if self.rewards else 'REWARD'}=1",
            param="model",
            code="model_not_found",
        )


def rewards_of(config: PreTrainedConfig) -> tuple[RewardInfo, ...]:
    """The rewards of a guided model; another model has none."""
    if not isinstance(config, GuidedConfig):
        return ()
    return tuple(
        RewardInfo(
            name=spec.name,
            default=spec.weight,
            description=spec.description,
            difference=spec.reference is not None,
            wish=spec.member.wish,
        )
        for spec in config.reward_specs
    )
