"""Sampling, MOD, proxy tuning and Best-of-N against references of a few lines: uncached, one row, no padding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from builders.methods import (
    EOS,
    PROMPTS,
    SMALL,
    Logits,
    all_replies,
    check_frequencies,
    counts_of,
    log_prob_alone,
    pick_alone,
    small_model,
    tokens_of,
)
from builders.rewards import alone, score_alone, tiny_reward
from builders.tiny import VOCAB_SIZE, tiny_model, tiny_tokenizer
from genarm.errors import ConfigError, UnsupportedError, VocabularyError, WeightsError
from genarm.lab.methods.best_of_n import BestOfN, kl_bound
from genarm.lab.methods.interface import Meter
from genarm.lab.methods.mod import mod
from genarm.lab.methods.proxy_tuning import proxy_tuning
from genarm.lab.methods.sample import Blend, Sample
from genarm.lab.replies import SampledReply, make_reply
from genarm.model.modeling import GuidedForCausalLM
from genarm.sampling import Sampling, derive_seed


def reply_alone(logits: Logits, prompt: list[int], sampling: Sampling, seed: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < sampling.max_new_tokens and EOS not in tokens:
        tokens.append(pick_alone(logits(prompt + tokens), sampling.temperature, seed, len(tokens)))
    return tokens


# --- the methods, each with the logits it should draw from ------------------------------------------------------


def guided(weight: float) -> tuple[Callable[[Sampling], Blend], Logits]:
    base, good, bad = (tiny_model(seed=seed) for seed in range(3))
    model = GuidedForCausalLM.from_members(base, {"good": good, "bad": bad})

    def logits(ids: list[int]) -> torch.Tensor:
        return (
            alone(base, ids).log_softmax(-1)
            + weight * alone(good, ids).log_softmax(-1)
            - 0.5 * alone(bad, ids).log_softmax(-1)
        )

    weights = {"good": weight, "bad": -0.5}
    return lambda sampling: Sample(model, tiny_tokenizer(), sampling, weights=weights), logits


def blended(what: str) -> tuple[Callable[[Sampling], Blend], Logits]:
    tokenizer = tiny_tokenizer()
    a, b, c = tiny_model(seed=0), tiny_model("gpt2", seed=1), tiny_model("gpt_neox", seed=2)
    if what == "sample":
        return lambda sampling: Sample(a, tokenizer, sampling), lambda ids: alone(a, ids)
    if what == "mod":
        weights = {"a": 0.5, "b": 0.25, "c": 0.25}
        return (
            lambda sampling: mod({"a": a, "b": b, "c": c}, weights, tokenizer, sampling),
            lambda ids: 0.5 * alone(a, ids) + 0.25 * alone(b, ids) + 0.25 * alone(c, ids),
        )
    return (
        lambda sampling: proxy_tuning(a, b, c, tokenizer, sampling, weight=0.7),
        lambda ids: alone(a, ids) + 0.7 * (alone(b, ids) - alone(c, ids)),
    )


CASES = {
    "guided": lambda: guided(0.8),
    "sample": lambda: blended("sample"),
    "mod": lambda: blended("mod"),
    "proxy": lambda: blended("proxy"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_batched_and_cached_is_row_by_row(name: str, temperature: float) -> None:
    make, logits = CASES[name]()
    sampling = Sampling(max_new_tokens=10, temperature=temperature)
    method = make(sampling)
    method.stops = [EOS, *range(20, 30)]  # so that rows end at different times
    replies = method.answer(PROMPTS, seed=3, meter=Meter())
    for row, (prompt, reply) in enumerate(zip(PROMPTS, replies, strict=True)):
        expected = reply_alone(logits, prompt, sampling, derive_seed(3, row))
        ends = [i for i, token in enumerate(expected) if token in method.stops]
        assert list(reply.token_ids) == (expected[: ends[0] + 1] if ends else expected)
        assert reply.finish_reason == ("stop" if ends else "length")
    assert len({len(reply.token_ids) for reply in replies}) > 1
    log_probs = method.log_probs(PROMPTS, replies)
    if temperature == 0:
        assert log_probs is None
        return
    expected_log_probs = [
        log_prob_alone(logits, x, y.token_ids, temperature) for x, y in zip(PROMPTS, replies, strict=True)
    ]
    assert log_probs == pytest.approx(expected_log_probs, abs=2e-3)


def test_a_row_does_not_depend_on_the_others() -> None:
    method = Sample(tiny_model(), tiny_tokenizer(), Sampling(max_new_tokens=8))
    together = tokens_of(method)
    assert tokens_of(method, [PROMPTS[0], *([30 + i] * (3 * i + 1) for i in range(5))])[0] == together[0]
    assert tokens_of(method, PROMPTS[:1])[0] == together[0]
    assert tokens_of(method, seed=4) != together
    twice = tokens_of(method, [[7, 8], [7, 8]])
    assert twice[0] != twice[1]


def test_replies_are_read_from_their_tokens() -> None:
    tokenizer = tiny_tokenizer()
    assert make_reply(tokenizer, [6, 7, EOS], [EOS]) == SampledReply(
        text="w0 w1", token_ids=(6, 7, EOS), finish_reason="stop"
    )
    assert make_reply(tokenizer, [6, 7], [EOS]) == SampledReply(text="w0 w1", token_ids=(6, 7), finish_reason="length")


def test_log_probs_in_several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    method = Sample(tiny_model(), tiny_tokenizer(), Sampling(max_new_tokens=6))
    replies = method.answer(PROMPTS, seed=0, meter=Meter())
    whole = method.log_probs(PROMPTS, replies)
    monkeypatch.setattr("genarm.lab.methods.sample.LOGITS", 16 * VOCAB_SIZE)
    assert method.log_probs(PROMPTS, replies) == pytest.approx(whole, abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("what", ["sample", "proxy"])
def test_frequencies_are_the_exact_ones(what: str, temperature: float) -> None:
    a, b, c = (small_model(seed) for seed in range(3))
    sampling = Sampling(max_new_tokens=2, temperature=temperature)
    method = Sample(a, SMALL, sampling) if what == "sample" else proxy_tuning(a, b, c, SMALL, sampling, weight=0.5)

    def logits(ids: list[int]) -> torch.Tensor:
        return alone(a, ids) + (0 if what == "sample" else 0.5 * (alone(b, ids) - alone(c, ids)))

    exact = {y: log_prob_alone(logits, [6, 7], y, temperature) for y in all_replies(range(len(SMALL)), 2)}
    check_frequencies(method.draw([[6, 7]], copies=4000, seed=0, meter=Meter()), exact)


def test_identities() -> None:
    a, b, c = (tiny_model(seed=seed) for seed in range(3))
    tokenizer, sampling = tiny_tokenizer(), Sampling(max_new_tokens=8)
    policies = {"a": a, "b": b}
    plain = {name: tokens_of(Sample(model, tokenizer, sampling)) for name, model in policies.items()}
    assert plain["a"] != plain["b"]
    for name in policies:
        corner = {other: float(other == name) for other in policies}
        assert tokens_of(mod(policies, corner, tokenizer, sampling)) == plain[name]
    assert tokens_of(mod({"a": a, "b": a}, {"a": 0.3, "b": 0.7}, tokenizer, sampling)) == plain["a"]
    assert tokens_of(proxy_tuning(a, b, c, tokenizer, sampling, weight=0)) == plain["a"]
    assert tokens_of(proxy_tuning(a, b, b, tokenizer, sampling)) == plain["a"]
    assert tokens_of(proxy_tuning(a, b, a, tokenizer, sampling)) == plain["b"]
    model = GuidedForCausalLM.from_members(a, {"arm": b})
    assert tokens_of(Sample(model, tokenizer, sampling, weights={"arm": 0})) == plain["a"]


def test_forwards_and_positions() -> None:
    """One forward per token and member, the prompt's included: the last token is never read."""
    a, b, c = (tiny_model(seed=seed) for seed in range(3))
    tokenizer, sampling = tiny_tokenizer(), Sampling(max_new_tokens=5)
    model = GuidedForCausalLM.from_members(a, {"one": b, "two": c}, weights={"two": 0})
    cases: list[tuple[Any, tuple[str, ...]]] = [
        (Sample(a, tokenizer, sampling), ("base",)),
        (Sample(a, tokenizer, sampling, members=("policy",)), ("policy",)),
        (Sample(model, tokenizer, sampling), ("base", "one")),
        (Sample(model, tokenizer, sampling, weights={"one": 0, "two": -1}), ("base", "two")),
        (mod({"x": a, "y": b, "z": c}, {"x": 0.5, "y": 0, "z": 0.5}, tokenizer, sampling), ("x", "z")),
        (proxy_tuning(a, b, c, tokenizer, sampling), ("base", "tuned", "untuned")),
        (proxy_tuning(a, b, c, tokenizer, sampling, weight=0), ("base",)),
    ]
    for method, members in cases:
        method.stops = list(range(1, 30))
        counts, replies = counts_of(method)
        tokens = [len(reply.token_ids) for reply in replies]
        assert min(tokens) < 5
        positions = sum(len(prompt) - 1 for prompt in PROMPTS) + sum(tokens)
        assert counts == dict.fromkeys(members, (sum(tokens), positions))
        method.log_probs(PROMPTS, replies)
        assert counts_of(method)[0] == counts


def test_models_of_unequal_rows_share_the_tokens() -> None:
    """Rows past the tokenizer's stand for no token: they are cut off where one model lacks them."""
    a, b = tiny_model(seed=0, vocab_size=VOCAB_SIZE + 10), tiny_model(seed=1)
    method = mod({"a": a, "b": b}, {"a": 0.5, "b": 0.5}, tiny_tokenizer(), Sampling(max_new_tokens=6))
    replies = method.answer(PROMPTS, seed=0, meter=Meter())
    assert max(max(reply.token_ids) for reply in replies) < VOCAB_SIZE

    def logits(ids: list[int]) -> torch.Tensor:
        return 0.5 * alone(a, ids)[:VOCAB_SIZE] + 0.5 * alone(b, ids)

    expected = [log_prob_alone(logits, x, y.token_ids, 1.0) for x, y in zip(PROMPTS, replies, strict=True)]
    assert method.log_probs(PROMPTS, replies) == pytest.approx(expected, abs=1e-3)
    with pytest.raises(VocabularyError, match="tokenizer has 46 tokens, and the models know 46, 8"):
        proxy_tuning(tiny_model(), small_model(), tiny_model(), tiny_tokenizer(), Sampling())


def test_refusals() -> None:
    a, tokenizer = tiny_model(), tiny_tokenizer()
    model = GuidedForCausalLM.from_members(a, {"arm": tiny_model(seed=1)})
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (UnsupportedError, "a temperature alone", lambda: Sample(a, tokenizer, Sampling(top_k=5))),
        (UnsupportedError, "a temperature alone", lambda: Sample(a, tokenizer, Sampling(logit_bias={3: 1.0}))),
        (UnsupportedError, "a temperature alone", lambda: Sample(a, tokenizer, Sampling(repetition_penalty=1.1))),
        (UnsupportedError, "min_new_tokens", lambda: Sample(a, tokenizer, Sampling(min_new_tokens=2))),
        (WeightsError, "LlamaForCausalLM has no rewards", lambda: Sample(a, tokenizer, Sampling(), weights={"x": 1})),
        (WeightsError, "no reward is named 'x'", lambda: Sample(model, tokenizer, Sampling(), weights={"x": 1})),
        (WeightsError, "the policies are a", lambda: mod({"a": a}, {"b": 1.0}, tokenizer, Sampling())),
        (WeightsError, "every weight of MOD is 0", lambda: mod({"a": a}, {"a": 0.0}, tokenizer, Sampling())),
        (WeightsError, "must be a finite number", lambda: mod({"a": a}, {"a": math.nan}, tokenizer, Sampling())),
        (WeightsError, "finite", lambda: proxy_tuning(a, a, a, tokenizer, Sampling(), weight=math.inf)),
    ]
    for kind, message, make in cases:
        with pytest.raises(kind, match=message):
            make()


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("genarm.lab.methods.sample.next_logits", fail)
    with pytest.raises(UnsupportedError, match=r"4 prompts answered together do not fit .* lower the batch size"):
        tokens_of(Sample(tiny_model(), tiny_tokenizer(), Sampling()))


# --- Best-of-N ------------------------------------------------------------------------------------------------


def best_of(n: int, **weights: float) -> tuple[BestOfN, PreTrainedModel]:
    base = tiny_model()
    rewards = {"one": tiny_reward(seed=1), "two": tiny_reward("gpt2", seed=2)}
    sample = Sample(base, tiny_tokenizer(), Sampling(max_new_tokens=6))
    return BestOfN(sample, rewards, weights, n=n), base


def test_best_of_n_is_the_argmax() -> None:
    weights = {"one": 1.5, "two": -0.5}
    method, base = best_of(5, **weights)
    first = []
    rewards = dict(zip(weights, method.rewards.models, strict=True))
    for number, (prompt, reply) in enumerate(zip(PROMPTS, tokens_of(method), strict=True)):
        seeds = [derive_seed(3, 5 * number + i) for i in range(5)]
        samples = [reply_alone(lambda ids: alone(base, ids), prompt, method.sample.sampling, seed) for seed in seeds]

        def score(sample: list[int], prompt: list[int] = prompt) -> float:
            return sum(w * score_alone(rewards[name], prompt + sample) for name, w in weights.items())

        assert reply == max(samples, key=score)
        first.append(reply == samples[0])
    assert not all(first)


def test_best_of_n_counts() -> None:
    method, _ = best_of(4, two=0.0)
    meter = Meter()
    samples = method.sample.draw(PROMPTS, copies=4, seed=3, meter=meter)
    tokens = sum(len(reply.token_ids) for reply in samples)
    counts, replies = counts_of(method)
    # Each prompt is read once, and the last token never.
    assert counts["base"] == (4 + tokens - 16, sum(map(len, PROMPTS)) + tokens - 16)
    assert counts["one"] == (16, 4 * sum(map(len, PROMPTS)) + tokens)
    assert set(counts) == {"base", "one"}
    assert method.log_probs(PROMPTS, replies) is None


def test_best_of_one_is_the_sample() -> None:
    method, _ = best_of(1)
    assert tokens_of(method) == tokens_of(method.sample)


def test_kl_bound_holds() -> None:
    """KL of the best of N from one draw, where the draw is uniform over 1000 different scores."""
    for n in (1, 4, 16):
        best = [((i + 1) / 1000) ** n - (i / 1000) ** n for i in range(1000)]
        divergence = sum(p * math.log(p * 1000) for p in best if p > 0)
        assert divergence <= kl_bound(n) + 1e-12
        assert divergence == pytest.approx(kl_bound(n), abs=0.02)
    assert best_of(4)[0].kl_bound == kl_bound(4)


def test_best_of_n_refusals() -> None:
    method, base = best_of(2)
    greedy = Sample(base, tiny_tokenizer(), Sampling(temperature=0))
    other = tiny_reward(tokenizer=tiny_tokenizer(words=[f"v{i}" for i in range(40)]))
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ConfigError, "n of Best-of-N is 0", lambda: BestOfN(method.sample, {}, {}, n=0)),
        (UnsupportedError, "different draws; give a temperature", lambda: BestOfN(greedy, {}, {}, n=2)),
        (WeightsError, "no reward is named 'x'", lambda: BestOfN(method.sample, {}, {"x": 1.0}, n=2)),
        (VocabularyError, "other tokens than the policy", lambda: BestOfN(method.sample, {"x": other}, {}, n=2)),
    ]
    for kind, message, make in cases:
        with pytest.raises(kind, match=message):
            make()
