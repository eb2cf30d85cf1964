"""Tiny guided folders, vLLM engines on them, and the transformers guided model as the oracle for both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams

from builders.tiny import save_member, tiny_lora, tiny_model
from genarm import GuidedForCausalLM, compose

TOLERANCE = 1e-4
# vLLM's attention on CPU takes heads of 32 and more.
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"hidden": 64, "head_dim": 32, "num_key_value_heads": 2, "intermediate_size": 64},
    "qwen2": {"hidden": 128, "num_key_value_heads": 2},
    "qwen3": {"hidden": 64, "head_dim": 32, "num_key_value_heads": 2},
    "mistral": {"hidden": 64, "head_dim": 32, "num_key_value_heads": 1, "sliding_window": 8},
}


def members(root: Path, family: str = "llama") -> dict[str, Path]:
    """A base, a smaller model of another family and another ratio of query to KV heads, and adapters on both.

    "head" and "head2" are adapters of the base's output layer alone.
    """
    base = tiny_model(family, seed=1, **SHAPES[family])
    small = tiny_model("llama" if family == "qwen2" else "qwen2", seed=2, hidden=128, layers=1, num_key_value_heads=4)
    places = {"base": save_member(base, root / "base"), "small": save_member(small, root / "small")}
    for seed, (name, model, rank) in enumerate(
        [("lora", base, 4), ("lora2", base, 2), ("small_lora", small, 4), ("small_lora2", small, 3)], start=3
    ):
        host = places["base" if model is base else "small"]
        places[name] = tiny_lora(model, root / name, seed=seed, base_path=str(host), rank=rank)
    for seed, (name, rank) in enumerate([("head", 3), ("head2", 5)], start=7):
        targets = ["lm_head"]
        places[name] = tiny_lora(
            base, root / name, seed=seed, base_path=str(places["base"]), rank=rank, targets=targets
        )
    return places


def folder(root: Path, places: Mapping[str, Path], rewards: Mapping[str, str]) -> Path:
    """The guided folder with these rewards, {name: member}; default weights differ from each other."""
    output = root / ("guided-" + "-".join(rewards))
    if output.exists():
        return output
    weights = {name: round(0.7 - 0.4 * i, 2) for i, name in enumerate(rewards)}
    compose(places["base"], {name: places[member] for name, member in rewards.items()}, output, weights=weights)
    return output


@contextmanager
def engine(model: Path, **options: Any) -> Iterator[LLM]:
    """vLLM in float32 on this model; everything of it is gone afterwards."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    given = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "block_size": 32, **options}
    llm = LLM(str(model), **given)
    try:
        yield llm
    finally:
        if hasattr(llm.llm_engine.engine_core, "shutdown"):
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A greedy request with weights of its own (None: the folder's)."""

    prompt: Sequence[int]
    weights: Mapping[str, float] | None = None
    tokens: int = 12
    max_kl: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sampling(self) -> SamplingParams:
        extra: dict[str, Any] = {} if self.weights is None else {"reward_weights": dict(self.weights)}
        extra |= {} if self.max_kl is None else {"max_kl": self.max_kl}
        return SamplingParams(
            temperature=0, max_tokens=self.tokens, ignore_eos=True, logprobs=3, extra_args=extra or None, **self.options
        )


def ask(llm: LLM, asked: Sequence[Asked]) -> list[Any]:
    """vLLM's outputs, in order."""
    prompts = [{"prompt_token_ids": list(request.prompt)} for request in asked]
    return llm.generate(prompts, [request.sampling for request in asked], use_tqdm=False)


def oracle(model: Path) -> GuidedForCausalLM:
    """The same folder in transformers."""
    return GuidedForCausalLM.from_pretrained(model, dtype=torch.float32)


@torch.no_grad()
def agree(model: GuidedForCausalLM, asked: Asked, output: Any) -> None:
    """Whether a greedy reply and its log-probs are what the transformers guided model says, position by position."""
    reply = output.outputs[0]
    ids = list(reply.token_ids)
    assert len(ids) == asked.tokens
    whole = torch.tensor([[*asked.prompt, *ids]])
    log_probs_TV = model(whole, reward_weights=asked.weights, max_kl=asked.max_kl).logits[0]
    for t, (token, reported) in enumerate(zip(ids, reply.logprobs, strict=True)):
        expected_V = log_probs_TV[len(asked.prompt) - 1 + t]
        assert expected_V[token] >= expected_V.max() - TOLERANCE, (t, token)
        for other, entry in reported.items():
            assert math.isclose(entry.logprob, expected_V[other].item(), abs_tol=TOLERANCE), (t, other)


def inner_model(llm: LLM) -> Any:
    """The composite model of an engine in this process."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    return worker.worker.model_runner.model
