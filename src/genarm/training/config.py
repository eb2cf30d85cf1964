"""The settings of a training run: each option's name, default and help text, once.

The command line is generated from the fields below, a TOML file may hold any of them, and the resolved
settings are saved beside the result. Nothing heavy is imported here.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from genarm.errors import ConfigError
from genarm.training.kinds import KINDS, LOSSES, check_kind, kind_of

if TYPE_CHECKING:
    from genarm.text.prompts import Reading

SCHEDULES = ("cosine", "linear", "constant")
HEAD_LEARNING_RATE = 5e-3
OBJECTIVES = ("better", "safer")
STARTS = ("zero", "model")

# What may differ between a run and its resumption: these say where results go, not what they are.
_NOT_TRAINING = frozenset({"output", "report_to"})


# Titles under which --help lists the options.
_MODEL, _LOSS, _DATA, _LORA, _TRAINING, _PROGRESS = (
    "model and result",
    "loss of an ARM",
    "data",
    "LoRA",
    "training",
    "evaluation and checkpoints",
)


def _about(group: str, text: str, **details: Any) -> dict[str, Any]:
    """Metadata of a field; `details` are its `metavar`, `choices` and `aliases` on the command line."""
    return {"group": group, "help": text, **details}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one training run; the defaults for an ARM are those of GenARM (arXiv 2410.08193, section 4).

    Raises:
        ConfigError: a value out of range, or options that do not go together.
    """

    model: str = field(metadata=_about(_MODEL, "model to start from: a hub id or a folder", metavar="MODEL"))
    data: str = field(
        default="",
        metadata=_about(
            _MODEL,
            "preference pairs: a hub id (owner/name, or owner/name/subfolder), a folder, or a file "
            "(.jsonl, .json, .parquet, .csv, .tsv); for --kind rlhf, their prompts count, or rows with a prompt alone; "
            "--loss distil needs none",
            metavar="DATA",
        ),
    )
    output: Path = field(metadata=_about(_MODEL, "folder for the result; must not hold another run", metavar="DIR"))
    kind: str = field(
        default="arm",
        metadata=_about(
            _MODEL,
            "what to train: an ARM; or for comparison a classic reward model (trajectory), or a policy (dpo, or rlhf "
            "against trajectory rewards)",
            choices=KINDS,
        ),
    )
    rewards: str | None = field(
        default=None,
        metadata=_about(
            _MODEL,
            "for --kind rlhf, the trajectory rewards to raise, each with its weight in the sum (1 if not given)",
            metavar="NAME=FOLDER[:WEIGHT],…",
        ),
    )
    revision: str | None = field(default=None, metadata=_about(_MODEL, "revision of the model on the hub"))
    trust_remote_code: bool = field(default=False, metadata=_about(_MODEL, "run Python code that comes with the model"))
    chat_template: Path | None = field(
        default=None, metadata=_about(_MODEL, "Jinja file to use as the tokenizer's chat template", metavar="FILE")
    )

    loss: str | None = field(
        default=None,
        metadata=_about(
            _LOSS,
            "how --kind arm learns: arm (the paper's, the default), reference (what the model says more than at its "
            "start), product (through the guided policy itself, with a base), or distil (a wish in words, without "
            "pairs)",
            choices=LOSSES,
        ),
    )
    through: str | None = field(
        default=None,
        metadata=_about(
            _LOSS,
            "for --loss product and distil, the frozen base that the ARM shall guide: a hub id or a folder (default: "
            "the model itself, as it starts)",
            metavar="BASE",
        ),
    )
    through_weight: str | None = field(
        default=None,
        metadata=_about(
            _LOSS,
            "for --loss product and distil, the weight w = β_r/β at which the ARM shall guide, or a range of weights "
            "that it shall serve (default: 1)",
            metavar="W or LOW-HIGH",
        ),
    )
    start: str | None = field(
        default=None,
        metadata=_about(
            _LOSS,
            "for --loss product and distil, what the reward is at the start: zero (it is a difference to the model as "
            "it starts, and is composed so), or model (the log-probability of a language model, as an ARM's is)",
            choices=STARTS,
        ),
    )
    wish: str | None = field(
        default=None,
        metadata=_about(
            _LOSS, "for --loss distil, the system text whose effect the ARM shall have; @FILE reads it", metavar="TEXT"
        ),
    )
    prompts: str | None = field(
        default=None,
        metadata=_about(
            _LOSS,
            "for --loss distil, prompts that the wished-for model answers: named as --data, or a .txt with one per "
            "line; of pairs, their prompts",
            metavar="PROMPTS",
        ),
    )

    raw: bool = field(
        default=False,
        metadata=_about(
            _DATA, "take text as it is, without the chat template, as genarm generate --raw does; messages are refused"
        ),
    )
    split: str = field(default="train", metadata=_about(_DATA, "split to train on, such as train or train[:1000]"))
    objective: str | None = field(
        default=None,
        metadata=_about(
            _DATA, "which label of PKU-SafeRLHF says what is chosen (for other data, leave it out)", choices=OBJECTIVES
        ),
    )
    eval_data: str | None = field(
        default=None, metadata=_about(_DATA, "held-out pairs, named as --data", metavar="DATA")
    )
    eval_split: str | None = field(
        default=None,
        metadata=_about(
            _DATA,
            "split to evaluate on, of --eval-data (default there: test, or the whole of a file) or else of --data",
        ),
    )
    eval_fraction: float = field(
        default=0.05,
        metadata=_about(
            _DATA,
            "share of the prompts of --data to hold out where no evaluation data is named; 0 for none. A run that "
            "--max-steps cuts short is evaluated on as much less of it",
        ),
    )
    template_arg: tuple[str, ...] = field(
        default=(),
        metadata=_about(
            _DATA,
            "an argument of the chat template, as in enable_thinking=false; JSON, or else text; repeatable",
            metavar="NAME=VALUE",
        ),
    )
    max_prompt_tokens: int | None = field(
        default=None,
        metadata=_about(
            _DATA, "longest prompt in tokens, cut from the left (default: half the model's context, at most 512)"
        ),
    )
    max_response_tokens: int | None = field(
        default=None,
        metadata=_about(
            _DATA,
            "longest response in tokens, cut from the right; for rlhf, of those drawn "
            "(default: half the model's context, at most 512)",
        ),
    )

    lora: bool = field(default=False, metadata=_about(_LORA, "train a LoRA adapter instead of all weights"))
    lora_rank: int = field(default=8, metadata=_about(_LORA, "rank of the adapter"))
    lora_alpha: int = field(
        default=16, metadata=_about(_LORA, "scale of the adapter; its update is multiplied by alpha / rank")
    )
    lora_dropout: float | None = field(
        default=None,
        metadata=_about(_LORA, "dropout on the adapter's input (default: 0.05; none for dpo and rlhf)"),
    )
    lora_targets: str = field(
        default="all-linear",
        metadata=_about(_LORA, "modules that get an adapter: all-linear, or names separated by commas"),
    )
    head: int | None = field(
        default=None,
        metadata=_about(
            _LORA,
            "train a head ARM of this rank instead: a map of the last hidden states, read by the model's own output "
            "layer, which guides the model that it is trained on nearly for nothing",
            metavar="RANK",
        ),
    )
    load_in_4bit: bool = field(
        default=False, metadata=_about(_LORA, "QLoRA: hold the frozen weights in 4 bits (needs --lora or --head)")
    )

    beta: float | None = field(
        default=None,
        metadata=_about(
            _TRAINING,
            "β_r of the ARM's loss, −log σ(β_r · margin in summed log-probabilities); for dpo the β of its loss, for "
            "rlhf the weight of the KL divergence from the model (default: 0.05; for dpo 0.1)",
        ),
    )
    generations: int | None = field(
        default=None,
        metadata=_about(_TRAINING, "for --kind rlhf, replies drawn for each prompt of a step (default: 4)"),
    )
    epochs: float = field(default=1.0, metadata=_about(_TRAINING, "passes over the data"))
    max_steps: int | None = field(
        default=None, metadata=_about(_TRAINING, "stop after this many optimizer steps, whatever --epochs says")
    )
    learning_rate: float | None = field(
        default=None,
        metadata=_about(
            _TRAINING,
            "peak learning rate (default: 5e-4 with --lora, 1e-5 without; for rlhf 5e-5 and 1e-6)",
            aliases=("lr",),
        ),
    )
    schedule: str = field(
        default="cosine", metadata=_about(_TRAINING, "shape of the learning rate after the warm-up", choices=SCHEDULES)
    )
    warmup: float = field(
        default=0.03, metadata=_about(_TRAINING, "share of the steps over which the learning rate rises from 0")
    )
    batch_size: int = field(
        default=8, metadata=_about(_TRAINING, "pairs (for rlhf, replies) per device and forward pass")
    )
    accumulation: int = field(default=4, metadata=_about(_TRAINING, "forward passes per optimizer step"))
    weight_decay: float = field(default=0.0, metadata=_about(_TRAINING, "weight decay of AdamW"))
    max_grad_norm: float = field(
        default=1.0, metadata=_about(_TRAINING, "clip gradients to this norm; 0 for no clipping")
    )
    bf16: bool = field(
        default=False, metadata=_about(_TRAINING, "compute in bfloat16 (weights that are trained stay float32)")
    )
    gradient_checkpointing: bool = field(
        default=False, metadata=_about(_TRAINING, "recompute activations: less memory, more time")
    )
    seed: int = field(default=0, metadata=_about(_TRAINING, "seed of weights, data order, dropout and held-out split"))

    eval_steps: int | None = field(
        default=None,
        metadata=_about(
            _PROGRESS,
            "evaluate every so many steps, on all held-out pairs (default: at every fifth of the run, or less often "
            "and on fewer of them where that would take more than a tenth of its time)",
        ),
    )
    save_steps: int | None = field(
        default=None,
        metadata=_about(
            _PROGRESS, "write a checkpoint every so many steps (default: as --eval-steps, or a fifth of the run)"
        ),
    )
    early_stopping: int | None = field(
        default=None,
        metadata=_about(
            _PROGRESS,
            "stop after this many evaluations without a lower held-out loss, and keep the best weights",
            metavar="PATIENCE",
        ),
    )
    report_to: str = field(
        default="none",
        metadata=_about(
            _PROGRESS, "also log to tensorboard, wandb or another tracker that transformers knows; several with commas"
        ),
    )

    @property
    def reading(self) -> Reading:
        """How prompts become token ids (raises ConfigError)."""
        from genarm.text.prompts import Reading, read_template_args

        return Reading(template_args=read_template_args(self.template_arg))

    def __post_init__(self) -> None:
        for name in ("output", "chat_template"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, Path(value))
        if isinstance(self.through_weight, int | float):  # as TOML may have it
            object.__setattr__(self, "through_weight", f"{self.through_weight}")
        if not self.data and isinstance(self.prompts, str):  # what is read, whatever it is called
            object.__setattr__(self, "data", self.prompts)
        _check_types(self)
        _check_ranges(self)
        check_kind(self)
        _check_together(self)
        if self.template_arg and self.raw:
            raise ConfigError(
                "--raw takes text without the chat template, so --template-arg would do nothing; give one"
            )
        _ = self.template_arg and self.reading

    @property
    def resolved_learning_rate(self) -> float:
        """The learning rate, with the default that goes with what is trained."""
        if self.learning_rate is not None:
            return self.learning_rate
        adapter, whole = kind_of(self).learning_rates
        return HEAD_LEARNING_RATE if self.head else adapter if self.lora else whole

    @property
    def adapter(self) -> bool:
        """Whether the model's own weights stay as they are."""
        return self.lora or self.head is not None

    @property
    def made_of(self) -> str:
        """What is trained of the model, in the words of a model card: "fine-tuned", say, before the model's name."""
        return f"head of rank {self.head} on" if self.head else "LoRA adapter on" if self.lora else "fine-tuned"

    @property
    def resolved_beta(self) -> float:
        """β, with the default that goes with the kind; 1 for a trajectory reward, whose head has its own scale."""
        return self._resolved("beta", 1.0)

    @property
    def resolved_lora_dropout(self) -> float:
        """The adapter's dropout; by default none for a policy, which is compared with its reference."""
        return self._resolved("lora_dropout", 0.0)

    def _resolved(self, name: str, otherwise: float) -> float:
        given = getattr(self, name)
        return float(kind_of(self).takes.get(name, otherwise) or 0.0) if given is None else given


def option_name(field_name: str) -> str:
    """The command-line spelling of a field: `max_steps` is `--max-steps`."""
    return "--" + field_name.replace("_", "-")


def make_config(overrides: Mapping[str, Any], file: Path | None = None) -> TrainConfig:
    """Settings from a TOML file (if any), with `overrides` on top.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or one of the required settings is missing.
    """
    settings = {**(_read_toml(file) if file else {}), **overrides}
    _refuse_unknown(settings, source=str(file) if file else "the settings")
    prompts = "prompts" in LOSSES.get(str(settings.get("loss")), KINDS["arm"]).takes
    required = ["model", "prompts" if prompts else "data", "output"]
    missing = [option_name(name) for name in required if name not in settings]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} missing; give it on the command line or in the file of --config")
    return TrainConfig(**settings)


def to_toml(config: TrainConfig) -> str:
    """`config` as TOML that `make_config` reads back; settings that are None are left out."""
    import tomli_w

    values = {k: v for k, v in dataclasses.asdict(config).items() if v is not None}
    return tomli_w.dumps({k: str(v) if isinstance(v, Path) else v for k, v in values.items()})


def training_differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """One text per setting that changes the training and differs, such as `--lr was 0.1, is 0.2`."""
    return [
        f"{option_name(option.name)} was {before!r}, is {after!r}"
        for option in dataclasses.fields(TrainConfig)
        if option.name not in _NOT_TRAINING
        and (before := getattr(old, option.name)) != (after := getattr(new, option.name))
    ]


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {file}: {error.strerror}; check --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}; expected lines such as lora_rank = 8") from error


def _refuse_unknown(settings: Iterable[str], source: str) -> None:
    allowed = [option.name for option in dataclasses.fields(TrainConfig)]
    unknown = [key for key in settings if key not in allowed]
    if unknown:
        raise ConfigError(f"unknown setting {', '.join(unknown)} in {source}; allowed are {', '.join(allowed)}")


def _check_types(config: TrainConfig) -> None:
    for name, hint in get_type_hints(TrainConfig).items():
        value = getattr(config, name)
        if get_origin(hint) is tuple:
            if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
                raise ConfigError(f"{option_name(name)} must be a list of texts, got {value!r}")
            object.__setattr__(config, name, tuple(value))  # TOML has lists
            continue
        kinds = get_args(hint) or (hint,)
        if float in kinds and type(value) is int:
            object.__setattr__(config, name, float(value))  # TOML's 1 for 1.0
        elif type(value) not in kinds and not (Path in kinds and isinstance(value, os.PathLike)):
            names = " or ".join("nothing" if kind is NoneType else kind.__name__ for kind in kinds)
            raise ConfigError(f"{option_name(name)} must be {names}, got {value!r}")


def _check_ranges(config: TrainConfig) -> None:
    for name in ("model", "data", "split", "through", "wish", "prompts"):
        if getattr(config, name) is not None and not getattr(config, name).strip():
            raise ConfigError(f"{option_name(name)} is empty; give a {'text' if name == 'wish' else 'name'}")
    at_least_one = ("max_prompt_tokens", "max_response_tokens", "lora_rank", "lora_alpha", "head", "batch_size")
    for name in (
        *at_least_one,
        "accumulation",
        "max_steps",
        "generations",
        "eval_steps",
        "save_steps",
        "early_stopping",
    ):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"{option_name(name)} must be at least 1, got {value}")
    for name in ("beta", "epochs", "learning_rate"):
        value = getattr(config, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{option_name(name)} must be a finite number above 0, got {value}")
    for name in ("weight_decay", "max_grad_norm", "seed"):
        value = getattr(config, name)
        if not (value >= 0 and math.isfinite(value)):
            raise ConfigError(f"{option_name(name)} must be a finite number, 0 or above, got {value}")
    for name in ("eval_fraction", "lora_dropout", "warmup"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < 1:
            raise ConfigError(f"{option_name(name)} must be from 0 to below 1, got {value}")
    for option in dataclasses.fields(config):
        value, choices = getattr(config, option.name), option.metadata.get("choices")
        if choices and value is not None and value not in choices:
            raise ConfigError(f"{option_name(option.name)} must be one of {', '.join(choices)}, got {value!r}")


def _check_together(config: TrainConfig) -> None:
    if config.lora and config.head:
        raise ConfigError("--lora trains all linear layers but the last and --head the last alone; give one of the two")
    if config.load_in_4bit and not config.adapter:
        raise ConfigError("--load-in-4bit trains an adapter on frozen 4-bit weights: add --lora, or leave it out")
    if config.early_stopping is None:
        return
    if config.eval_data is None and config.eval_split is None and config.eval_fraction == 0:
        raise ConfigError("--early-stopping needs held-out pairs: give --eval-data, --eval-split or --eval-fraction")
    if config.save_steps is not None and (config.eval_steps is None or config.save_steps % config.eval_steps):
        raise ConfigError(
            f"--early-stopping keeps the best checkpoint, so --save-steps ({config.save_steps}) must be a multiple of "
            f"--eval-steps ({config.eval_steps}); leave --save-steps out to save at every evaluation"
        )
