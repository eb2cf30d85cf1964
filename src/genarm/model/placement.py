"""How models are held: the settings that commands and measurements share; nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What the weights of models are held in, and where; as `ModelFiles.load` takes them."""

    dtype: str = field(
        default="auto",
        metadata={
            "choices": ("auto", "float32", "bfloat16", "float16"),
            "help": "of the weights; auto is what the files have",
        },
    )
    device: str | None = field(
        default=None,
        metadata={
            "metavar": "DEVICE",
            "help": "cpu, cuda, cuda:1, …, or auto to spread the model over all GPUs; by default the first GPU, if any",
        },
    )


@dataclass(frozen=True, kw_only=True)
class Loading(Placement):
    """A `Placement`, and whether models may bring code of their own."""

    trust_remote_code: bool = field(default=False, metadata={"help": "allow models with code of their own"})
