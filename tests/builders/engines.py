"""Guided models, requests and settings for tests of the engine."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import (
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
)

from builders.tiny import tiny_model, tiny_tokenizer
from genarm import GuidedForCausalLM
from genarm.engine import Engine, EngineOptions, Request
from genarm.sampling import Sampling

TOKENIZER = tiny_tokenizer()


LENGTH = 24


PROMPTS = [[7, 8, 9, 10, 11], list(range(6, 36)), [44], [30, 12, 41, 6, 6, 19, 22, 23, 40, 31, 18]]


def lora(model: PreTrainedModel, name: str, seed: int, **options: Any) -> PeftModel:
    """A random adapter `name` on `model` itself."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of a second adapter, which is what we want
        adapted = PeftModel(model, config, adapter_name=name)
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key and f".{name}." in key:  # zero at the start, which would make the adapter the base
            torch.nn.init.normal_(parameter, std=0.2)
    return adapted


def full(family: str, seed: int) -> PreTrainedModel:
    return tiny_model(family, seed=seed, hidden=16, layers=1)


def two_on(model: PreTrainedModel, seed: int = 3, **options: Any) -> dict[str, PeftModel]:
    return {name: lora(model, name, seed + i, **options) for i, name in enumerate(("one", "two"))}


KINDS: dict[str, Callable[[str, PreTrainedModel], Mapping[str, Any]]] = {
    "full": lambda family, base: {"full": full(family, 1)},
    "lora": lambda family, base: {"one": lora(base, "one", 3)},
    "two loras": lambda family, base: two_on(base),
    "loras on a smaller model": lambda family, base: two_on(full(family, 2)),
    "full and lora": lambda family, base: {"full": full("llama", 1), "one": lora(base, "one", 3)},
    "three": lambda family, base: {
        "full": full(family, 1),
        "one": lora(base, "one", 3),
        "two": lora(full(family, 2), "two", 5),
    },
    "dora": lambda family, base: two_on(base, use_dora=True),
}
"""Names of members' arrangements, with what makes the rewards."""


WEIGHTS = [(1.0, 0.5, -0.25), (0.0, 0.0, 0.0), (2.0, -0.5, 1.0), (-0.7, 0.0, 0.3)]
"""Of each prompt."""


def make_model(family: str, kind: str) -> GuidedForCausalLM:
    base = tiny_model(family, seed=0)
    model = GuidedForCausalLM.from_members(base, KINDS[kind](family, base))
    model.generation_config.eos_token_id = None
    return model


def weights_of(model: GuidedForCausalLM, prompt: int) -> dict[str, float]:
    return dict(zip(model.reward_names, WEIGHTS[prompt], strict=False))


def greedy(prompt: Sequence[int], weights: Mapping[str, float] | None = None, **options: Any) -> Request:
    settings = {"ignore_eos": True, "sampling": Sampling(max_new_tokens=LENGTH, temperature=0), **options}
    return Request(prompt=list(prompt), weights=weights or {}, **settings)


def options(**changes: Any) -> EngineOptions:
    return EngineOptions(**{"streams": 4, "context": 64, "speculate": 0, **changes})


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one stream": {"streams": 1},
    "small chunks": {"chunk": 5},
    "speculation": {"speculate": 4, "adapt": False},
    "adaptive": {"speculate": 8, "streams": 3},
}


def idle(engine: Engine) -> bool:
    statistics = engine.statistics()
    rows = [len(trunk.kv_cache.rows) for trunk in engine._built.members.trunks]
    return not statistics.waiting and not statistics.running and list(statistics.free_rows) == rows


def shaped_by_transformers(
    log_probs_V: torch.Tensor,
    sampling: Sampling,
    counts: Counter[int],
    prompt: Sequence[int] = (),
    ends: Sequence[int] = (),
) -> torch.Tensor:
    """One position, by OpenAI's formula for its penalties and transformers' own processors for the rest."""
    scores = log_probs_V.clone()
    for token, bias in sampling.logit_bias.items():
        scores[token] += bias
    # Without ids that are read and never said, which some versions of transformers cannot look up.
    prompt = [i for i in prompt if i < len(scores)]
    ids = torch.tensor([[*prompt, *counts.elements()]], dtype=torch.long)
    if sampling.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores[None])[0]
    if sampling.min_new_tokens and ends:
        banned = MinNewTokensLengthLogitsProcessor(len(prompt), sampling.min_new_tokens, list(ends))
        scores = banned(ids, scores[None])[0]
    for token in range(len(scores)):
        scores[token] -= counts[token] * sampling.frequency_penalty
        scores[token] -= float(counts[token] > 0) * sampling.presence_penalty
    if sampling.temperature == 0:
        return torch.full_like(scores, -torch.inf).index_fill_(0, scores.argmax(), 0.0)
    nothing, scores = torch.zeros(1, 1, dtype=torch.long), scores[None]
    if sampling.temperature != 1:
        scores = TemperatureLogitsWarper(sampling.temperature)(nothing, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(nothing, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(nothing, scores)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(nothing, scores)
    return scores[0].log_softmax(-1)
