"""How replies are drawn: settings, seeds, and the ids that end a reply.

Only the token ids are taken from a model's generation_config.json: how a reply is sampled is what `Sampling`
says and nothing else, so that the same options mean the same for every model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING

from genarm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a reply is drawn.

    Attributes:
        max_new_tokens: the most tokens of a reply.
        temperature: divides the combined log-probabilities; 0 is greedy.
        top_k: how many of the likeliest tokens are kept, and with them those as likely as the last; 0 keeps all.
        top_p: the smallest set of tokens with this much probability is kept; 1 keeps all.
        min_p: tokens less likely than this share of the likeliest one are cut; 0 keeps all.
        repetition_penalty: multiplies the log-probability (divides it where a bias made it positive) of every token
            that the prompt or the reply already has; 1 changes nothing.
        presence_penalty: subtracted from the log-probability of every token that the reply already has.
        frequency_penalty: subtracted once for every time the reply has it.
        logit_bias: {token id: number} added to log-probabilities.
        min_new_tokens: up to so many tokens, ids that end the reply are not drawn and stop texts do not end it.
    """

    max_new_tokens: int = field(default=128, metadata={"help": "the most tokens of a reply"})
    temperature: float = field(default=1.0, metadata={"metavar": "T", "help": "0 is greedy"})
    top_k: int = 0
    top_p: float = field(
        default=1.0, metadata={"metavar": "P", "help": "sample from the likeliest tokens of this probability"}
    )
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))  # its owner may change it later
        for name in ("max_new_tokens", "min_new_tokens", "top_k"):
            if not isinstance(getattr(self, name), Integral):
                raise ConfigError(f"{name} is {getattr(self, name)!r:.50}; it must be a whole number")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ConfigError(
                f"min_new_tokens is {self.min_new_tokens}; it must be from 0 to max_new_tokens, {self.max_new_tokens}"
            )
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature is {self.temperature:g}; it must be 0 (greedy) or more")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; it must be at least 1, or 0 to keep all tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p:g}; it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p is {self.min_p:g}; it must be from 0 to 1")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise ConfigError(
                f"repetition_penalty is {self.repetition_penalty:g}; it must be from 0.01 to 100, and 1 has no effect"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not -2 <= value <= 2:
                raise ConfigError(f"{name} is {value:g}; it must be from -2 to 2")
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise ConfigError(f"logit_bias of token {token} is {bias:g}; it must be from -100 to 100")

    @property
    def plain(self) -> bool:
        """Whether tokens are drawn from the combined distribution as it is."""
        return self.temperature == 1 and not (self.cuts or self.penalises)

    @property
    def cuts(self) -> bool:
        """Whether some tokens are cut for being unlikely."""
        return bool(self.top_k or self.top_p < 1 or self.min_p)

    @property
    def penalises(self) -> bool:
        """Whether log-probabilities of single tokens change."""
        return bool(self.counts or self.logit_bias)

    @property
    def counts(self) -> bool:
        """Whether earlier tokens change later ones' probabilities beyond what the models see."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)


def derive_seed(seed: int, index: int) -> int:
    """A 32-bit seed for the `index`-th part of a run with the seed `seed`, unlike those of other parts and runs."""
    import numpy as np

    return int(np.random.SeedSequence((seed, index)).generate_state(1)[0])


def check_seed(seed: int) -> int:
    """`seed` itself (raises ConfigError if it is negative, no whole number, or has more than 1,000 bits)."""
    if not isinstance(seed, Integral) or int(seed).bit_length() > _SEED_BITS:
        raise ConfigError(f"--seed must be a whole number of at most {_SEED_BITS} bits")
    if seed < 0:
        raise ConfigError(f"--seed is {seed}; it must be 0 or more")
    return seed


_SEED_BITS = 1000


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a reply, by the model's files, its tokenizer or its chat template."""
    from genarm.text.prompts import end_ids

    return end_ids(model.generation_config, tokenizer)
