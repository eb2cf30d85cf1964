"""What `genarm bench` measures, its `subject`; each field is as its help text says. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from genarm.engine import EngineOptions
from genarm.errors import ConfigError
from genarm.lab.bench.shapes import SHAPES
from genarm.model.placement import Loading
from genarm.sampling import check_seed

_LEAST_TOKENS = 8
_MOST_TOKENS = 2048
LEAST_SERVED_TOKENS = 2


@dataclass(frozen=True, kw_only=True)
class ShapeSettings:
    """All that figures of models with random weights depend on, but for the machine.

    Raises:
        ConfigError: a value out of range.
    """

    base_shape: str = field(
        default="200m",
        metadata={"choices": tuple(SHAPES), "help": "of the base; its full ARM has an eighth of the parameters"},
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "choices": ("float32", "bfloat16", "float16"),
            "help": "of the weights; by default bfloat16 where the device has it, and float32 elsewhere",
        },
    )
    tokens: int = field(default=64, metadata={"help": "of each reply, after a prompt of 32"})
    rounds: int = field(default=7, metadata={"help": "in which every contestant runs once"})
    streams: Sequence[int] = field(default=(1, 4, 16), metadata={"nargs": "+", "help": "replies at once"})
    seed: int = field(default=0, metadata={"metavar": "S", "help": "of everything random"})

    def __post_init__(self) -> None:
        check_seed(self.seed)
        assert self.base_shape in SHAPES
        if not _LEAST_TOKENS <= self.tokens <= _MOST_TOKENS:
            raise ConfigError(f"--tokens is {self.tokens}; it must be from {_LEAST_TOKENS} to {_MOST_TOKENS}")
        _check_least_one(self, ("rounds", "streams"))


@dataclass(frozen=True, kw_only=True)
class DecodeSettings(ShapeSettings):
    """What `genarm bench decode` measures; 1 is always among its streams."""

    subject = "decode"

    device: str | None = field(
        default=None,
        metadata={"metavar": "DEVICE", "help": "cpu, cuda, cuda:1, …; by default the first GPU, if any"},
    )
    agreement: Sequence[float] = field(
        default=(0.8,),
        metadata={"nargs": "+", "metavar": "P", "help": "acceptance of drafts that the full ARM is made for"},
    )
    real: tuple[str, str] | None = field(
        default=None,
        metadata={
            "nargs": 2,
            "metavar": ("BASE", "ARM"),
            "help": "also count the drafts of a real ARM for a real base: folders or hub ids",
        },
    )
    prompts: Path | None = field(
        default=None,
        metadata={"metavar": "FILE", "help": "for the real pair, .txt or .jsonl; by default a few questions"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for value in self.agreement:
            if not 0 < value < 1:
                raise ConfigError(f"--agreement has {value:g}; each must be above 0 and below 1")
        if self.prompts is not None and self.real is None:
            raise ConfigError("--prompts are for a real pair; give --real BASE ARM too, or leave them out")


@dataclass(frozen=True, kw_only=True)
class VllmSettings(ShapeSettings):
    """What `genarm bench vllm` measures."""

    subject = "vllm"

    eager: bool = field(default=False, metadata={"help": "without torch.compile and CUDA graphs"})


@dataclass(frozen=True, kw_only=True)
class ServeSettings(Loading):
    """What `genarm bench serve` measures, of the model in `folder`, with an engine as `genarm serve` makes it.

    Raises:
        ConfigError: a value out of range.
    """

    subject = "serve"

    folder: str
    concurrency: Sequence[int] = field(
        default=(1, 4, 16), metadata={"nargs": "+", "help": "replies at once; each is measured"}
    )
    tokens: int = field(default=64, metadata={"help": "of each reply, after a prompt of 32"})
    requests: int = field(default=4, metadata={"help": "of each client in a round"})
    rounds: int = field(default=5, metadata={"help": "in which each concurrency is measured once"})
    explain: bool = field(
        default=False, metadata={"help": "ask for the log-probabilities and the rewards of every token, too"}
    )
    speculate: int = EngineOptions.speculate
    draft: str | None = None
    seed: int = field(default=0, metadata={"metavar": "S", "help": "of everything random"})

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.tokens < LEAST_SERVED_TOKENS:
            raise ConfigError(f"--tokens is {self.tokens}; it must be at least {LEAST_SERVED_TOKENS}")
        _check_least_one(self, ("requests", "rounds", "concurrency"))


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What `genarm bench train` measures.

    Raises:
        ConfigError: a value out of range.
    """

    subject = "train"

    model: str = field(metadata={"metavar": "MODEL", "help": "model to train: a hub id or a folder"})
    data: str = field(metadata={"metavar": "DATA", "help": "preference pairs, as genarm train takes them"})
    lora: bool = field(default=False, metadata={"help": "train an adapter, as genarm train --lora does"})
    bf16: bool = field(default=False, metadata={"help": "compute in bfloat16"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "compute activations again in the backward"})
    batch_size: int = field(default=8, metadata={"help": "pairs of a step"})
    steps: int = field(default=2, metadata={"help": "of a round"})
    rounds: int = field(default=5, metadata={"help": "in which every contestant trains once"})
    seed: int = field(default=0, metadata={"metavar": "S", "help": "of everything random"})

    def __post_init__(self) -> None:
        check_seed(self.seed)
        _check_least_one(self, ("batch_size", "steps", "rounds"))


def _check_least_one(settings: ShapeSettings | ServeSettings | TrainSettings, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, Sequence) and min(value) < 1:
            raise ConfigError(f"--{name} has {min(value)}; each must be at least 1")
        if isinstance(value, int) and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
