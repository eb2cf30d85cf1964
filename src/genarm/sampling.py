"""Replies of a model to one batch of prompts.

Only the token ids are taken from a model's generation_config.json: how a reply is sampled is what `Sampling`
says and nothing else, so that the same options mean the same for every model.

Shapes: B rows, T positions, R rewards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, TextStreamer

from genarm.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a reply is drawn.

    Attributes:
        max_new_tokens: the most tokens of a reply.
        temperature: divides the combined log-probabilities; 0 is greedy.
        top_p: the smallest set of tokens with this much probability is kept; 1 keeps all.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens is {self.max_new_tokens}; it must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"--temperature is {self.temperature:g}; it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p is {self.top_p:g}; it must be above 0 and at most 1")

    def generation_config(self, stop_ids: Sequence[int], pad_id: int) -> GenerationConfig:
        """The same in transformers' words."""
        shared: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "eos_token_id": list(stop_ids) or None,
            "pad_token_id": pad_id,
        }
        if self.temperature == 0:
            return GenerationConfig(do_sample=False, **shared)
        return GenerationConfig(do_sample=True, temperature=self.temperature, top_p=self.top_p, top_k=0, **shared)


@dataclass(frozen=True, kw_only=True)
class Reply:
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
    on_text: Callable[[str], None] | None = None,
) -> list[Reply]:
    """One reply to each prompt, decoded as one left-padded batch.

    Args:
        model: a guided model or another causal LM.
        tokenizer: the model's.
        prompts: ids of each prompt.
        sampling: how to draw.
        seed: of the batch; the process's own random state is left as it was.
        weights_BR: a row of reward weights for each prompt; None for the defaults, or a model without rewards.
        on_text: called with each piece of the reply as it comes; for a single prompt.

    Raises:
        UnsupportedError: the batch does not fit the device's memory.
    """
    stop_ids, pad_id = _token_ids(model, tokenizer)
    rows = [torch.tensor(ids) for ids in prompts]
    ids_BT = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
    mask_BT = pad_sequence([torch.ones_like(r) for r in rows], batch_first=True, padding_side="left")
    options: dict[str, Any] = {} if weights_BR is None else {"reward_weights": weights_BR}
    if on_text is not None:
        options["streamer"] = _Pieces(tokenizer, on_text)
    device = model.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _no_other_settings(model):
        torch.manual_seed(seed)
        try:
            output_BT: Tensor = model.generate(  # type: ignore[operator] # typed as a Module's attribute
                ids_BT.to(device),
                attention_mask=mask_BT.to(device),
                generation_config=sampling.generation_config(stop_ids, pad_id),
                **options,
            )
        except torch.OutOfMemoryError as error:
            raise UnsupportedError(
                f"a batch of {len(prompts)} prompts of up to {ids_BT.shape[1]} tokens does not fit the memory of "
                f"{device}; lower the batch size or --max-new-tokens, or use another --dtype"
            ) from error
    return [_reply(tokenizer, ids, stop_ids) for ids in output_BT[:, ids_BT.shape[1] :].tolist()]


def derive_seed(seed: int, index: int) -> int:
    """A 32-bit seed for the `index`-th part of a run with the seed `seed`, unlike those of other parts and runs."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1)[0])


def check_seed(seed: int) -> int:
    """`seed` itself (raises ConfigError if it is negative)."""
    if seed < 0:
        raise ConfigError(f"--seed is {seed}; it must be 0 or more")
    return seed


def _token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """The ids that end a reply, by the model's files or by its tokenizer, and one to pad with."""
    named = model.generation_config.eos_token_id
    stops = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id} - {None}
    pads = (tokenizer.pad_token_id, model.generation_config.pad_token_id, *sorted(stops), 0)
    return sorted(stops), next(i for i in pads if i is not None)


@contextmanager
def _no_other_settings(model: PreTrainedModel) -> Iterator[None]:
    """Empty the model's own generation config, from which `generate` fills what a call leaves open."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _reply(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop_ids: Sequence[int]) -> Reply:
    ends = [i for i, token in enumerate(ids) if token in stop_ids]
    kept = ids[: ends[0] + 1] if ends else ids
    text = tokenizer.decode(kept[:-1] if ends else kept, skip_special_tokens=True)
    return Reply(text=str(text), token_ids=tuple(kept), finish_reason="stop" if ends else "length")


class _Pieces(TextStreamer):
    """Hands over text as soon as it is final, instead of printing it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with each finished piece, often empty."""
        if text:
            self.on_text(text)
