"""The exact identities of guided decoding, on tiny random models of several families, in float32 and bfloat16."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import PreTrainedModel

from builders.tiny import FAMILIES, tiny_model
from genarm import GuidedForCausalLM
from genarm.model.combine import coefficients, combine

PAD = 0


def guided(base: PreTrainedModel, *rewards: PreTrainedModel, weight: float = 1.0) -> GuidedForCausalLM:
    names = [f"r{i}" for i in range(len(rewards))]
    return GuidedForCausalLM.from_members(
        base, dict(zip(names, rewards, strict=True)), weights=dict.fromkeys(names, weight)
    )


def prompts(rows: int = 3, length: int = 7) -> torch.Tensor:
    torch.manual_seed(7)
    return torch.randint(6, 46, (rows, length))


@pytest.fixture(
    params=itertools.product(FAMILIES, (torch.float32, torch.bfloat16)), ids=lambda p: f"{p[0]}-{p[1]}"[:20]
)
def pair(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedModel, torch.dtype]:
    family, dtype = request.param
    return (
        tiny_model(family, seed=0, dtype=dtype),
        tiny_model(family, seed=1, hidden=16, layers=1, dtype=dtype),
        dtype,
    )


def test_combination_is_the_written_formula() -> None:
    torch.manual_seed(0)
    base, first, second = (torch.randn(4, 3, 11, dtype=torch.float64) for _ in range(3))
    weights = torch.tensor([[1.0, 0.5], [0.0, 2.0], [-1.0, 0.3], [0.0, 0.0]])
    base_BTV, *rewards = (logits.log_softmax(-1).float() for logits in (base, first, second))
    result = combine(base_BTV, rewards, coefficients(weights))
    for b, t in itertools.product(range(4), range(3)):
        w1, w2 = weights[b].tolist()
        product = base[b, t].softmax(-1) * first[b, t].softmax(-1) ** w1 * second[b, t].softmax(-1) ** w2
        torch.testing.assert_close(result[b, t].exp().double(), product / product.sum(), atol=1e-6, rtol=1e-5)


def test_what_a_reward_without_weight_says_is_of_no_account() -> None:
    """Not even that an id is impossible, or that it has no number; and an id impossible to one with weight stays so."""
    torch.manual_seed(0)
    base, odd, plain = (torch.randn(4, 2, 11).log_softmax(-1) for _ in range(3))
    odd[..., 3], odd[3] = -torch.inf, torch.nan
    weights = torch.tensor([[0.0, 0.7], [1.5, 0.7], [-1.5, 0.7], [0.0, 0.0]])
    result = combine(base, [odd, plain], coefficients(weights))
    assert torch.equal(result[0], combine(base, [plain], coefficients(weights[:, 1:]))[0])
    assert torch.equal(result[3], base[3])
    for row, weight in ((1, 1.5), (2, -1.5)):
        expected = base[row].exp() * plain[row].exp() ** 0.7 * odd[row].exp() ** weight
        expected[:, 3] = 0
        torch.testing.assert_close(result[row].exp(), expected / expected.sum(-1, keepdim=True))


def test_weight_zero_is_the_base_bit_for_bit(pair: tuple[PreTrainedModel, PreTrainedModel, torch.dtype]) -> None:
    base, arm, _ = pair
    model, ids = guided(base, arm), prompts()
    expected = base(ids).logits.log_softmax(-1, dtype=torch.float32)
    assert torch.equal(model(ids, reward_weights={"r0": 0}).logits, expected)
    # also in company: a row of zeros beside rows that are guided
    mixed = model(ids, reward_weights=torch.tensor([[0.0], [2.0], [-1.0]])).logits
    assert torch.equal(mixed[0], expected[0])
    assert not torch.equal(mixed[1], expected[1])
    assert torch.equal(
        model.generate(ids, reward_weights={"r0": 0}, do_sample=False, max_new_tokens=12),
        base.generate(ids, do_sample=False, max_new_tokens=12),
    )


def test_the_base_as_its_own_reward_is_a_temperature(
    pair: tuple[PreTrainedModel, PreTrainedModel, torch.dtype],
) -> None:
    base, _, _ = pair
    model, ids = guided(base, base), prompts()
    for w in (0.5, 1.0, 2.0, -0.5):
        expected = (base(ids).logits.float() * (1 + w)).log_softmax(-1)
        torch.testing.assert_close(model(ids, reward_weights={"r0": w}).logits, expected, atol=1e-4, rtol=1e-4)


def test_two_equal_rewards_at_half_weight_equal_one(pair: tuple[PreTrainedModel, PreTrainedModel, torch.dtype]) -> None:
    base, arm, _ = pair
    ids = prompts()
    torch.testing.assert_close(
        guided(base, arm, arm, weight=0.35)(ids).logits, guided(base, arm, weight=0.7)(ids).logits, atol=1e-5, rtol=1e-5
    )


def test_cached_equals_uncached(pair: tuple[PreTrainedModel, PreTrainedModel, torch.dtype]) -> None:
    base, arm, dtype = pair
    # 20 tokens: beyond Mistral's window of 8
    model, ids = guided(base, arm), prompts(length=20)
    whole = model(ids, use_cache=False).logits
    cache, steps = None, []
    for chunk in ids.split([5, 1, 1, 6, 1, 1, 5], dim=1):
        output = model(chunk, past_key_values=cache)
        cache = output.past_key_values
        steps.append(output.logits)
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=tolerance, rtol=tolerance)


def test_padded_rows_equal_lone_rows_in_any_order(pair: tuple[PreTrainedModel, PreTrainedModel, torch.dtype]) -> None:
    base, arm, dtype = pair
    model, rows = guided(base, arm), prompts(rows=4, length=9)
    lengths, weights = [9, 4, 6, 1], torch.tensor([[1.0], [0.0], [-0.5], [3.0]])
    lone = [model(rows[i : i + 1, :n], reward_weights=weights[i : i + 1]).logits[0, -1] for i, n in enumerate(lengths)]
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        ids = torch.full((4, 9), PAD)
        mask = torch.zeros(4, 9, dtype=torch.long)
        for place, i in enumerate(order):
            ids[place, 9 - lengths[i] :], mask[place, 9 - lengths[i] :] = rows[i, : lengths[i]], 1
        together = model(ids, attention_mask=mask, reward_weights=weights[order]).logits[:, -1]
        for place, i in enumerate(order):
            torch.testing.assert_close(together[place], lone[i], atol=tolerance, rtol=tolerance)


def test_every_request_keeps_its_own_guide_under_permutation() -> None:
    """A nested engine once gave every request the first prompt's guide."""
    model = guided(tiny_model(seed=0), tiny_model(seed=1))
    ids, weights = prompts(rows=4), torch.tensor([[0.0], [1.0], [2.0], [-1.0]])
    straight = model.generate(ids, reward_weights=weights, do_sample=False, max_new_tokens=10, eos_token_id=None)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = model.generate(
        ids[order], reward_weights=weights[order], do_sample=False, max_new_tokens=10, eos_token_id=None
    )
    assert torch.equal(shuffled, straight[order])
    assert len({tuple(row.tolist()) for row in straight[:, 7:]}) == 4


def test_members_of_different_families_and_three_rewards() -> None:
    base = tiny_model("llama", seed=0)
    arms = [tiny_model("gpt2", seed=1, hidden=16), tiny_model("mistral", seed=2), tiny_model("qwen2", seed=3)]
    model, ids = guided(base, *arms), prompts()
    weights = {"r0": 0.5, "r1": 2.0, "r2": -0.25}
    total = base(ids).logits.log_softmax(-1)
    for arm, weight in zip(arms, weights.values(), strict=True):
        total = total + weight * arm(ids).logits.log_softmax(-1)
    torch.testing.assert_close(model(ids, reward_weights=weights).logits, total.log_softmax(-1), atol=1e-5, rtol=1e-5)
