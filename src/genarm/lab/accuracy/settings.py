"""What is measured, and how."""

from __future__ import annotations

from dataclasses import dataclass

from genarm.errors import ConfigError
from genarm.text.prompts import Reading, read_template_args


@dataclass(frozen=True, kw_only=True)
class AccuracySettings:
    """Rewards to measure on preference pairs.

    Attributes:
        models: folders or hub ids: ARMs (causal LMs, or folders of LoRA adapters), guided folders, which stand for all
            of their rewards, and trajectory reward models.
        data, split, objective: where the pairs are, as in training.
        raw: text is taken as it is, without the chat template, as in training with the same setting.
        category: the column of the data that says which category a pair belongs to.
        base: a causal LM; every causal LM among `models` is also scored by log π(y|x) − log π_base(y|x).
        batch_size: responses that are scored in one forward.
        max_prompt_tokens, max_response_tokens: what is longer is cut; None for the lengths of training.
        template_arg: arguments of the chat template, each in the form NAME=VALUE.
        dtype, device, trust_remote_code: how models are loaded.
    """

    models: tuple[str, ...]
    data: str
    split: str = "train"
    objective: str | None = None
    raw: bool = False
    category: str | None = None
    base: str | None = None
    batch_size: int = 16
    max_prompt_tokens: int | None = None
    max_response_tokens: int | None = None
    template_arg: tuple[str, ...] = ()
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False

    @property
    def reading(self) -> Reading:
        """How prompts become token ids (raises ConfigError)."""
        return Reading(template_args=read_template_args(self.template_arg))

    def __post_init__(self) -> None:
        object.__setattr__(self, "template_arg", tuple(self.template_arg))
        if self.template_arg and self.raw:
            raise ConfigError(
                "--raw takes text without the chat template, so --template-arg would do nothing; give one"
            )
        if not self.models:
            raise ConfigError("there is no model to measure; name one at least")
        twice = sorted({model for model in self.models if self.models.count(model) > 1})
        if twice:
            raise ConfigError(f"the model {twice[0]} is given twice; name each once")
        for name in ("batch_size", "max_prompt_tokens", "max_response_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
