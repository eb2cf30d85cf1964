"""What is measured, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from genarm.errors import ConfigError
from genarm.model.placement import Loading
from genarm.training.config import OBJECTIVES

if TYPE_CHECKING:
    from genarm.text.prompts import Reading


@dataclass(frozen=True, kw_only=True)
class AccuracySettings(Loading):
    """Rewards to measure on preference pairs, each field as its help text says; pairs are read as in training.

    Raises:
        ConfigError: no model, one twice, a number below 1, or options that do not go together.
    """

    models: tuple[str, ...] = field(
        metadata={
            "positional": True,
            "nargs": "+",
            "metavar": "MODEL",
            "help": "an ARM (a causal LM's folder or hub id, or a LoRA adapter's folder), a guided folder (each of its "
            "rewards, and the guided policy), or a trajectory reward model",
        }
    )
    data: str = field(
        metadata={
            "metavar": "DATA",
            "help": "preference pairs, in any format that genarm train takes: a hub id, a folder, or a file",
        }
    )
    split: str = field(default="train", metadata={"help": "split or slice, such as test[:500]"})
    objective: str | None = field(
        default=None,
        metadata={"choices": OBJECTIVES, "help": "which label of PKU-SafeRLHF says what is chosen"},
    )
    raw: bool = field(default=False, metadata={"help": "take text as it is, without the chat template"})
    category: str | None = field(
        default=None,
        metadata={
            "metavar": "COLUMN",
            "help": "column of the data with each pair's category, such as subset",
        },
    )
    base: str | None = field(
        default=None,
        metadata={
            "metavar": "MODEL",
            "help": "also score each causal LM by log π − log π_base, the implicit reward of DPO, with this model as "
            "the base, and the policy of this base guided by it",
        },
    )
    weights: str | None = field(
        default=None,
        metadata={
            "metavar": "NAME=W,…",
            "help": "reward weights of guided policies, as in helpful=1,harmless=0.5; the folder's own for those not "
            "named; an ARM that guides --base has its name in the tables, and 1",
        },
    )
    max_kl: float | None = field(
        default=None,
        metadata={
            "metavar": "E",
            "help": "the most nats that a token's distribution may be from the base's in guided policies, as in "
            "genarm generate",
        },
    )
    max_prompt_tokens: int | None = field(default=None, metadata={"help": "longer prompts lose their beginning"})
    max_response_tokens: int | None = field(default=None, metadata={"help": "longer responses lose their end"})
    batch_size: int = field(default=16, metadata={"help": "responses scored in one forward"})
    template_arg: tuple[str, ...] = ()

    @property
    def reading(self) -> Reading:
        """How prompts become token ids (raises ConfigError)."""
        from genarm.text.prompts import Reading, read_template_args

        return Reading(template_args=read_template_args(self.template_arg))

    def __post_init__(self) -> None:
        if self.template_arg and self.raw:
            raise ConfigError(
                "--raw takes text without the chat template, so --template-arg would do nothing; give one"
            )
        if not self.models:
            raise ConfigError("there is no model to measure; name one at least")
        twice = sorted({model for model in self.models if self.models.count(model) > 1})
        if twice:
            raise ConfigError(f"the model {twice[0]} is given twice; name each once")
        if self.max_kl is not None:
            from genarm.model.weights import check_max_kl  # which imports torch

            check_max_kl(self.max_kl)
        for name in ("batch_size", "max_prompt_tokens", "max_response_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
