"""What a kind of training is, and all kinds that there are: `arm`, and what others have registered.

A kind is one class, in a file of its own, with all that differs between kinds: the options that it takes and their
defaults, how its data are read, its trainer, and what its model card says. The command line reads these classes, so
whatever is heavy is imported inside their methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from genarm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

    from genarm.provenance import Record
    from genarm.training.config import TrainConfig
    from genarm.training.data import TrainData

Options = Mapping[str, float | int | bool | None]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a trainer is made of; `options` are arguments of `TrainingArguments`, or of its subclasses in trl.

    The tokenizer may be given a padding token.
    """

    config: TrainConfig
    tokenizer: PreTrainedTokenizerBase
    data: TrainData[Any]
    options: Mapping[str, Any]
    callbacks: list[TrainerCallback]


# The options that only some kinds take.
OPTIONAL = ("beta", "rewards", "generations", "early_stopping", "load_in_4bit", "lora_dropout")


class Kind:
    """A kind of training; what is not overridden is as for a policy that learns from pairs.

    Attributes:
        name: as --kind has it.
        takes: those of `OPTIONAL` that this kind takes, with their defaults.
        lacks: why it does not take the others, for those where there is something to say.
        learning_rates: the default with an adapter, and without.
        split_weights: whether FSDP and DeepSpeed may split the weights over processes.
        title, tags, task: of the model card.
        loader: the class of transformers that loads the result.
        merged: whether an adapter is merged into the weights that are written.
        plots: a figure for each picture, and what its axis says.
        score: what says which response of a held-out pair is the better one.
        unit: of the margin between two responses.
    """

    name: ClassVar[str]
    takes: ClassVar[Options] = {}
    lacks: ClassVar[Mapping[str, str]] = {}
    learning_rates: ClassVar[tuple[float, float]] = (5e-4, 1e-5)
    split_weights: ClassVar[bool] = False
    title: ClassVar[str]
    tags: ClassVar[tuple[str, ...]] = ()
    task: ClassVar[str] = "text-generation"
    loader: ClassVar[str] = "AutoModelForCausalLM"
    merged: ClassVar[bool] = False
    plots: ClassVar[Mapping[str, str]] = {"loss": "loss", "accuracy": "pair accuracy"}
    score: ClassVar[str] = ""
    unit: ClassVar[str] = " nats"

    # --- settings ---------------------------------------------------------------------------------------------

    def check(self, config: TrainConfig) -> None:
        """Refuse options that do not go together for this kind (raises ConfigError)."""

    def require(self) -> None:
        """Refuse to train where something that it takes is not installed (raises MissingExtraError)."""

    def resolved(self, config: TrainConfig) -> dict[str, Any]:
        """Settings of this kind alone with their defaults filled in, and with local paths made absolute."""
        return {}

    def learns_from(self, config: TrainConfig) -> Record:
        """Models beside the one that is trained, by their content."""
        return {}

    # --- training ---------------------------------------------------------------------------------------------

    def load(self, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> TrainData[Any]:
        """What is trained on and held out, in tokens."""
        from genarm.training.data import load_pairs

        return load_pairs(config, tokenizer)

    def make_trainer(self, setup: Setup) -> Trainer:
        """The trainer.

        Raises:
            GenarmError: the model or the settings do not serve.
        """
        raise NotImplementedError

    def save(self, config: TrainConfig, trainer: Trainer, folder: Path) -> None:
        """Write the trained weights into `folder`; called in every process."""
        from genarm.training.sharding import save_whole

        save_whole(trainer, folder)

    # --- what is said of it -----------------------------------------------------------------------------------

    def introduction(self, config: TrainConfig) -> str:
        """The model card's first paragraph."""
        raise NotImplementedError

    def use(self, config: TrainConfig) -> list[str]:
        """The model card's lines on how the result is used."""
        package, loader = "transformers", self.loader
        if config.lora and not self.merged:
            package, loader = "peft", "AutoPeftModelForCausalLM"
        load = f'model = {loader}.from_pretrained("{config.output.name}")'
        return ["```python", f"from {package} import {loader}", "", load, "```"]

    def leak(self, count: int) -> str:
        """What is wrong with `count` held-out items whose prompts are trained on too."""
        return f"{count} held-out pairs have a prompt that is trained on too, which flatters the held-out accuracy"

    def evaluated(self, metrics: Mapping[str, float]) -> str:
        """The figures of one evaluation, in a line."""
        from genarm.training.report import pair_text

        return pair_text(metrics)

    def figure(self, metrics: Mapping[str, float]) -> str | None:
        """The one held-out figure that says most, if any."""
        from genarm.training.report import accuracies

        found = accuracies(metrics).get("all")
        return None if found is None else str(found)

    def summary(self, metrics: Mapping[str, float]) -> list[str]:
        """The held-out figures of a finished run, for a terminal."""
        from genarm.training.report import accuracies

        return [f"held-out accuracy, {label}: {accuracy}" for label, accuracy in accuracies(metrics).items()]

    def held_out(self, metrics: Mapping[str, float]) -> list[str]:
        """The model card's section on what was held out, its title first."""
        from genarm.training.report import accuracy_section

        return accuracy_section(metrics, self.score, self.unit)


KINDS: dict[str, Kind] = {}
"""By name, in the order in which they are listed."""


def register(*kinds: Kind) -> None:
    """Let --kind be one of these, too."""
    KINDS.update({kind.name: kind for kind in kinds})


def find_kind(name: str) -> Kind:
    """The kind of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in KINDS:
        more = "" if len(KINDS) > 1 else "; what an ARM is compared with comes with `import genarm.lab.training`"
        raise ConfigError(f"--kind must be one of {', '.join(KINDS)}, got {name!r}{more}")
    return KINDS[name]


def check_kind(config: TrainConfig) -> None:
    """Refuse options that mean nothing for the kind.

    Raises:
        ConfigError: names the option, the kinds that take it, and what to do.
    """
    kind = find_kind(config.kind)
    for name in OPTIONAL:
        if name not in kind.takes and getattr(config, name):
            takers = " and ".join(other.name for other in KINDS.values() if name in other.takes) or "others"
            why = f": {kind.lacks[name]}" if name in kind.lacks else ""
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} is for --kind {takers}, not {config.kind}{why}; leave it out")
    kind.check(config)
