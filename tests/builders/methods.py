"""Small models and oracles for tests of decoding methods."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import PreTrainedModel

from builders.tiny import tiny_model, tiny_tokenizer
from genarm.engine.noise import Purpose, key, log_exponentials
from genarm.lab.methods.interface import Meter
from genarm.lab.replies import SampledReply

EOS = 1


PROMPTS = [[7, 8, 9], [10, 11, 12, 13, 14, 15], [16], [17, 18]]


# Few enough tokens to count every reply: w0, w1, and the special ones.
SMALL = tiny_tokenizer(words=["w0", "w1"])


Logits = Callable[[list[int]], torch.Tensor]


def small_model(seed: int = 0, **changes: Any) -> PreTrainedModel:
    return tiny_model(seed=seed, vocab_size=len(SMALL), layers=1, hidden=16, **changes)


def pick_alone(scores: torch.Tensor, temperature: float, seed: int, position: int) -> int:
    """One draw with the random numbers that the methods name by seed and position."""
    if temperature == 0:
        return int(scores.argmax())
    noise = log_exponentials([key(seed, position, Purpose.TOKEN)], len(scores), "cpu")[0]
    return int(((scores / temperature).log_softmax(-1) - noise).argmax())


def log_prob_alone(logits: Logits, prompt: list[int], reply: Sequence[int], temperature: float) -> float:
    """The chain rule."""
    steps = [(logits([*prompt, *reply[:t]]) / temperature).log_softmax(-1)[token] for t, token in enumerate(reply)]
    return float(torch.stack(steps).sum())


def all_replies(vocabulary: Sequence[int], length: int) -> list[tuple[int, ...]]:
    """Every reply of at most `length` tokens: those that end with EOS, and the full ones."""
    rest = [token for token in vocabulary if token != EOS]
    ended = [(*s, EOS) for n in range(length) for s in itertools.product(rest, repeat=n)]
    return ended + list(itertools.product(rest, repeat=length))


def check_frequencies(replies: Sequence[SampledReply], log_probs: dict[tuple[int, ...], float]) -> None:
    """χ² of what was drawn against the exact probabilities of all replies; the rare ones are pooled."""
    probabilities = {reply: math.exp(value) for reply, value in log_probs.items()}
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-4)
    counts = Counter(reply.token_ids for reply in replies)
    assert set(counts) <= {reply for reply, p in probabilities.items() if p > 0}
    common = [reply for reply, p in probabilities.items() if p * len(replies) >= 8]
    assert len(common) >= 6
    observed = [counts[reply] for reply in common]
    expected = [probabilities[reply] * len(replies) for reply in common]
    observed.append(len(replies) - sum(observed))
    expected.append(len(replies) - sum(expected))
    assert chisquare(observed, expected, sum_check=False).pvalue > 1e-3


def tokens_of(method: Any, prompts: list[list[int]] = PROMPTS, seed: int = 3) -> list[list[int]]:
    return [list(reply.token_ids) for reply in method.answer(prompts, seed=seed, meter=Meter())]


def counts_of(method: Any, prompts: list[list[int]] = PROMPTS) -> tuple[dict[str, tuple[int, int]], list[SampledReply]]:
    meter = Meter()
    replies = method.answer(prompts, seed=3, meter=meter)
    return {name: (count.forwards, count.positions) for name, count in meter.counts.items()}, replies
