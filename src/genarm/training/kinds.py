"""What a kind of training is, and all kinds that there are: `arm` with its losses, and what others have registered.

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

Options = Mapping[str, float | int | bool | str | None]


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
OPTIONAL = (
    *("beta", "rewards", "generations", "early_stopping", "load_in_4bit", "lora_dropout", "head"),
    *("through", "through_weight", "start", "wish", "prompts"),
)


class Kind:
    """A kind of training; what is not overridden is as for a policy that learns from pairs.

    Attributes:
        name: as --kind has it, or of an ARM's loss, as --loss has it.
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

    def keep(self, config: TrainConfig, data: TrainData[Any]) -> None:
        """Write down what was drawn for this run, once its folder is begun; called in the main process."""

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
        if config.adapter and not self.merged:
            package, loader = "peft", "AutoPeftModelForCausalLM"
        load = f'model = {loader}.from_pretrained("{config.output.name}")'
        return ["```python", f"from {package} import {loader}", "", load, "```"]

    def closing(self, config: TrainConfig) -> list[str]:
        """The last lines of a run on a terminal: what the result is for."""
        return []

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

LOSSES: dict[str, Kind] = {}
"""What --kind arm may be trained by, by the name of its loss, likewise: each is a kind of its own."""


def register(*kinds: Kind) -> None:
    """Let --kind be one of these, too."""
    KINDS.update({kind.name: kind for kind in kinds})


def register_losses(*kinds: Kind) -> None:
    """Let --loss be one of these, too."""
    LOSSES.update({kind.name: kind for kind in kinds})


def find_kind(name: str) -> Kind:
    """The kind of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in KINDS:
        more = "" if len(KINDS) > 1 else "; what an ARM is compared with comes with `import genarm.lab.training`"
        raise ConfigError(f"--kind must be one of {', '.join(KINDS)}, got {name!r}{more}")
    return KINDS[name]


def kind_of(config: TrainConfig) -> Kind:
    """What `config` trains: its kind, of an ARM with its loss.

    Raises:
        ConfigError: there is no such kind or loss.
    """
    kind = find_kind(config.kind)
    if kind.name != "arm" or config.loss is None:
        return kind
    if config.loss not in LOSSES:
        raise ConfigError(f"--loss must be one of {', '.join(LOSSES)}, got {config.loss!r}")
    return LOSSES[config.loss]


def check_kind(config: TrainConfig) -> None:
    """Refuse options that mean nothing for the kind or the loss.

    Raises:
        ConfigError: names the option, the kinds and losses that take it, and what to do.
    """
    kind = kind_of(config)
    if config.loss is not None and config.kind != "arm":
        raise ConfigError(f"--loss is for --kind arm, not {config.kind}; leave it out")
    for name in OPTIONAL:
        if name not in kind.takes and getattr(config, name):
            kinds = " and ".join(other.name for other in KINDS.values() if name in other.takes)
            losses = " and ".join(other.name for other in LOSSES.values() if name in other.takes)
            takers = f"--kind {kinds}" if kinds else f"--loss {losses}" if losses else "other kinds"
            own = config.kind if kind in KINDS.values() else f"--loss {kind.name}"
            why = f": {kind.lacks[name]}" if name in kind.lacks else ""
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} is for {takers}, not {own}{why}; leave it out")
    kind.check(config)
