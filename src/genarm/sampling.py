"""How replies are drawn, and replies of a model to one batch of prompts through transformers' `generate`.

The latter decodes one large batch of equals, as sweeps over tiny models do; `genarm.engine` does everything else.

Only the token ids are taken from a model's generation_config.json: how a reply is sampled is what `Sampling`
says and nothing else, so that the same options mean the same for every model.

Shapes: B rows, T positions, R rewards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

from genarm.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

FinishReason = Literal["stop", "length"]


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

    def generation_config(self, stop_ids: Sequence[int], pad_id: int) -> GenerationConfig:
        """The same in transformers' words.

        Raises:
            UnsupportedError: presence and frequency penalties, which transformers does not have.
        """
        from transformers import GenerationConfig

        if self.presence_penalty or self.frequency_penalty:
            raise UnsupportedError(
                "presence_penalty and frequency_penalty are unknown to transformers' generate; leave them out, use "
                "repetition_penalty, or decode with genarm's engine"
            )
        shared: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "min_new_tokens": self.min_new_tokens or None,
            "repetition_penalty": self.repetition_penalty if self.repetition_penalty != 1 else None,
            "sequence_bias": {(token,): float(bias) for token, bias in self.logit_bias.items()} or None,
            "eos_token_id": list(stop_ids) or None,
            "pad_token_id": pad_id,
        }
        if self.temperature == 0:
            return GenerationConfig(do_sample=False, **shared)
        return GenerationConfig(
            do_sample=True,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p or None,
            **shared,
        )


@dataclass(frozen=True, kw_only=True)
class SampledReply:
    """One response: its text, its token ids (the one that ended it included) and why it ended."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


def sample_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    seed: int,
    weights_BR: Tensor | None = None,
) -> list[SampledReply]:
    """One reply to each prompt, decoded as one left-padded batch.

    Args:
        model: a guided model or another causal LM.
        tokenizer: the model's.
        prompts: ids of each prompt.
        sampling: how to draw.
        seed: of the batch; the process's own random state is left as it was.
        weights_BR: a row of reward weights for each prompt; None for the defaults, or a model without rewards.

    Raises:
        UnsupportedError: the batch does not fit the device's memory.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    stops = stop_ids(model, tokenizer)
    pad_id = _pad_id(model, tokenizer, stops)
    rows = [torch.tensor(ids) for ids in prompts]
    ids_BT = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
    mask_BT = pad_sequence([torch.ones_like(r) for r in rows], batch_first=True, padding_side="left")
    options: dict[str, Any] = {} if weights_BR is None else {"reward_weights": weights_BR}
    device = model.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _no_other_settings(model):
        torch.manual_seed(seed)
        try:
            output_BT: Tensor = model.generate(  # type: ignore[operator] # typed as a Module's attribute
                ids_BT.to(device),
                attention_mask=mask_BT.to(device),
                generation_config=sampling.generation_config(stops, pad_id),
                **options,
            )
        except torch.OutOfMemoryError as error:
            raise UnsupportedError(
                f"a batch of {len(prompts)} prompts of up to {ids_BT.shape[1]} tokens does not fit the memory of "
                f"{device}; lower the batch size or --max-new-tokens, or use another --dtype"
            ) from error
    return [make_reply(tokenizer, ids, stops) for ids in output_BT[:, ids_BT.shape[1] :].tolist()]


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


def _pad_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> int:
    pads = (tokenizer.pad_token_id, model.generation_config.pad_token_id, *stops, 0)
    return next(i for i in pads if i is not None)


@contextmanager
def _no_other_settings(model: PreTrainedModel) -> Iterator[None]:
    """Empty the model's own generation config, from which `generate` fills what a call leaves open."""
    from transformers import GenerationConfig

    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def make_reply(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stops: Sequence[int]) -> SampledReply:
    """A reply of drawn ids; what comes after the first of `stops` is cut off."""
    from genarm.text.detokenizer import decode

    ends = [i for i, token in enumerate(ids) if token in stops]
    kept = list(ids[: ends[0] + 1] if ends else ids)
    text = decode(tokenizer, kept[:-1] if ends else kept, special=False)
    return SampledReply(text=text, token_ids=tuple(kept), finish_reason="stop" if ends else "length")
