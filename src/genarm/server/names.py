"""Which weights a request means: `name`, `name@preset` or `name@harmless=2,helpful=0.5`, then `reward_weights`."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import FiniteFloat

from genarm.data.tables import read_table
from genarm.errors import ConfigError, WeightsError
from genarm.model.config import GuidedConfig
from genarm.model.weights import parse_weights, weight_row
from genarm.server.errors import ApiError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PRESETS_FILE = "presets.json"
_PRESET = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class RewardInfo:
    """A reward as the server offers it."""

    name: str
    default: float
    description: str
    difference: bool = False
    """It is what a model says more than its reference."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """The served model, its rewards and its presets.

    Attributes:
        model: the name that clients ask for.
        rewards: in the model's order.
        largest: weights go from −largest to it.
        presets: {name: {reward: weight}}; rewards not named have their default.
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
        self._check(self.defaults, "raise --max-weight")
        for name, weights in self.presets.items():
            if not _PRESET.fullmatch(name):
                raise ConfigError(f"a preset cannot be named {name!r}; use letters, digits, '_', '-' and '.'")
            try:
                self._check(self._complete(weights), "raise --max-weight")
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

    def preset(self, name: str) -> dict[str, float]:
        """All weights of a preset."""
        return self._complete(self.presets[name])

    def resolve(self, model: str, given: Mapping[str, float] | None) -> dict[str, float]:
        """All weights of a request for `model` with the field `reward_weights`.

        Raises:
            ApiError: no such model or preset.
            WeightsError: an unknown reward, a weight that is not finite or out of range.
        """
        name, _, setting = model.partition("@")
        if name != self.model:
            raise self._no_model(model)
        if "=" in setting:
            alias: Mapping[str, float] = parse_weights(setting)
        elif setting:
            if setting not in self.presets:
                raise self._no_model(model)
            alias = self.presets[setting]
        else:
            alias = {}
        weights = self._complete({**alias, **(given or {})})
        self._check(weights, "give a smaller one")
        return weights

    def _complete(self, weights: Mapping[str, float]) -> dict[str, float]:
        return dict(zip(self.defaults, weight_row(weights, self.defaults), strict=True))

    def _check(self, weights: Mapping[str, float], remedy: str) -> None:
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
        )
        for spec in config.reward_specs
    )


def read_presets(folder: Path, file: Path | None) -> dict[str, dict[str, float]]:
    """The presets of a model's folder, and those of a TOML file over them; one table of weights for each preset.

    Raises:
        ConfigError: a file that is not there or not what it should be.
    """
    presets: dict[str, dict[str, float]] = {}
    inside = folder / PRESETS_FILE
    if inside.is_file():
        presets |= _parse(inside, json.loads)
    if file is not None:
        presets |= _parse(file, tomllib.loads)
    return presets


def _parse(path: Path, loads: Any) -> dict[str, dict[str, float]]:
    try:
        data = loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the presets in {path}: {error}") from error
    presets: dict[str, dict[str, float]] = read_table(dict[str, dict[str, FiniteFloat]], data, f"presets in {path}")
    return presets
