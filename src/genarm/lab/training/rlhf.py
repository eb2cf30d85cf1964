"""A policy by reinforcement learning against trajectory rewards; with several weighted ones this is MORL."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from genarm.errors import ConfigError
from genarm.lab.training.baseline import NO_DROPOUT, Baseline

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

    from genarm.provenance import Record
    from genarm.training.config import TrainConfig
    from genarm.training.data import Ids, TrainData
    from genarm.training.kinds import Setup


class Rlhf(Baseline):
    """A policy that raises the rewards of its own replies, near the model that it starts from."""

    name = "rlhf"
    takes: ClassVar = {"beta": 0.05, "rewards": None, "generations": 4, "load_in_4bit": False}
    lacks: ClassVar = {"early_stopping": "there is no held-out loss to watch", "lora_dropout": NO_DROPOUT}
    learning_rates = (5e-5, 1e-6)
    title = "a policy by reinforcement learning from rewards"
    tags = ("rlhf",)
    plots: ClassVar = {"reward": "mean reward", "kl": "KL from the start, nats per reply"}

    def check(self, config: TrainConfig) -> None:
        """Rewards that can be read, and whole groups of replies in a step (raises ConfigError)."""
        if not config.rewards:
            raise ConfigError("--kind rlhf learns from reward models: give --rewards NAME=FOLDER[:WEIGHT]")
        parse_rewards(config.rewards)
        generations, completions = replies_per_prompt(config), config.batch_size * config.accumulation
        if generations < 2:
            raise ConfigError(f"--generations must be at least 2, to compare replies to a prompt; got {generations}")
        if completions % generations:
            raise ConfigError(
                f"a step has --batch-size times --accumulation = {completions} replies, which is no multiple of the "
                f"{generations} of --generations; change one of them"
            )

    def resolved(self, config: TrainConfig) -> dict[str, Any]:
        """The rewards' folders, and the replies to each prompt."""
        specs = parse_rewards(config.rewards or "")
        found = [
            replace(spec, folder=str(Path(spec.folder).absolute())) if Path(spec.folder).exists() else spec
            for spec in specs
        ]
        return {"rewards": ",".join(map(str, found)), "generations": replies_per_prompt(config)}

    def learns_from(self, config: TrainConfig) -> Record:
        """The reward models."""
        from genarm.provenance import model_record

        return {reward.name: model_record(reward.folder) for reward in parse_rewards(config.rewards or "")}

    def load(self, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> TrainData[Ids]:
        """Prompts to reply to."""
        from genarm.training.prompts import load_prompts

        return load_prompts(config, tokenizer)

    def make_trainer(self, setup: Setup) -> Trainer:
        """trl's `RLOOTrainer`."""
        from genarm.lab.training.rlhf_trainer import make_trainer

        return make_trainer(setup)

    def introduction(self, config: TrainConfig) -> str:
        """What it is trained on."""
        return (
            f"A {'LoRA adapter on' if config.lora else 'fine-tuned'} `{config.model}`, trained by RLOO "
            f"([arXiv 2402.14740](https://arxiv.org/abs/2402.14740)) to raise the rewards `{config.rewards}` (name, "
            "model, weight), with a KL penalty towards the model that it started from."
        )

    def leak(self, count: int) -> str:
        """Of prompts."""
        return f"{count} held-out prompts are trained on too, which flatters the held-out reward"

    def evaluated(self, metrics: Mapping[str, float]) -> str:
        """The mean reward of replies to held-out prompts with its interval, and their divergence from the model."""
        interval = ""
        if "eval_reward_low" in metrics:
            interval = f" [{metrics['eval_reward_low']:.3f}, {metrics['eval_reward_high']:.3f}]"
        return f"reward {metrics['eval_reward']:+.3f}{interval}  KL {metrics['eval_kl']:.3f} nats per reply"

    def summary(self, metrics: Mapping[str, float]) -> list[str]:
        """The same."""
        return [f"held-out {self.evaluated(metrics)}"] if "eval_reward" in metrics else []

    def figure(self, metrics: Mapping[str, float]) -> str | None:
        """The same."""
        return self.evaluated(metrics) if "eval_reward" in metrics else None

    def held_out(self, metrics: Mapping[str, float]) -> list[str]:
        """The same, and each reward's mean."""
        if "eval_reward" not in metrics:
            return ["## Held-out reward", "", "No prompts were held out."]
        own = {name.removeprefix("eval_reward/"): v for name, v in metrics.items() if name.startswith("eval_reward/")}
        return [
            "## Held-out reward",
            "",
            f"One reply to each of {metrics['eval_prompts']:.0f} held-out prompts, drawn at temperature 1: weighted "
            f"{self.evaluated(metrics)} (log π − log π_start).",
            "",
            "| reward | mean |",
            "|---|---|",
            *(f"| {name} | {value:+.3f} |" for name, value in own.items()),
        ]


def replies_per_prompt(config: TrainConfig) -> int:
    """Of a step."""
    return int(Rlhf.takes["generations"] or 0) if config.generations is None else config.generations


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
