"""The kinds of training: the ARM, and the baselines that it is compared with.

- `arm`: an autoregressive reward model (GenARM, arXiv 2410.08193, section 4.2).
- `trajectory`: a classic reward model, a scalar head on the last token, with the Bradley–Terry loss.
- `dpo`: a policy by direct preference optimisation (arXiv 2305.18290).
- `rlhf`: a policy by reinforcement learning against trajectory reward models, kept near the model it starts from.
  With several weighted rewards this is MORL.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from genarm.errors import ConfigError

if TYPE_CHECKING:
    from genarm.training.config import TrainConfig

ARM = "arm"
KINDS = (ARM, "trajectory", "dpo", "rlhf")

BETAS = {"arm": 0.05, "dpo": 0.1, "rlhf": 0.05}
GENERATIONS = 4
LORA_DROPOUT = 0.05

# Options that only some kinds take.
_ONLY = {
    "beta": ("arm", "dpo", "rlhf"),
    "rewards": ("rlhf",),
    "generations": ("rlhf",),
    "early_stopping": ("arm", "trajectory", "dpo"),
    "load_in_4bit": ("arm", "dpo", "rlhf"),
    "lora_dropout": ("arm", "trajectory"),
}
_WHY = {
    "beta": "Bradley–Terry on a scalar head has no such scale",
    "early_stopping": "there is no held-out loss to watch",
    "load_in_4bit": "the adapter is merged into the weights that are written, which 4 bits would spoil",
    "lora_dropout": "the policy is compared with its reference, and dropout would blur that",
}


@dataclass(frozen=True, kw_only=True)
class WeightedReward:
    """A reward to learn from: its name, the folder of a trajectory reward model, and its weight in the sum."""

    name: str
    folder: str
    weight: float = 1.0

    def __str__(self) -> str:
        return f"{self.name}={self.folder}:{self.weight:g}"


def parse_rewards(text: str) -> tuple[WeightedReward, ...]:
    """The rewards of `NAME=FOLDER[:WEIGHT],…`; what follows the last colon is a weight if it is a number.

    Raises:
        ConfigError: a part that does not have this form, a name twice, or a weight that is not finite.
    """
    specs = tuple(_parse_reward(part.strip()) for part in text.split(","))
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise ConfigError(f"--rewards {text} gives a name twice; give each reward a name of its own")
    return specs


def check_kind(config: TrainConfig) -> None:
    """Refuse options that mean nothing for the kind.

    Raises:
        ConfigError: names the option, the kinds that take it, and what to do.
    """
    from genarm.training.config import option_name

    for name, kinds in _ONLY.items():
        if config.kind not in kinds and getattr(config, name):
            why = f": {_WHY[name]}" if name in _WHY else ""
            raise ConfigError(
                f"{option_name(name)} is for --kind {' and '.join(kinds)}, not {config.kind}{why}; leave it out"
            )
    if config.kind == "rlhf":
        _check_rlhf(config)


def _check_rlhf(config: TrainConfig) -> None:
    if not config.rewards:
        raise ConfigError("--kind rlhf learns from reward models: give --rewards NAME=FOLDER[:WEIGHT]")
    parse_rewards(config.rewards)
    generations, completions = config.resolved_generations, config.batch_size * config.accumulation
    if generations < 2:
        raise ConfigError(f"--generations must be at least 2, to compare replies to a prompt; got {generations}")
    if completions % generations:
        raise ConfigError(
            f"a step has --batch-size times --accumulation = {completions} replies, which is no multiple of the "
            f"{generations} of --generations; change one of them"
        )


def _parse_reward(part: str) -> WeightedReward:
    name, _, value = part.partition("=")
    if not (name and value):
        raise ConfigError(f"cannot read {part!r} in --rewards; write NAME=FOLDER[:WEIGHT], several with commas")
    folder, _, tail = value.rpartition(":")
    try:
        weight = float(tail) if folder else math.nan
    except ValueError:
        folder = ""
    if not folder:
        return WeightedReward(name=name, folder=value)
    if not math.isfinite(weight):
        raise ConfigError(f"the weight of {part!r} in --rewards must be a finite number")
    return WeightedReward(name=name, folder=folder, weight=weight)


def absolute_rewards(text: str) -> str:
    """`text` of --rewards with the paths of local folders made absolute."""
    specs = parse_rewards(text)
    found = (str(Path(s.folder).absolute()) if Path(s.folder).exists() else s.folder for s in specs)
    return ",".join(
        str(WeightedReward(name=spec.name, folder=folder, weight=spec.weight))
        for spec, folder in zip(specs, found, strict=True)
    )
