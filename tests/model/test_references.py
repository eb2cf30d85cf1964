"""Rewards that are differences, and budgets: what must hold exactly."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import brentq

from builders.engines import TOKENIZER, lora
from builders.tiny import save_member, tiny_lora, tiny_model
from genarm import Engine, EngineOptions, GuidedForCausalLM, Request, Sampling, compose
from genarm.errors import ConfigError, MemberError, WeightsError
from genarm.model.combine import Coefficients, coefficients, combine, divergence, within_budget
from genarm.model.config import GuidedConfig

IDS = torch.tensor([[7, 8, 9, 10, 11], [30, 12, 41, 6, 6]])


def logs(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, **options).logits.log_softmax(-1)  # type: ignore[no-any-return]


def tuned_on_base() -> tuple[Any, GuidedForCausalLM]:
    """A base, and a guided model with two tuned adapters on it and an ARM beside them."""
    base = tiny_model(seed=0)
    rewards = {"one": lora(base, "one", 3), "two": lora(base, "two", 4), "arm": tiny_model(seed=5, hidden=16)}
    model = GuidedForCausalLM.from_members(base, rewards, references={"one": base, "two": base})
    return rewards, model


def alone(peft: Any, name: str) -> torch.Tensor:
    peft.set_adapter(name)
    return logs(peft)


NOTHING = {"one": 0.0, "two": 0.0, "arm": 0.0}


def test_weights_0_and_1_are_the_base_and_the_tuned_model() -> None:
    _, model = tuned_on_base()
    base = logs(model, reward_weights=NOTHING)
    torch.testing.assert_close(base, logs(tiny_model(seed=0)), atol=1e-6, rtol=1e-6)
    for name in ("one", "two"):
        found = logs(model, reward_weights={**NOTHING, name: 1.0})
        twin = tiny_model(seed=0)
        torch.testing.assert_close(found, logs(lora(twin, name, 3 if name == "one" else 4)), atol=1e-5, rtol=1e-5)
        halfway = logs(model, reward_weights={**NOTHING, name: 0.5})
        between = (0.5 * base + 0.5 * found).log_softmax(-1)  # DeRa, arXiv 2402.02992
        torch.testing.assert_close(halfway, between, atol=1e-5, rtol=1e-5)
        beyond = logs(model, reward_weights={**NOTHING, name: 2.5})
        torch.testing.assert_close(beyond, (2.5 * found - 1.5 * base).log_softmax(-1), atol=2e-5, rtol=1e-5)


def test_several_at_once_are_their_sum_and_opposites_cancel() -> None:
    _, model = tuned_on_base()
    base = logs(model, reward_weights=NOTHING)
    one, two = (logs(model, reward_weights={**NOTHING, name: 1.0}) for name in ("one", "two"))
    arm = logs(tiny_model(seed=5, hidden=16))
    found = logs(model, reward_weights={"one": 0.7, "two": -0.4, "arm": 1.5})
    expected = base + 0.7 * (one - base) - 0.4 * (two - base) + 1.5 * arm
    torch.testing.assert_close(found, expected.log_softmax(-1), atol=2e-5, rtol=1e-5)
    same = GuidedForCausalLM.from_members(
        plain := tiny_model(seed=0), {n: lora(plain, n, 3) for n in ("a", "b")}, references={"a": plain, "b": plain}
    )
    cancelled = logs(same, reward_weights={"a": 2.0, "b": -2.0})
    torch.testing.assert_close(cancelled, base, atol=1e-5, rtol=1e-5)


def proxy_tuned() -> GuidedForCausalLM:
    """A large base, a small tuned model and its untuned self, which are one model with an adapter."""
    base, small = tiny_model(seed=0), tiny_model(seed=1, hidden=16, layers=1)
    return GuidedForCausalLM.from_members(base, {"t": lora(small, "t", 3)}, references={"t": small})


def test_a_pair_of_small_models_is_proxy_tuning() -> None:
    """arXiv 2401.08565, equation 1: softmax of s_base + w (s_tuned − s_untuned)."""
    model = proxy_tuned()
    assert [member.name for member in model.members] == ["base", "t", "t.reference"]
    base, untuned = logs(tiny_model(seed=0)), logs(tiny_model(seed=1, hidden=16, layers=1))
    tuned = logs(lora(tiny_model(seed=1, hidden=16, layers=1), "t", 3))
    for weight in (0.5, 1.0, -1.0, 3.0):
        expected = (base + weight * (tuned - untuned)).log_softmax(-1)
        torch.testing.assert_close(logs(model, reward_weights={"t": weight}), expected, atol=2e-5, rtol=1e-5)
    said = model.token_rewards("w1 w2", "w3 w4", tokenizer=TOKENIZER, reward_weights={"t": 2.0})
    for i, ratio in enumerate(said.rewards["t"]):  # of one token: less its log Z, which is the same for all ids
        assert abs(ratio) < 20
        assert said.base[i] <= 0
    assert torch.isfinite(torch.tensor(said.guided)).all()


def test_rows_have_weights_and_budgets_of_their_own() -> None:
    _, model = tuned_on_base()
    rows = torch.tensor([[1.0, 0.5, 0.0], [0.0, -1.0, 2.0]])
    budgets = torch.tensor([0.05, 0.4])
    together = logs(model, reward_weights=rows, max_kl=budgets)
    for i in range(2):
        with torch.no_grad():
            single = model(IDS[i : i + 1], reward_weights=rows[i : i + 1], max_kl=float(budgets[i])).logits
        torch.testing.assert_close(together[i : i + 1], single, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["tuned", "proxy"])
@pytest.mark.parametrize("speculate", [0, 3])
def test_engine_and_generate_agree(kind: str, speculate: int) -> None:
    model = tuned_on_base()[1] if kind == "tuned" else proxy_tuned()
    model.generation_config.eos_token_id = None
    names = model.reward_names
    several: list[tuple[list[float], float | None]] = [
        ([1.0, 0.5, -0.3], None),
        ([2.0, 0.0, 1.0], 0.3),
        ([0.0] * 3, 0.1),
    ]
    prompts = [*IDS.tolist(), [44, 6]]
    expected = []
    for ids, (row, budget) in zip(prompts, several, strict=True):
        weights = dict(zip(names, row, strict=False))
        out = model.generate(
            torch.tensor([ids]),
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=0,
            reward_weights=weights,
            max_kl=budget,
        )
        expected.append(tuple(out[0, len(ids) :].tolist()))
    with Engine(model, TOKENIZER, EngineOptions(streams=3, context=64, speculate=speculate, adapt=False)) as engine:
        requests = [
            Request(
                prompt=ids,
                weights=dict(zip(names, row, strict=False)),
                max_kl=budget,
                sampling=Sampling(max_new_tokens=12, temperature=0),
                ignore_eos=True,
            )
            for ids, (row, budget) in zip(prompts, several, strict=True)
        ]
        completions = engine.generate(requests)
    assert [c.token_ids for c in completions] == expected
    for ids, completion, (row, budget) in zip(prompts, completions, several, strict=True):
        whole = torch.tensor([[*ids, *completion.token_ids]])
        weights = dict(zip(names, row, strict=False))
        with torch.no_grad():
            guided = model(whole, reward_weights=weights, max_kl=budget).logits[0, len(ids) - 1 : -1]
            base = model(whole, reward_weights=dict.fromkeys(names, 0.0)).logits[0, len(ids) - 1 : -1]
        kl = (guided.exp() * (guided - base)).sum(-1)
        torch.testing.assert_close(torch.tensor([t.kl for t in completion.tokens]), kl, atol=1e-4, rtol=1e-3)
        assert completion.kl == pytest.approx(float(kl.sum()), abs=1e-3)
        assert budget is None or float(kl.max()) <= budget + 1e-6
        for token, weight_sum in zip(completion.tokens, guided, strict=True):
            assert token.log_prob == pytest.approx(float(weight_sum[token.id]), abs=1e-4)
            assert {*token.rewards} == {name for name, w in weights.items() if w}


# --- the combination by itself --------------------------------------------------------------------------------------


def random_logs(rows: int, size: int, seed: int) -> torch.Tensor:
    return (torch.randn(rows, 2, size, generator=torch.Generator().manual_seed(seed)) * 2).log_softmax(-1)


def test_coefficients() -> None:
    """Rewards 1 to 4: against nothing, the base, reward 1, and a fifth stream."""
    weights = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0], [0.5, 1.0, 0.5, 0.0]])
    given = coefficients(weights, (None, 0, 1, 5), streams=5)
    assert given.base_B is not None
    assert given.base_B.tolist() == [-1.0, 1.0, 0.0]
    assert coefficients(weights, (None, 1, 1, 5), streams=5).base_B is None
    assert given.streams_BS.tolist() == [[-2.0, 2.0, 3.0, 4.0, -4.0], [0.0] * 5, [0.0, 1.0, 0.5, 0.0, 0.0]]
    assert given.guided_B.tolist() == [True, False, True]


def test_an_id_that_a_stream_rules_out_has_no_probability_whatever_its_sign() -> None:
    base, one = random_logs(2, 6, 0), random_logs(2, 6, 1)
    base[:, :, 2] = -torch.inf
    one[:, :, 4] = -torch.inf
    for weight, base_factor in ((1.0, 0.0), (2.0, -1.0), (0.5, 0.5), (-1.0, 2.0)):
        given = Coefficients(torch.full((2,), base_factor), torch.full((2, 1), weight), torch.ones(2, dtype=torch.bool))
        found = combine(base, [one], given)
        assert not found.isnan().any()
        assert found[..., 4].isneginf().all()
        assert found[..., 2].isneginf().all() == (base_factor != 0)
        torch.testing.assert_close(found.exp().sum(-1), torch.ones(2, 2))


@pytest.mark.parametrize(("seed", "budget"), itertools.product(range(6), (0.01, 0.3, 1.0, 50.0)))
def test_a_budget_against_enumeration(seed: int, budget: float) -> None:
    """The largest share by another library's root finder on exact sums in float64."""
    base, other = random_logs(3, 9, seed), random_logs(3, 9, seed + 100)
    weights = torch.tensor([[0.5], [2.0], [-1.0]])
    guided = combine(base, [other], coefficients(weights))
    found = within_budget(base, guided, torch.full((3,), budget))
    assert float(divergence(found, base).max()) <= budget * (1 + 1e-5)
    for row, position in itertools.product(range(3), range(2)):
        b, g = base[row, position].double(), guided[row, position].double()

        def distance(share: float, b: torch.Tensor = b, g: torch.Tensor = g) -> float:
            p = (b + share * (g - b)).log_softmax(-1)
            return float((p.exp() * (p - b)).sum())

        if distance(1.0) <= budget:
            assert torch.equal(found[row, position], guided[row, position])
            continue
        share = brentq(lambda s: distance(s) - budget, 0.0, 1.0)
        expected = (b + share * (g - b)).log_softmax(-1)
        torch.testing.assert_close(found[row, position].double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("power", "budget"), itertools.product(range(9), (1e-3, 0.03, 0.3, 3.0)))
def test_a_budget_is_used_up_whatever_the_weight(power: int, budget: float) -> None:
    """The weight that is left, by bisection of its logarithm on the formula itself in float64."""
    weight = 10.0**power
    base, other = random_logs(2, 64, power), random_logs(2, 64, power + 100)
    guided = combine(base, [other], coefficients(torch.full((2, 1), weight)))
    found = within_budget(base, guided, torch.full((2,), budget))
    for row, position in itertools.product(range(2), range(2)):
        b, r = base[row, position].double(), other[row, position].double()

        def at(exponent: float, b: torch.Tensor = b, r: torch.Tensor = r) -> torch.Tensor:
            return (b + 10.0**exponent * r).log_softmax(-1)

        def distance(exponent: float, b: torch.Tensor = b) -> float:
            p = at(exponent)
            return float((p.exp() * (p - b)).sum())

        low, high = -12.0, float(power)
        if distance(high) <= budget:
            low = high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if distance(middle) <= budget else (low, middle)
        expected = at(low)
        kl = float((found[row, position].double().exp() * (found[row, position].double() - b)).sum())
        assert kl == pytest.approx(distance(low), rel=2e-3)
        assert kl <= budget * (1 + 2e-3)
        torch.testing.assert_close(found[row, position].double().exp(), expected.exp(), atol=1e-4, rtol=1e-4)


def test_a_budget_of_nothing_is_the_base_and_none_is_none() -> None:
    base, other = random_logs(2, 9, 0), random_logs(2, 9, 1)
    other[:, :, 3] = -torch.inf  # leaving it out costs more than the budget
    guided = combine(base, [other], coefficients(torch.ones(2, 1)))
    assert torch.equal(within_budget(base, guided, torch.zeros(2)), base)
    assert torch.equal(within_budget(base, guided, torch.full((2,), torch.inf)), guided)


def test_a_budget_where_the_base_rules_out_what_the_sum_says() -> None:
    """The distance is infinite, so the id is out at every share below 1, and nothing is NaN."""
    base, tuned = random_logs(2, 9, 0), random_logs(2, 9, 1)
    base[:, :, 3] = -torch.inf
    guided = combine(base, [tuned], coefficients(torch.ones(2, 1), (0,)))
    torch.testing.assert_close(guided, tuned)  # at weight 1 the base has no part
    assert divergence(guided, base).isinf().all()
    found = within_budget(base, guided, torch.full((2,), 0.2))
    assert not found.isnan().any()
    assert found[..., 3].isneginf().all()
    assert float(divergence(found, base).min()) > 0.19
    assert float(divergence(found, base).max()) <= 0.2 + 1e-5
    assert torch.equal(within_budget(base, guided, torch.full((2,), torch.inf)), guided)


# --- folders --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    base, small = tiny_model(seed=0), tiny_model(seed=1, hidden=16, layers=1)
    save_member(base, tmp_path / "base")
    save_member(small, tmp_path / "small")
    save_member(tiny_model(seed=2, hidden=16, layers=1), tmp_path / "small-tuned")
    tiny_lora(base, tmp_path / "dpo", seed=3, base_path=str(tmp_path / "base"))
    tiny_lora(small, tmp_path / "small-dpo", seed=4, base_path=str(tmp_path / "small"))
    return tmp_path


@pytest.mark.parametrize("bundle", [False, True])
def test_composed_and_saved_again(folders: Path, bundle: bool) -> None:
    report = compose(
        folders / "base",
        {"arm": folders / "small-tuned"},
        folders / "guided",
        tuned={"dpo": folders / "dpo", "proxy": folders / "small-dpo", "full": folders / "small-tuned"},
        references={"proxy": folders / "small", "full": folders / "small"},
        weights={"dpo": 0.5},
        bundle=bundle,
    )
    assert report.notes == ()
    record = json.loads((folders / "guided" / "config.json").read_text())
    assert [reward.get("reference") for reward in record["rewards"]][:2] == [None, "base"]
    model = GuidedForCausalLM.from_pretrained(folders / "guided")
    assert model.default_weights == {"arm": 1.0, "dpo": 0.5, "proxy": 1.0, "full": 1.0}
    assert model.references == (None, 0, 5, 5)
    assert len(model.models) == 3 + (not bundle and 0)  # the base, the small one and its tuned copy, each once
    weights = {"arm": 0.3, "dpo": 0.5, "proxy": 1.5, "full": -1.0}
    base, small, tuned = (logs(tiny_model(**shape)) for shape in ({"seed": 0}, SMALL, {**SMALL, "seed": 2}))
    dpo = logs(model, reward_weights={**dict.fromkeys(weights, 0.0), "dpo": 1.0})
    proxy = logs(model, reward_weights={**dict.fromkeys(weights, 0.0), "proxy": 1.0}) - base  # up to a constant
    expected = base + 0.3 * tuned + 0.5 * (dpo - base) + 1.5 * proxy - (tuned - small)
    found = logs(model, reward_weights=weights)
    torch.testing.assert_close(found, expected.log_softmax(-1), atol=5e-5, rtol=1e-4)
    model.save_pretrained(folders / "again")
    again = GuidedForCausalLM.from_pretrained(folders / "again")
    torch.testing.assert_close(logs(again, reward_weights=weights), found)
    compose(folders / "guided", {}, folders / "more", tuned={"other": folders / "dpo"})
    more = GuidedForCausalLM.from_pretrained(folders / "more")
    assert more.references == (None, 0, 6, 6, 0)
    torch.testing.assert_close(logs(more, reward_weights={**weights, "other": 0.0}), found)


SMALL = {"seed": 1, "hidden": 16, "layers": 1}


def test_from_memory_and_back(tmp_path: Path) -> None:
    model = proxy_tuned()
    model.save_pretrained(tmp_path / "saved")
    TOKENIZER.save_pretrained(tmp_path / "saved" / "members" / "base")
    again = GuidedForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.references == (2,)
    assert len(again.models) == 2
    torch.testing.assert_close(logs(again), logs(model))


def test_an_adapter_on_another_model_is_said_to_be_compared_with_the_base(folders: Path) -> None:
    report = compose(folders / "base", {}, folders / "g", tuned={"t": folders / "small-dpo"})
    assert len(report.notes) == 1
    assert f"give --reference t={folders / 'small'}" in report.notes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"references": {"x": "base"}, "tuned": {"t": "dpo"}}, "'x' is no tuned reward"),
        ({"references": {"arm": "base"}, "tuned": {"t": "dpo"}}, "'arm' is no tuned reward"),
        ({"tuned": {"arm": "dpo"}}, "two rewards are named 'arm'"),
        ({"tuned": {"t": "small"}, "references": {"t": "small"}}, "is the reward itself"),
    ],
)
def test_what_does_not_hold_together(folders: Path, options: Any, message: str) -> None:
    given = {key: {name: folders / path for name, path in of.items()} for key, of in options.items()}
    with pytest.raises(ConfigError, match=message):
        compose(folders / "base", {"arm": folders / "small"}, folders / "g", **given)


def test_wrong_records_and_budgets() -> None:
    for reference, message in (("other", "a member is described by 'other'"), ({"path": "x"}, "unknown key 'path'")):
        with pytest.raises(ConfigError, match=message):
            GuidedConfig(base={"model": "b"}, rewards=[{"name": "r", "model": "m", "reference": reference}])
    model = proxy_tuned()
    with pytest.raises(MemberError, match="which is no reward"):
        GuidedForCausalLM.from_members(model.base, {}, references={"t": model.base})
    for wrong in (-0.1, float("nan"), float("inf"), "1", True):
        with pytest.raises(WeightsError, match="max_kl is"):
            Request(prompt=[7], max_kl=wrong)  # type: ignore[arg-type]
        with pytest.raises(WeightsError, match="max_kl is"):
            model(IDS, max_kl=wrong)
    with pytest.raises(WeightsError, match=r"max_kl has shape \(3,\)"):
        model(IDS, max_kl=torch.ones(3))
