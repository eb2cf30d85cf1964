"""Speculation leaves the distribution alone: replies over a small vocabulary against their exact enumeration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from scipy import stats
from transformers import PreTrainedModel

from builders.engines import shaped_by_transformers
from builders.tiny import DEVICE, VOCAB_SIZE, tiny_model, tiny_tokenizer
from genarm import GuidedForCausalLM
from genarm.engine import Completion, Engine, EngineOptions, Request
from genarm.sampling import Sampling

SIZE = 8
END = 1
"""Ends a reply, so replies differ in length too."""
PROMPT = [5, 6, 7, 2]
ENOUGH = 1e-3
"""The smallest p-value that passes; seeds are fixed, so that a test that passes once passes always."""
HOPELESS = 1e-9
"""What the same test must give for another distribution, so that it is known to see one."""

Reply = tuple[int, ...]


def small(seed: int, **options: Any) -> PreTrainedModel:
    return tiny_model("llama", seed=seed, vocab_size=SIZE, spread=0.3, layers=1, hidden=16, **options)


@cache
def members() -> dict[str, PreTrainedModel]:
    return {"base": small(0), "one": small(1), "two": small(2), "draft": small(3)}


@cache
def guided(*names: str) -> GuidedForCausalLM:
    return GuidedForCausalLM.from_members(members()["base"], {name: members()[name] for name in names})


_known: dict[tuple[PreTrainedModel, str], dict[Reply, float]] = {}


def enumerate_replies(model: PreTrainedModel, weights: Mapping[str, float], sampling: Sampling) -> dict[Reply, float]:
    """Probability of every reply, worked out once."""
    key = (model, repr((weights, sampling)))
    if key not in _known:
        _known[key] = _enumerate(model, weights, sampling)
    return _known[key]


@torch.no_grad()
def _enumerate(model: PreTrainedModel, weights: Mapping[str, float], sampling: Sampling) -> dict[Reply, float]:
    """By forwards without a cache and transformers' processors."""
    options = {"reward_weights": dict(weights)} if isinstance(model, GuidedForCausalLM) else {}
    complete: dict[Reply, float] = {}
    growing: dict[Reply, float] = {(): 1.0}
    for length in range(1, sampling.max_new_tokens + 1):
        ids = torch.tensor([[*PROMPT, *reply] for reply in growing], device=DEVICE)
        log_probs = model(ids, use_cache=False, **options).logits[:, -1].cpu().float().log_softmax(-1)
        longer: dict[Reply, float] = {}
        for (reply, probability), row in zip(growing.items(), log_probs, strict=True):
            shaped = shaped_by_transformers(row, sampling, Counter(reply), PROMPT, [END]).double().softmax(-1)
            for token, share in enumerate(shaped.tolist()):
                if share:
                    ended = token == END or length == sampling.max_new_tokens
                    (complete if ended else longer)[*reply, token] = probability * share
        growing = longer
    return complete


def p_value(replies: Sequence[Reply], expected: Mapping[Reply, float]) -> float:
    """Of a chi-square test; rare replies are counted together."""
    n, counts = len(replies), Counter(replies)
    common = [reply for reply, probability in expected.items() if probability * n >= 5]
    found = [counts[reply] for reply in common]
    wanted = [expected[reply] * n for reply in common]
    rest = n - sum(wanted)
    if rest > 1e-6 * n:
        found.append(n - sum(found))
        wanted.append(rest)
    elif sum(found) < n:
        return 0.0  # something impossible was drawn
    if len(found) == 1:
        return 1.0  # nothing else is possible
    scale = n / sum(wanted)
    return float(stats.chisquare(found, [w * scale for w in wanted]).pvalue)


def draw(
    model: PreTrainedModel,
    n: int,
    sampling: Sampling,
    weights: Sequence[Mapping[str, float]] = ({},),
    *,
    draft: PreTrainedModel | None = None,
    **options: Any,
) -> list[list[Completion]]:
    """`n` replies for each of `weights`, all kinds side by side in one engine."""
    requests = [
        Request(prompt=PROMPT, weights=weights[i % len(weights)], sampling=sampling, seed=i)
        for i in range(n * len(weights))
    ]
    settings = EngineOptions(**{"streams": 48, "context": 16, **options})
    with Engine(model, tiny_tokenizer(), settings, draft=draft) as engine:
        found = engine.generate(requests)
    return [found[i :: len(weights)] for i in range(len(weights))]


def ids(completions: Sequence[Completion]) -> list[Reply]:
    return [completion.token_ids for completion in completions]


WEIGHTS = [{"one": 1.0}, {"one": 0.0}, {"one": 2.5}, {"one": -0.6}]
PLAIN = Sampling(max_new_tokens=3)
SHAPED = Sampling(max_new_tokens=3, temperature=0.7, top_p=0.8)
PENALISED = Sampling(max_new_tokens=4, presence_penalty=1.2, frequency_penalty=0.4, top_k=4, logit_bias={6: 1.0})
LASTING = Sampling(max_new_tokens=4, min_new_tokens=2, repetition_penalty=1.8, min_p=0.03, logit_bias={END: 1.5})


def check(model: PreTrainedModel, n: int, sampling: Sampling, **options: Any) -> None:
    for weights, found in zip(WEIGHTS, draw(model, n, sampling, WEIGHTS, **options), strict=True):
        expected = enumerate_replies(model, weights, sampling)
        assert sum(expected.values()) == pytest.approx(1)
        assert p_value(ids(found), expected) > ENOUGH, (weights, sampling)
        drafts = options["speculate"] and (weights["one"] != 0 or "draft" in options)
        if not options.get("adapt", False):
            assert (sum(c.drafted for c in found) > 0) == bool(drafts)
            assert 0 <= sum(c.accepted for c in found) <= sum(c.drafted for c in found)


def test_drafts_of_an_arm_that_does_not_know_every_id() -> None:
    """The drafts' distribution is one over the known ids: what is cut away must not make the others look rarer."""
    base, arm = (tiny_model(seed=seed, vocab_size=VOCAB_SIZE + extra, spread=0.3) for seed, extra in ((0, 1), (1, 0)))
    tokenizers = {"base": tiny_tokenizer(extra=("[PAD]",)), "one": tiny_tokenizer()}
    model = GuidedForCausalLM.from_members(base, {"one": arm}, tokenizers=tokenizers)
    sampling = Sampling(max_new_tokens=3)
    for weights in ({"one": 1.0}, {"one": 0.3}):
        (found,) = draw(model, 3000, sampling, [weights], speculate=1, adapt=False)
        assert sum(c.drafted for c in found) > 2000
        assert p_value(ids(found), enumerate_replies(model, weights, sampling)) > ENOUGH


@pytest.mark.parametrize(("speculate", "sampling"), [*product([0, 1, 2, 3], [PLAIN, SHAPED, PENALISED]), (3, LASTING)])
def test_replies_are_distributed_as_without_speculation(speculate: int, sampling: Sampling) -> None:
    check(guided("one"), 250, sampling, speculate=speculate, adapt=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling", [PLAIN, SHAPED, PENALISED, LASTING], ids=["plain", "shaped", "penalised", "lasting"]
)
@pytest.mark.parametrize("speculate", [0, 1, 2, 3])
def test_replies_are_distributed_as_without_speculation_many(speculate: int, sampling: Sampling) -> None:
    check(guided("one"), 5000, sampling, speculate=speculate, adapt=False)


@pytest.mark.parametrize("n", [200, pytest.param(4000, marks=pytest.mark.slow)])
def test_adaptive_lengths(n: int) -> None:
    """Here the ARM is as dear as the base and would not pay, so a named draft model drafts too."""
    sampling = Sampling(max_new_tokens=5, temperature=0.8, top_k=3)
    check(guided("one"), n, sampling, speculate=4, adapt=True, draft=members()["draft"])
    cheap = GuidedForCausalLM.from_members(
        tiny_model("llama", seed=0, vocab_size=SIZE, layers=8), {"one": members()["one"]}
    )
    drafted = 0
    for weights, found in zip(WEIGHTS, draw(cheap, n, sampling, WEIGHTS, speculate=4), strict=True):
        assert p_value(ids(found), enumerate_replies(cheap, weights, sampling)) > ENOUGH
        drafted += sum(c.drafted for c in found)
    assert drafted


@pytest.mark.parametrize("n", [200, pytest.param(4000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sampling", [PLAIN, LASTING], ids=["plain", "lasting"])
def test_a_named_draft_model(n: int, sampling: Sampling) -> None:
    check(guided("one"), n, sampling, speculate=2, adapt=False, draft=members()["draft"])


@pytest.mark.parametrize("n", [200, pytest.param(4000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sampling", [PLAIN, SHAPED], ids=["plain", "shaped"])
def test_two_arms_that_draft_together(n: int, sampling: Sampling) -> None:
    model = guided("one", "two")
    several = [{"one": 1.0, "two": 0.5}, {"one": 0.0, "two": 1.5}, {"one": 1.0, "two": -0.5}, {"one": 0.0, "two": 0.0}]
    found = draw(model, n, sampling, several, speculate=2, adapt=False)
    for weights, completions in zip(several, found, strict=True):
        assert p_value(ids(completions), enumerate_replies(model, weights, sampling)) > ENOUGH
        assert (sum(c.drafted for c in completions) > 0) == any(weights.values())


def test_the_test_sees_other_distributions() -> None:
    """In the quick tests' size: the ARM's own, the base's, other weights and other settings are all told apart."""
    model, arm = guided("one"), members()["one"]
    (found,) = draw(model, 250, PLAIN, speculate=2, adapt=False)
    replies = ids(found)
    assert p_value(replies, enumerate_replies(model, {"one": 1.0}, PLAIN)) > ENOUGH
    for other in (
        enumerate_replies(arm, {}, PLAIN),
        enumerate_replies(model, {"one": 0.0}, PLAIN),
        enumerate_replies(model, {"one": 2.5}, PLAIN),
        enumerate_replies(model, {"one": 1.0}, SHAPED),
    ):
        assert p_value(replies, other) < HOPELESS


def test_acceptance_is_the_overlap_of_draft_and_target() -> None:
    """One drafted token stays with probability Σ min(p, q), q being the ARM's power 1 + w (Leviathan et al., 3.6)."""
    model, arm = guided("one"), members()["one"]
    several = [{"one": 0.5}, {"one": 2.0}]
    # The prompt's own forward gives the first token, a draft the second, and the last one is never drafted.
    found = draw(model, 1000, Sampling(max_new_tokens=3), several, speculate=1, adapt=False)
    prompts = torch.tensor([[*PROMPT, first] for first in range(SIZE)], device=DEVICE)
    for weights, completions in zip(several, found, strict=True):
        with torch.no_grad():
            target = model(prompts, reward_weights=weights).logits[:, -1].exp().cpu()
            one = arm(prompts).logits[:, -1].log_softmax(-1).cpu()
        drafted = [c for c in completions if c.token_ids[0] != END]
        assert all(c.drafted == (c.token_ids[0] != END) for c in completions)
        accepted = sum(c.accepted for c in drafted)

        def deviations(power: float) -> float:
            overlap = torch.minimum(target, (one * power).softmax(-1)).sum(-1)  # noqa: B023 (used in this turn)
            chances = overlap[[c.token_ids[0] for c in drafted]]  # noqa: B023
            return float((accepted - chances.sum()) / (chances * (1 - chances)).sum().sqrt())  # noqa: B023

        assert abs(deviations(1 + weights["one"])) < 3.5
        assert abs(deviations(1.0)) > 5  # the ARM itself would be accepted more rarely or more often


def test_a_perfect_draft_is_always_accepted() -> None:
    base = members()["base"]
    (found,) = draw(base, 100, Sampling(max_new_tokens=9), speculate=3, adapt=False, draft=base_copy())
    assert all(c.accepted >= c.drafted - 2 for c in found)  # what follows an end of turn is not looked at
    assert sum(c.accepted for c in found) > 0


def base_copy() -> PreTrainedModel:
    return small(0)
