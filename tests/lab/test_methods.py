"""Sampling, wishes, MOD, proxy tuning and Best-of-N against references of a few lines: uncached, one row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from scipy.optimize import brentq
from transformers import AutoModelForCausalLM, PreTrainedModel

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
from builders.tiny import VOCAB_SIZE, save_member, tiny_lora, tiny_model, tiny_tokenizer
from genarm.errors import ConfigError, MemberError, UnsupportedError, VocabularyError, WeightsError
from genarm.lab.methods.best_of_n import BestOfN, kl_bound
from genarm.lab.methods.interface import Meter
from genarm.lab.methods.mod import mod
from genarm.lab.methods.models import Models
from genarm.lab.methods.proxy_tuning import proxy_tuning
from genarm.lab.methods.sample import POLICY, Sample
from genarm.lab.replies import SampledReply, make_reply
from genarm.model.compose import compose
from genarm.model.modeling import GuidedForCausalLM
from genarm.sampling import Sampling, derive_seed


def reply_alone(logits: Logits, prompt: list[int], sampling: Sampling, seed: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < sampling.max_new_tokens and EOS not in tokens:
        tokens.append(pick_alone(logits(prompt + tokens), sampling.temperature, seed, len(tokens)))
    return tokens


# --- the methods, each with the logits it should draw from ------------------------------------------------------


def guided(weight: float) -> tuple[Callable[[Sampling], Sample], Logits]:
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


def blended(what: str) -> tuple[Callable[[Sampling], Sample], Logits]:
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


TEXTS = {"be kind": [31, 32, 33, 34], "rhyme": [35]}


def read(ids: Sequence[int], text: str) -> list[int]:
    return [*TEXTS[text], *ids]


def wished(max_kl: float | None = None) -> tuple[Callable[[Sampling], Sample], Logits]:
    a = tiny_model(seed=0)
    model = GuidedForCausalLM.from_members(a, {}, wishes={"kind": "be kind", "rhyme": "rhyme", "off": "be kind"})
    weights = {"kind": 3.0, "rhyme": -1.5, "off": 0.0}

    def logits(ids: list[int]) -> torch.Tensor:
        base, kind, rhyme = (alone(a, [*text, *ids]).log_softmax(-1) for text in ([], *TEXTS.values()))
        guided = base + 3.0 * (kind - base) - 1.5 * (rhyme - base)
        return guided if max_kl is None else within(base.double(), guided.double(), max_kl).float()

    def make(sampling: Sampling) -> Sample:
        return Sample(model, tiny_tokenizer(), sampling, weights=weights, max_kl=max_kl, reader=read)

    return make, logits


def within(base: torch.Tensor, guided: torch.Tensor, budget: float) -> torch.Tensor:
    """The farthest point of the way from the base to the guided model that the budget allows."""

    def at(share: float) -> torch.Tensor:
        return (base + share * (guided - base)).log_softmax(-1)

    def excess(share: float) -> float:
        return kl(at(share), base) - budget

    return at(1.0 if excess(1.0) <= 0 else brentq(excess, 0.0, 1.0, xtol=1e-12))


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.exp() * (p - q)).sum())


def prompted() -> tuple[Callable[[Sampling], Sample], Logits]:
    a = tiny_model("gpt2", seed=0)
    return (
        lambda sampling: Sample(a, tiny_tokenizer(), sampling, system="be kind", reader=read),
        lambda ids: alone(a, read(ids, "be kind")),
    )


CASES = {
    "wished": wished,
    "within a budget": lambda: wished(0.02),
    "prompted": prompted,
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
    twin = tiny_model(seed=0)
    assert tokens_of(mod({"a": a, "b": twin}, {"a": 0.3, "b": 0.7}, tokenizer, sampling)) == plain["a"]
    assert tokens_of(proxy_tuning(a, b, c, tokenizer, sampling, weight=0)) == plain["a"]
    assert tokens_of(proxy_tuning(a, b, a, tokenizer, sampling)) == plain["b"]
    model = GuidedForCausalLM.from_members(a, {"arm": b})
    assert tokens_of(Sample(model, tokenizer, sampling, weights={"arm": 0})) == plain["a"]
    assert tokens_of(Sample(model, tokenizer, sampling, weights={"arm": 3}, max_kl=0)) == plain["a"]
    wish = GuidedForCausalLM.from_members(a, {}, wishes={"kind": "be kind"})
    asked = tokens_of(Sample(a, tokenizer, sampling, system="be kind", reader=read))
    assert tokens_of(Sample(wish, tokenizer, sampling, reader=read)) == asked != plain["a"]
    assert tokens_of(Sample(wish, tokenizer, sampling, weights={"kind": 0}, reader=read)) == plain["a"]
    # λ that add up to 2 are those that add up to 1 at half the temperature.
    twice, once = (mod({"a": a, "b": b}, {"a": w, "b": w}, tokenizer, s) for w, s in ((1.0, sampling), (0.5, HALF)))
    assert tokens_of(twice) == tokens_of(once)


HALF = Sampling(max_new_tokens=8, temperature=0.5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["guided", "wished", "prompted", "mod"])
def test_distances_are_the_chain_rule_and_the_divergences_along_a_reply(name: str, temperature: float) -> None:
    make, logits = CASES[name]()
    method, a = make(Sampling(max_new_tokens=6, temperature=temperature)), tiny_model(seed=4)
    replies = method.answer(PROMPTS, seed=3, meter=Meter())
    base = Sample(a, tiny_tokenizer(), Sampling())
    found = method.distances(base, PROMPTS, replies)
    assert found is not None
    for prompt, reply, distance in zip(PROMPTS, replies, found, strict=True):
        so_far = [[*prompt, *reply.token_ids[:t]] for t in range(len(reply.token_ids))]
        own = [(logits(ids) / temperature).log_softmax(-1) for ids in so_far]
        of_base = [alone(a, ids).log_softmax(-1) for ids in so_far]
        assert distance == pytest.approx(
            (
                sum(float(row[token]) for row, token in zip(own, reply.token_ids, strict=True)),
                sum(float(row[token]) for row, token in zip(of_base, reply.token_ids, strict=True)),
                sum(map(kl, own, of_base)),
            ),
            abs=2e-3,
        )
    assert [d.log_prob for d in found] == pytest.approx(method.log_probs(PROMPTS, replies), abs=1e-5)
    assert make(Sampling(temperature=0)).distances(base, PROMPTS, replies) is None


def test_the_mean_distance_is_the_divergence_of_whole_replies() -> None:
    """Over all replies, enumerated: Σ π log(π / π_base) is the mean of the sums along replies."""
    a, b = (small_model(seed) for seed in range(2))
    model = GuidedForCausalLM.from_members(a, {"tuned": b}, references={"tuned": a})
    method = Sample(model, SMALL, Sampling(max_new_tokens=3), weights={"tuned": 2.0})
    replies = [make_reply(SMALL, y, [EOS]) for y in all_replies(range(len(SMALL)), 3)]
    found = method.distances(Sample(a, SMALL, Sampling()), [[6, 7]] * len(replies), replies)
    assert found is not None
    exact = sum(math.exp(d.log_prob) * (d.log_prob - d.base_log_prob) for d in found)
    assert sum(math.exp(d.log_prob) * d.kl for d in found) == pytest.approx(exact, rel=1e-4)
    assert exact > 0.01


def test_frequencies_of_a_wish_are_the_exact_ones() -> None:
    a = small_model()
    model = GuidedForCausalLM.from_members(a, {}, wishes={"kind": "be kind"})
    method = Sample(
        model,
        SMALL,
        Sampling(max_new_tokens=2),
        weights={"kind": 2.0},
        reader=lambda ids, _: [3, 6, *ids],
    )

    def logits(ids: list[int]) -> torch.Tensor:
        base = alone(a, ids)
        return base + 2.0 * (alone(a, [3, 6, *ids]) - base)

    exact = {y: log_prob_alone(logits, [6, 7], y, 1.0) for y in all_replies(range(len(SMALL)), 2)}
    check_frequencies(method.draw([[6, 7]], copies=4000, seed=0, meter=Meter()), exact)


def test_forwards_and_positions() -> None:
    """One forward per token and member, the prompt's included: the last token is never read."""
    a, b, c = (tiny_model(seed=seed) for seed in range(3))
    tokenizer, sampling = tiny_tokenizer(), Sampling(max_new_tokens=5)
    model = GuidedForCausalLM.from_members(a, {"one": b, "two": c}, weights={"two": 0})
    cases: list[tuple[Any, tuple[str, ...]]] = [
        (Sample(a, tokenizer, sampling), ("base",)),
        (Sample(a, tokenizer, sampling, names=POLICY), ("policy",)),
        (Sample(model, tokenizer, sampling), ("base", "one")),
        (Sample(model, tokenizer, sampling, weights={"one": 0, "two": -1}), ("base", "two")),
        (mod({"x": a, "y": b, "z": c}, {"x": 0.5, "y": 0, "z": 0.5}, tokenizer, sampling), ("x", "z")),
        (proxy_tuning(a, b, c, tokenizer, sampling), ("base", "tuned", "untuned")),
        (proxy_tuning(a, b, c, tokenizer, sampling, weight=0), ("base",)),
        (proxy_tuning(a, b, a, tokenizer, sampling), ("base", "tuned")),  # the base is its own reference
        (Sample(a, tokenizer, sampling, max_kl=1.0), ("base",)),
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


def test_a_wish_counts_the_prompts_that_it_reads() -> None:
    method = wished()[0](Sampling(max_new_tokens=5))
    counts, replies = counts_of(method)
    tokens = sum(len(reply.token_ids) for reply in replies)
    positions = sum(len(prompt) - 1 for prompt in PROMPTS) + tokens
    assert counts == {
        "base": (tokens, positions),
        "kind": (tokens, positions + 4 * len(PROMPTS)),
        "rhyme": (tokens, positions + len(PROMPTS)),
    }
    asked = prompted()[0](Sampling(max_new_tokens=5))
    counts, replies = counts_of(asked)
    tokens = sum(len(reply.token_ids) for reply in replies)
    assert counts == {"base": (tokens, sum(len(prompt) + 3 for prompt in PROMPTS) + tokens)}


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
    with pytest.raises(VocabularyError, match="base and tuned have different vocabularies"):
        proxy_tuning(tiny_model(), small_model(), tiny_model(), tiny_tokenizer(), Sampling())


def test_refusals() -> None:
    a, b, tokenizer = tiny_model(), tiny_model(seed=1), tiny_tokenizer()
    model = GuidedForCausalLM.from_members(a, {"arm": b})
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (UnsupportedError, "a temperature alone", lambda: Sample(a, tokenizer, Sampling(top_k=5))),
        (UnsupportedError, "a temperature alone", lambda: Sample(a, tokenizer, Sampling(logit_bias={3: 1.0}))),
        (UnsupportedError, "a temperature alone", lambda: Sample(a, tokenizer, Sampling(repetition_penalty=1.1))),
        (UnsupportedError, "min_new_tokens", lambda: Sample(a, tokenizer, Sampling(min_new_tokens=2))),
        (WeightsError, "this model has: none", lambda: Sample(a, tokenizer, Sampling(), weights={"x": 1})),
        (WeightsError, "no reward is named 'x'", lambda: Sample(model, tokenizer, Sampling(), weights={"x": 1})),
        (WeightsError, "the policies are a", lambda: mod({"a": a}, {"b": 1.0}, tokenizer, Sampling())),
        (WeightsError, "λ of MOD add up to 0", lambda: mod({"a": a}, {"a": 0.0}, tokenizer, Sampling())),
        (WeightsError, "max_kl is -1", lambda: Sample(model, tokenizer, Sampling(), max_kl=-1)),
        (ConfigError, "is the reward itself", lambda: proxy_tuning(a, b, b, tokenizer, Sampling())),
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
    rewards = {"one": tiny_reward(seed=1), "two": tiny_reward("gpt2", seed=2)}
    for number, (prompt, reply) in enumerate(zip(PROMPTS, tokens_of(method), strict=True)):
        seeds = [derive_seed(3, 5 * number + i) for i in range(5)]
        samples = [reply_alone(lambda ids: alone(base, ids), prompt, method.sample.sampling, seed) for seed in seeds]

        def score(sample: list[int], prompt: list[int] = prompt) -> float:
            return sum(w * score_alone(rewards[name], prompt + sample) for name, w in weights.items())

        assert reply == max(samples, key=score)
        first.append(reply == samples[0])
    assert not all(first)


def test_arms_are_rewards_of_replies(tmp_path: Path) -> None:
    """Of all weights and as an adapter, by themselves and as differences to their start: sums of plain forwards."""
    start, arm = tiny_model(seed=5), tiny_model(seed=6)
    save_member(start, tmp_path / "start")
    for name in ("arm", "zero"):
        save_member(arm, tmp_path / name)
    (tmp_path / "zero" / "train_config.toml").write_text(f'start = "zero"\nmodel = "{tmp_path / "start"}"\n')
    tiny_lora(start, tmp_path / "adapter", seed=2, base_path=str(tmp_path / "start"))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "start"), tmp_path / "adapter")
    replies = [[4, 9, 7], [3], [11, 8, 2, 5]]

    def said(model: PreTrainedModel, prompt: list[int], reply: list[int]) -> float:
        with torch.no_grad():
            log_probs = model(torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            return float(log_probs.gather(-1, torch.tensor(reply)[:, None]).sum())

    models = Models(folder=tmp_path, dtype="float32")
    for name, own, against in (("arm", arm, None), ("zero", arm, start), ("adapter", adapted, None)):
        reward = models.reward_of_replies(f"@{name}")
        expected = [
            said(own, prompt, reply) - (said(against, prompt, reply) if against is not None else 0.0)
            for prompt, reply in zip(PROMPTS[:3], replies, strict=True)
        ]
        assert reward.score(PROMPTS[:3], replies) == pytest.approx(expected, abs=1e-4)
        assert reward.passes == (1 if against is None else 2)
    with pytest.raises(VocabularyError, match="other tokens than the policy"):
        reward.check(tiny_tokenizer(words=[f"v{i}" for i in range(40)]))
    compose(tmp_path / "start", {"one": tmp_path / "arm"}, tmp_path / "guided")
    with pytest.raises(MemberError, match="is a guided folder, which is no reward of replies"):
        models.reward_of_replies("@guided")


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
