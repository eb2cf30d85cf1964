"""ARGS and Transfer-Q against references of a few lines: uncached, one row, no padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from builders.methods import (
    EOS,
    PROMPTS,
    SMALL,
    all_replies,
    check_frequencies,
    counts_of,
    pick_alone,
    small_model,
    tokens_of,
)
from builders.rewards import alone, score_alone, tiny_reward
from builders.tiny import VOCAB_SIZE, tiny_model, tiny_tokenizer
from genarm.errors import ConfigError, UnsupportedError, VocabularyError, WeightsError
from genarm.lab.methods.args import Args
from genarm.lab.methods.interface import Meter
from genarm.lab.methods.rewards import Guidance
from genarm.lab.methods.sample import Sample
from genarm.lab.methods.transfer_q import TransferQ
from genarm.lab.replies import SampledReply
from genarm.lab.trajectory import TrajectoryReward
from genarm.sampling import Sampling, derive_seed

WEIGHTS = {"one": 1.5, "two": -0.8}
STOPS = [EOS, *range(20, 32)]


def two_rewards(**changes: Any) -> dict[str, TrajectoryReward]:
    return {"one": tiny_reward(seed=1, **changes), "two": tiny_reward("gpt2", seed=2, **changes)}


class Reference:
    """One row, step by step; `work` counts the forwards that a cached search needs."""

    def __init__(self, method: Args | TransferQ, rewards: Mapping[str, TrajectoryReward], weights: Mapping[str, float]):
        self.method = method
        self.rewards = rewards
        self.weights = weights
        self.work = {"base": 0, "policy": 1, "reward": 1}

    def rollout(self, ids: list[int], room: int) -> list[int]:
        """Greedy, of an aligned policy; nothing for ARGS or after the end."""
        tokens: list[int] = []
        if not isinstance(self.method, TransferQ) or ids[-1] in self.method.stops:
            return tokens
        while len(tokens) < min(self.method.rollout, room) and not (tokens and tokens[-1] in self.method.stops):
            tokens.append(int(alone(self.method.policy, ids + tokens)[:VOCAB_SIZE].argmax()))
            self.work["policy"] += 1
        return tokens

    def scores(self, prompt: list[int], done: list[int]) -> dict[int, float]:
        """{token: z(v) + Σ w r} of the candidates, the likeliest first."""
        logits = alone(self.method.base, prompt + done)
        self.work["base"] += 1
        result = {}
        for token in logits.topk(self.method.top_k).indices.tolist():
            ids = [*prompt, *done, token]
            ids += self.rollout(ids, self.method.sampling.max_new_tokens - len(done) - 1)
            reward = sum(weight * score_alone(self.rewards[name], ids) for name, weight in self.weights.items())
            result[token] = float(logits[token]) + reward
            self.work["reward"] += 1
        return result

    def reply(self, prompt: list[int], seed: int) -> list[int]:
        done: list[int] = []
        while len(done) < self.method.sampling.max_new_tokens and not (done and done[-1] in self.method.stops):
            scores = self.scores(prompt, done)
            choice = pick_alone(torch.tensor([*scores.values()]), self.method.sampling.temperature, seed, len(done))
            done.append([*scores][choice])
        return done

    def log_prob(self, prompt: list[int], reply: Sequence[int]) -> float:
        total = 0.0
        for t, token in enumerate(reply):
            scores = self.scores(prompt, list(reply[:t]))
            if token not in scores:
                return -torch.inf
            log_probs = (torch.tensor([*scores.values()]) / self.method.sampling.temperature).log_softmax(-1)
            total += float(log_probs[[*scores].index(token)])
        return total


def search(
    what: str, sampling: Sampling, rewards: Mapping[str, TrajectoryReward], weights: Mapping[str, float], **models: Any
) -> Args | TransferQ:
    base: PreTrainedModel = models.get("base") or tiny_model()
    tokenizer = models.get("tokenizer") or tiny_tokenizer()
    if what == "args":
        return Args(Guidance(base, tokenizer, sampling, rewards, weights), top_k=4)
    policy = models.get("policy") or tiny_model("gpt_neox", seed=5)
    return TransferQ(Guidance(base, tokenizer, sampling, rewards, weights), policy, top_k=4, rollout=3)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("what", ["args", "transfer-q"])
def test_batched_and_cached_is_row_by_row(what: str, temperature: float) -> None:
    rewards = two_rewards()
    method = search(what, Sampling(max_new_tokens=7, temperature=temperature), rewards, WEIGHTS)
    method.stops = STOPS
    reference = Reference(method, rewards, WEIGHTS)
    counts, replies = counts_of(method)
    for row, (prompt, reply) in enumerate(zip(PROMPTS, replies, strict=True)):
        assert list(reply.token_ids) == reference.reply(prompt, derive_seed(3, row))
        assert reply.finish_reason == ("stop" if reply.token_ids[-1] in STOPS else "length")
    assert len({len(reply.token_ids) for reply in replies}) > 1
    plain = Sample(method.base, tiny_tokenizer(), method.sampling)
    plain.stops = STOPS
    assert tokens_of(plain) != [list(reply.token_ids) for reply in replies]

    # Forwards and, for the base, positions: the prompt, then every token but the last.
    work, tokens = reference.work, sum(len(reply.token_ids) for reply in replies)
    assert counts["base"] == (work["base"], sum(map(len, PROMPTS)) + tokens - len(PROMPTS))
    assert work["base"] == tokens
    scored = 4 * tokens + len(PROMPTS)
    assert {counts[name][0] for name in WEIGHTS} == {scored} == {work["reward"] - 1 + len(PROMPTS)}
    if what == "args":
        assert counts["one"] == counts["two"] == (scored, 4 * tokens + sum(map(len, PROMPTS)))
    else:
        assert counts["policy"][0] == work["policy"] - 1 + len(PROMPTS)
    assert set(counts) == {"base", *WEIGHTS} | ({"policy"} if what == "transfer-q" else set())


@pytest.mark.parametrize("what", ["args", "transfer-q"])
def test_log_probs_follow_the_chain_rule(what: str) -> None:
    rewards = two_rewards()
    method = search(what, Sampling(max_new_tokens=5, temperature=0.7), rewards, WEIGHTS)
    method.stops = STOPS
    replies = method.answer(PROMPTS, seed=3, meter=Meter())
    reference = Reference(method, rewards, WEIGHTS)
    expected = [reference.log_prob(x, y.token_ids) for x, y in zip(PROMPTS, replies, strict=True)]
    drawn = method.log_probs(PROMPTS, replies)
    assert drawn == pytest.approx(expected, abs=2e-3)

    # Of a method that has drawn nothing, some in another order; and a reply with a token that is no candidate.
    again = search(what, method.sampling, rewards, WEIGHTS)
    again.stops = STOPS
    assert again.log_probs(PROMPTS[::-1], replies[::-1]) == pytest.approx(expected[::-1], abs=2e-3)
    worst = int(alone(method.base, PROMPTS[0]).argmin())
    never = SampledReply(text="", token_ids=(worst, 7), finish_reason="length")
    mixed = method.log_probs([PROMPTS[0], *PROMPTS[1:]], [never, *replies[1:]])
    assert mixed == pytest.approx([-torch.inf, *expected[1:]], abs=2e-3)
    greedy = search(what, Sampling(max_new_tokens=2, temperature=0), rewards, WEIGHTS)
    assert greedy.log_probs(PROMPTS, replies) is None


@pytest.mark.parametrize("what", ["args", "transfer-q"])
def test_frequencies_are_the_exact_ones(what: str) -> None:
    rewards = {"one": tiny_reward(seed=1, tokenizer=SMALL), "two": tiny_reward(seed=2, tokenizer=SMALL)}
    models = {"base": small_model(0), "policy": small_model(4), "tokenizer": SMALL}
    method = search(what, Sampling(max_new_tokens=2, temperature=0.9), rewards, WEIGHTS, **models)
    reference = Reference(method, rewards, WEIGHTS)
    exact = {y: reference.log_prob([6, 7], y) for y in all_replies(range(len(SMALL)), 2)}
    replies = [r for seed in range(4) for r in method.answer([[6, 7]] * 800, seed=seed, meter=Meter())]
    check_frequencies(replies, exact)


@pytest.mark.parametrize("what", ["args", "transfer-q"])
def test_a_row_does_not_depend_on_the_others(what: str) -> None:
    method = search(what, Sampling(max_new_tokens=6, temperature=0.7), two_rewards(), WEIGHTS)
    together = tokens_of(method)
    assert tokens_of(method, PROMPTS[:1])[0] == together[0]
    assert tokens_of(method, [PROMPTS[0], *([30 + i] * (3 * i + 1) for i in range(4))])[0] == together[0]


@pytest.mark.parametrize("what", ["args", "transfer-q"])
def test_padding_that_is_the_end_token(what: str) -> None:
    """As with GPT-2, whose rewards are blind to <end>: a candidate <end> is scored by the text before it."""
    rewards = two_rewards(pad_token_id=EOS)
    method = search(what, Sampling(max_new_tokens=5, temperature=0), rewards, WEIGHTS)
    with torch.no_grad():
        method.base.lm_head.weight[EOS] += 0.1 * method.base.lm_head.weight.sum(0)  # often a candidate
    reference = Reference(method, rewards, WEIGHTS)
    assert tokens_of(method) == [reference.reply(prompt, 0) for prompt in PROMPTS]


def test_without_a_weight_the_base_alone_counts() -> None:
    method = search("args", Sampling(max_new_tokens=6, temperature=0), two_rewards(), {"one": 0, "two": 0})
    counts, replies = counts_of(method)
    assert set(counts) == {"base"}
    plain = Sample(method.base, tiny_tokenizer(), method.sampling)
    assert [list(reply.token_ids) for reply in replies] == tokens_of(plain)
    one = search("args", Sampling(max_new_tokens=6, temperature=0), two_rewards(), {"two": 0})
    assert set(counts_of(one)[0]) == {"base", "one"}


def test_every_token_is_a_candidate_at_the_most() -> None:
    rewards = {"one": tiny_reward(seed=1)}
    method = Args(Guidance(tiny_model(), tiny_tokenizer(), Sampling(max_new_tokens=3), rewards, {}), top_k=1000)
    counts, replies = counts_of(method)
    tokens = sum(len(reply.token_ids) for reply in replies)
    assert counts["one"][0] == len(PROMPTS) + VOCAB_SIZE * tokens


def test_refusals() -> None:
    base, rewards, tokenizer = tiny_model(), two_rewards(), tiny_tokenizer()
    other = {"one": tiny_reward(tokenizer=tiny_tokenizer(words=[f"v{i}" for i in range(40)]))}

    def args(sampling: Sampling | None = None, **changes: Any) -> Args:
        given: dict[str, Any] = {"rewards": rewards, "weights": {}, "top_k": 4, **changes}
        top_k = given.pop("top_k")
        return Args(Guidance(base, tokenizer, sampling or Sampling(), **given), top_k=top_k)

    def transfer_q(policy: PreTrainedModel = base, **changes: Any) -> TransferQ:
        given: dict[str, Any] = {"top_k": 4, "rollout": 3, **changes}
        return TransferQ(Guidance(base, tokenizer, Sampling(), rewards, {}), policy, **given)

    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ConfigError, "top_k of ARGS is 0", lambda: args(top_k=0)),
        (ConfigError, "top_k of Transfer-Q is 0", lambda: transfer_q(top_k=0)),
        (ConfigError, "rollout of Transfer-Q is 0", lambda: transfer_q(rollout=0)),
        (UnsupportedError, "ARGS draws with a temperature alone", lambda: args(Sampling(top_p=0.9))),
        (WeightsError, "no reward is named 'x'", lambda: args(weights={"x": 1.0})),
        (VocabularyError, "other tokens than the policy", lambda: args(rewards=other)),
        (VocabularyError, "models know 46, 8", lambda: transfer_q(small_model())),
    ]
    for kind, message, make in cases:
        with pytest.raises(kind, match=message):
            make()
