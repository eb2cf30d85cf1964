"""CARDS against a simulation of a few lines (uncached, one row, no padding) and the exact frequencies of replies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from builders.methods import (
    EOS,
    PROMPTS,
    SMALL,
    all_replies,
    check_frequencies,
    counts_of,
    log_prob_alone,
    pick_alone,
    small_model,
    tokens_of,
)
from builders.rewards import alone, score_alone, tiny_reward
from builders.tiny import tiny_model, tiny_tokenizer
from genarm.engine.noise import Purpose, key, uniform
from genarm.errors import ConfigError, UnsupportedError
from genarm.lab.methods.cards import Cards
from genarm.lab.methods.interface import Meter
from genarm.lab.methods.rewards import Guidance
from genarm.lab.methods.sample import Sample
from genarm.lab.trajectory import TrajectoryReward
from genarm.model.modeling import GuidedForCausalLM
from genarm.sampling import Sampling, derive_seed

WEIGHTS = {"one": 1.0, "two": -0.5}
SETTINGS = {"entropy": 3.1, "beta": 2.0, "goal": 3.0, "tries": 4}


def entropy_of(logits: torch.Tensor) -> float:
    return float(torch.distributions.Categorical(logits=logits).entropy())


class Simulation:
    """One row at a time, with the random numbers of `Cards`; `seen` counts what happened."""

    def __init__(self, cards: Cards, rewards: Mapping[str, TrajectoryReward]) -> None:
        self.cards = cards
        self.rewards = rewards
        self.seen: Counter[str] = Counter()

    def reward(self, ids: list[int]) -> float:
        self.seen["rewards"] += 1
        return sum(weight * score_alone(self.rewards[name], ids) for name, weight in WEIGHTS.items())

    def segment(self, prompt: list[int], kept: list[int], seed: int, drawn: int) -> tuple[list[int], bool]:
        """A segment, and whether the reply ends with it."""
        cards, tokens = self.cards, []
        while True:
            logits = alone(cards.base, prompt + kept + tokens)
            tokens.append(pick_alone(logits, cards.sampling.temperature, seed, drawn + len(tokens)))
            if tokens[-1] in cards.stops or len(kept) + len(tokens) == cards.sampling.max_new_tokens:
                return tokens, True
            self.seen["forwards"] += 1
            if entropy_of(alone(cards.base, prompt + kept + tokens)) >= cards.entropy:
                return tokens, False

    def reply(self, prompt: list[int], seed: int) -> list[int]:
        kept: list[int] = []
        drawn, ended, n = 0, False, self.cards.sampling.max_new_tokens
        first = 0.5 * self.reward(prompt) + 0.5 * self.cards.goal
        self.seen["forwards"] += 1
        while not ended:
            tried: list[tuple[float, list[int], bool]] = []
            while True:
                tokens, ends = self.segment(prompt, kept, seed, drawn)
                drawn += len(tokens)
                reward = self.reward(prompt + kept + tokens)
                threshold = min(self.cards.goal, first + (len(kept + tokens)) * (self.cards.goal - first) / n)
                tried.append((reward, tokens, ends))
                if uniform(key(seed, drawn, Purpose.ACCEPT)) < math.exp(min(0, (reward - threshold) / self.cards.beta)):
                    self.seen["accepted"] += 1
                    break
                self.seen["rejected"] += 1
                if len(tried) == self.cards.tries:
                    _, tokens, ends = max(tried, key=lambda one: one[0])
                    self.seen["last was best" if tokens is tried[-1][1] else "earlier was best"] += 1
                    break
            self.seen["long" if len(tokens) > 1 else "short"] += 1
            kept, ended = kept + tokens, ends
        return kept


def two_rewards() -> dict[str, TrajectoryReward]:
    return {"one": tiny_reward(seed=1), "two": tiny_reward("gpt2", seed=2)}


def make(base: Any = None, rewards: Any = None, *, length: int = 12, temperature: float = 1.0, **changes: Any) -> Cards:
    sampling = Sampling(max_new_tokens=length, temperature=temperature)
    chosen = two_rewards() if rewards is None else rewards
    guidance = Guidance(base or tiny_model(), tiny_tokenizer(), sampling, chosen, WEIGHTS)
    return Cards(guidance, **{**SETTINGS, **changes})


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_batched_and_cached_is_row_by_row(family: str, temperature: float) -> None:
    rewards = two_rewards()
    cards = make(tiny_model(family), rewards, temperature=temperature)
    cards.stops = [EOS, *range(20, 26)]
    prompts = PROMPTS * 2
    simulation = Simulation(cards, rewards)
    counts, replies = counts_of(cards, prompts)
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        assert list(reply.token_ids) == simulation.reply(prompt, derive_seed(3, row))
        assert reply.finish_reason == ("stop" if reply.token_ids[-1] in cards.stops else "length")
    seen = simulation.seen
    for what in ("accepted", "rejected", "long", "short", "earlier was best", "last was best"):
        assert seen[what] >= 1
    assert len({len(reply.token_ids) for reply in replies}) > 2
    positions = sum(len(prompt) - 1 for prompt in prompts) + seen["forwards"]
    assert counts["base"] == (seen["forwards"], positions)
    assert counts["one"][0] == counts["two"][0] == seen["rewards"]
    assert set(counts) == {"base", "one", "two"}
    assert cards.log_probs(prompts, replies) is None


def test_a_row_does_not_depend_on_the_others() -> None:
    cards = make()
    together = tokens_of(cards)
    assert tokens_of(cards, PROMPTS[:1])[0] == together[0]
    assert tokens_of(cards, [PROMPTS[0], *([30 + i] * (3 * i + 1) for i in range(5))])[0] == together[0]


@pytest.mark.parametrize(
    ("changes", "meaning"),
    [({"goal": -1e3}, "everything is accepted"), ({"goal": 1e3, "tries": 1}, "the only try is the best")],
)
def test_what_is_always_kept_is_the_base(changes: dict[str, float], meaning: str) -> None:
    cards = make(**changes)
    assert tokens_of(cards) == tokens_of(Sample(cards.base, tiny_tokenizer(), cards.sampling)), meaning


def test_one_segment_and_no_acceptance_is_best_of_n() -> None:
    """With an entropy that nothing reaches, a segment is a reply, and the best of all tries is kept."""
    cards = make(entropy=100.0, goal=1e3, tries=5)
    simulation = Simulation(cards, two_rewards())
    assert tokens_of(cards) == [simulation.reply(prompt, derive_seed(3, row)) for row, prompt in enumerate(PROMPTS)]
    assert simulation.seen["rejected"] == 5 * len(PROMPTS)
    assert simulation.seen["accepted"] == 0


def exact_cards(cards: Cards, reward: Callable[[list[int]], float], prompt: list[int]) -> dict[tuple[int, ...], float]:
    """log π of every reply when each segment is one token: a mixture over the number of rejections."""
    n, found = cards.sampling.max_new_tokens, {}
    start = (reward(prompt) + cards.goal) / 2

    def probabilities(kept: tuple[int, ...]) -> list[float]:
        p = alone(cards.base, [*prompt, *kept]).softmax(-1).tolist()
        r = [reward([*prompt, *kept, token]) for token in range(len(p))]
        threshold = start + (len(kept) + 1) * (cards.goal - start) / n
        accept = [min(1.0, math.exp((value - threshold) / cards.beta)) for value in r]
        rejected = sum(p[v] * (1 - accept[v]) for v in range(len(p)))
        total = [p[v] * accept[v] * sum(rejected**i for i in range(cards.tries)) for v in range(len(p))]
        for v in range(len(p)):  # all tries rejected, and v the best of them
            below = sum(p[u] * (1 - accept[u]) for u in range(len(p)) if r[u] < r[v])
            total[v] += (below + p[v] * (1 - accept[v])) ** cards.tries - below**cards.tries
        return total

    for reply in all_replies(range(len(SMALL)), n):
        chances = [probabilities(reply[:t])[token] for t, token in enumerate(reply)]
        found[reply] = sum(math.log(chance) if chance else -math.inf for chance in chances)
    return found


def test_frequencies_are_the_exact_ones() -> None:
    reward = tiny_reward(seed=1, tokenizer=SMALL)
    settings = {"entropy": 0.0, "beta": 0.8, "goal": 0.8, "tries": 3}
    cards = Cards(Guidance(small_model(), SMALL, Sampling(max_new_tokens=2), {"one": reward}, {}), **settings)
    exact = exact_cards(cards, lambda ids: score_alone(reward, ids), [6, 7])
    replies = [r for seed in range(3) for r in cards.answer([[6, 7]] * 1000, seed=seed, meter=Meter())]
    check_frequencies(replies, exact)
    plain = {y: log_prob_alone(lambda ids: alone(cards.base, ids), [6, 7], y, 1.0) for y in exact}
    assert max(abs(math.exp(exact[y]) - math.exp(plain[y])) for y in exact) > 0.05


def test_threshold_rises_to_the_goal() -> None:
    cards = make(length=10, goal=2.0)
    assert [cards.threshold(0.0, t) for t in (0, 5, 10)] == pytest.approx([1.0, 1.5, 2.0])
    assert cards.threshold(3.0, 0) == 2.0  # a prompt above the goal asks for no more than the goal
    assert [cards.acceptance(r, 1.0) for r in (0.5, 1.0, 9.0)] == pytest.approx([math.exp(-0.25), 1, 1])


def test_refusals() -> None:
    guided = GuidedForCausalLM.from_members(tiny_model(), {"arm": tiny_model(seed=1)})
    cases: list[tuple[type[Exception], str, Callable[[], Cards]]] = [
        (UnsupportedError, "CARDS chooses among different draws", lambda: make(temperature=0.0)),
        (UnsupportedError, "CARDS takes tokens back", lambda: make(guided)),
        (ConfigError, "entropy and goal of CARDS are -1.0", lambda: make(entropy=-1.0)),
        (ConfigError, "entropy and goal of CARDS are 3.1 and nan", lambda: make(goal=math.nan)),
        (ConfigError, "beta and tries of CARDS are 0.0", lambda: make(beta=0.0)),
        (ConfigError, "beta and tries of CARDS are 2.0 and 0", lambda: make(tries=0)),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
