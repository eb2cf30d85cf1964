"""Replies of a model to one batch of prompts, through transformers' `generate`.

This decodes one large batch of equals, as sweeps over tiny models do; `genarm.engine` does everything else.

Shapes: B rows, T positions, V ids, R rewards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from genarm.errors import UnsupportedError
from genarm.sampling import Sampling, stop_ids
from genarm.text.detokenizer import decode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FinishReason = Literal["stop", "length"]


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
        UnsupportedError: the batch does not fit the device's memory, or transformers lacks one of the settings.
    """
    stops = stop_ids(model, tokenizer)
    pad_id = _pad_id(model, tokenizer, stops)
    rows = [torch.tensor(ids) for ids in prompts]
    ids_BT = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
    mask_BT = pad_sequence([torch.ones_like(r) for r in rows], batch_first=True, padding_side="left")
    options: dict[str, Any] = {} if weights_BR is None else {"reward_weights": weights_BR}
    device = model.device
    if sampling.repetition_penalty != 1:
        padding_B = (mask_BT == 0).sum(-1).to(device)
        options["logits_processor"] = LogitsProcessorList([_RepetitionPenalty(sampling.repetition_penalty, padding_B)])
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _no_other_settings(model):
        torch.manual_seed(seed)
        try:
            output_BT: Tensor = model.generate(  # type: ignore[operator] # typed as a Module's attribute
                ids_BT.to(device),
                attention_mask=mask_BT.to(device),
                generation_config=generation_config(sampling, stops, pad_id),
                **options,
            )
        except torch.OutOfMemoryError as error:
            raise UnsupportedError(
                f"a batch of {len(prompts)} prompts of up to {ids_BT.shape[1]} tokens does not fit the memory of "
                f"{device}; lower the batch size or --max-new-tokens, or use another --dtype"
            ) from error
    return [make_reply(tokenizer, ids, stops) for ids in output_BT[:, ids_BT.shape[1] :].tolist()]


class _RepetitionPenalty(LogitsProcessor):
    """The penalty on ids that a row has, its padding aside; transformers before 5.23 counts the padding as said."""

    def __init__(self, penalty: float, padding_B: Tensor) -> None:
        self._penalty = penalty
        self._padding_B1 = padding_B[:, None]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        places_T = torch.arange(input_ids.shape[1], device=input_ids.device)
        known_BT = (places_T >= self._padding_B1) & (input_ids < scores.shape[-1])
        ids_BT = input_ids.clamp(max=scores.shape[-1] - 1)
        zeros_BV = torch.zeros_like(scores, dtype=torch.int8)
        seen_BV = zeros_BV.scatter_reduce(1, ids_BT, known_BT.to(torch.int8), "amax") > 0
        return torch.where(seen_BV, torch.where(scores < 0, scores * self._penalty, scores / self._penalty), scores)


def generation_config(sampling: Sampling, stops: Sequence[int], pad_id: int) -> GenerationConfig:
    """`sampling` in transformers' words, but for the repetition penalty.

    Raises:
        UnsupportedError: presence and frequency penalties, which transformers does not have.
    """
    if sampling.presence_penalty or sampling.frequency_penalty:
        raise UnsupportedError(
            "presence_penalty and frequency_penalty are unknown to transformers' generate; leave them out, use "
            "repetition_penalty, or decode with genarm's engine"
        )
    drawn: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p or None,
    }
    return GenerationConfig(
        do_sample=sampling.temperature > 0,
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=sampling.min_new_tokens or None,
        sequence_bias={(token,): float(bias) for token, bias in sampling.logit_bias.items()} or None,
        eos_token_id=list(stops) or None,
        pad_token_id=pad_id,
        **(drawn if sampling.temperature > 0 else {}),
    )


def _pad_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> int:
    pads = (tokenizer.pad_token_id, model.generation_config.pad_token_id, *stops, 0)
    return next(i for i in pads if i is not None)


@contextmanager
def _no_other_settings(model: PreTrainedModel) -> Iterator[None]:
    """Empty the model's own generation config, from which `generate` fills what a call leaves open."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def make_reply(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stops: Sequence[int]) -> SampledReply:
    """A reply of drawn ids; what comes after the first of `stops` is cut off."""
    ends = [i for i, token in enumerate(ids) if token in stops]
    kept = list(ids[: ends[0] + 1] if ends else ids)
    text = decode(tokenizer, kept[:-1] if ends else kept, special=False)
    return SampledReply(text=text, token_ids=tuple(kept), finish_reason="stop" if ends else "length")
