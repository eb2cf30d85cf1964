"""Comparisons at equal distance from the base: against interpolation and resampling in ten lines, on known curves."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from scipy.stats import kendalltau

from builders.invented import measured, recipe, results
from genarm.errors import ConfigError
from genarm.lab.evaluation.agreement import LENGTH, agreements
from genarm.lab.evaluation.behaviour import behaviour
from genarm.lab.evaluation.claims import rule
from genarm.lab.evaluation.figures import figures, record
from genarm.lab.evaluation.frontiers import ahead, make_frontier
from genarm.lab.evaluation.fronts import hypervolume_lead, make_fronts
from genarm.lab.evaluation.plots import plots
from genarm.lab.evaluation.recipe import Claim, Recipe
from genarm.lab.evaluation.recipe_file import load_recipe
from genarm.lab.evaluation.results import Measured, Results, Trained
from genarm.lab.evaluation.sheets import sheets

JUDGE = "truth"


def centred(rng: np.random.Generator, n: int, spread: float) -> np.ndarray:
    """Noise whose mean is exactly 0."""
    noise = rng.normal(scale=spread, size=n)
    return noise - noise.mean()


def lines(*, n: int = 60, seed: int = 0, spread: float = 1.0, exact: bool = True, **families: Any) -> Results:
    """The base at (0, 0), and families of points (mean KL, mean score), with noise that prompts share in part."""
    rng = np.random.default_rng(seed)
    prompt = centred(rng, n, spread)
    noise = (lambda size: centred(rng, n, size)) if exact else (lambda size: rng.normal(scale=size, size=n))
    rows = [measured("base", {JUDGE: prompt + noise(spread)}, n, kl=(0.0,) * n)]
    for family, points in families.items():
        for i, (kl, score) in enumerate(points):
            own = {"family": family, "kl": tuple(kl + noise(0.2 * kl))}
            rows.append(measured(f"{family} {i}", {JUDGE: prompt + score + noise(spread)}, n, **own))
    return results(*rows)


def family(of: Results, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(KL, score) of the base and the family's methods, [P, N] each."""
    rows = [row for row in of.measured if row.family in ("base", name)]
    return np.array([row.kl for row in rows]), np.array([row.scores[JUDGE] for row in rows])


def by_hand(kl_a: Any, score_a: Any, kl_b: Any, score_b: Any) -> float:
    """The mean difference over the range that both reach, by numpy's interpolation on a fine grid."""
    grid = np.linspace(max(min(kl_a), min(kl_b)), min(max(kl_a), max(kl_b)), 20_001)
    orders = [np.argsort(kl) for kl in (kl_a, kl_b)]
    pairs = ((kl_a, score_a), (kl_b, score_b))
    a, b = (np.interp(grid, np.array(kl)[o], np.array(y)[o]) for (kl, y), o in zip(pairs, orders, strict=True))
    return float(np.mean((a - b)[:-1] + np.diff(a - b) / 2))


A = [(1.0, 1.0), (3.0, 2.0), (6.0, 2.5)]
B = [(0.5, 0.2), (4.0, 1.0)]


# --- differences at equal KL -----------------------------------------------------------------------------------


def test_a_difference_by_hand():
    of = lines(A=A, B=B)
    found = ahead(of, JUDGE, "A", "B")
    assert found is not None
    assert (found.low, found.high, found.bounded) == (pytest.approx(0), pytest.approx(4), ())
    expected = by_hand([0, 1, 3, 6], [0, 1, 2, 2.5], [0, 0.5, 4], [0, 0.2, 1])
    assert found.mean.value == pytest.approx(expected, abs=1e-6)
    assert list(found.at) == [0.5, 1, 2]
    at = [0.5 - 0.2, 1 - (0.2 + 0.5 * 0.8 / 3.5), 1.5 - (0.2 + 1.5 * 0.8 / 3.5)]
    assert [estimate.value for estimate in found.at.values()] == pytest.approx(at)
    back = ahead(of, JUDGE, "B", "A")
    assert back is not None
    assert (back.mean.value, back.mean.low) == pytest.approx((-found.mean.value, -found.mean.high))


@pytest.mark.parametrize("seed", range(12))
def test_random_lines_by_hand(seed: int):
    rng = np.random.default_rng(seed)
    points = {name: [(k, rng.normal()) for k in rng.uniform(0.1, 5, size=rng.integers(1, 6))] for name in "AB"}
    of = lines(seed=seed, **points)
    found = ahead(of, JUDGE, "A", "B")
    assert found is not None
    expected = by_hand(*(values.mean(axis=1) for name in "AB" for values in family(of, name)))
    assert found.mean.value == pytest.approx(expected, abs=2e-4)


def test_intervals_resample_all_points_of_both_families_together():
    of = lines(A=A, B=B, n=50, seed=3)
    found = ahead(of, JUDGE, "A", "B")
    data = [*family(of, "A"), *family(of, "B")]
    rng, drawn = np.random.default_rng(5), []
    for _ in range(1500):
        some = rng.integers(0, 50, size=50)
        drawn.append(by_hand(*(values[:, some].mean(axis=1) for values in data)))
    assert found is not None
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (found.mean.low, found.mean.high) == pytest.approx((low, high), abs=0.06 * (high - low))


def test_equal_lines_show_nothing_and_a_lead_is_found():
    """Other strengths of the same line, drawn 40 times: the interval has 0 in it about 19 times of 20."""
    curve = lambda kl: 2 * (1 - math.exp(-kl / 2))  # noqa: E731
    one, other = [[(kl, curve(kl)) for kl in kls] for kls in ((0.5, 1, 2, 3, 4), (0.5, 1, 2, 3, 4.5))]
    covered = 0
    for seed in range(40):
        found = ahead(lines(A=one, B=other, seed=seed, exact=False, n=100), JUDGE, "A", "B")
        assert found is not None
        covered += found.mean.low <= 0 <= found.mean.high
    assert covered >= 35
    claim = Claim(what="frontier", first="A", second="B", judge=JUDGE)
    better = [(kl, curve(kl) + 0.3 * min(kl, 1)) for kl, _ in one]
    assert rule(claim, lines(A=one, B=other, n=200), (), ()).verdict == "not shown"
    assert rule(claim, lines(A=better, B=other, n=200, spread=0.5), (), ()).verdict == "holds"
    assert rule(claim, lines(A=other, B=better, n=200, spread=0.5), (), ()).verdict == "does not hold"
    near = replace(claim, margin=0.4)
    assert rule(near, lines(A=other, B=better, n=200, spread=0.5), (), ()).verdict == "holds"


def test_going_farther_is_no_lead():
    """Twice the weight gives twice the score at twice the distance: single points differ, and the lines do not."""
    of = lines(A=[(1, 1), (2, 2)], B=[(2, 2), (4, 4)], n=200, spread=0.2)
    assert of.row("B 1").scores[JUDGE] > of.row("A 1").scores[JUDGE]
    claim = Claim(what="frontier", first="B", second="A", judge=JUDGE)
    assert rule(claim, of, (), ()).verdict == "not shown"
    assert rule(Claim(what="above", first="B 1", second="A 1", judge=JUDGE), of, (), ()).verdict == "holds"


def test_neither_the_order_of_points_nor_that_of_prompts_matters():
    of = lines(A=A, B=B)
    found = ahead(of, JUDGE, "A", "B")
    base, *others = of.measured
    assert ahead(replace(of, measured=(base, *reversed(others))), JUDGE, "A", "B") == found
    order = np.random.default_rng(1).permutation(60).tolist()

    def shuffled(row: Measured) -> Measured:
        kl, scores = (tuple(values[i] for i in order) for values in (row.kl or (), row.scores[JUDGE]))
        return replace(row, kl=kl, scores={JUDGE: scores})

    again = ahead(replace(of, measured=tuple(map(shuffled, of.measured))), JUDGE, "A", "B")
    assert found is not None
    assert again is not None
    assert again.mean.value == pytest.approx(found.mean.value)
    assert [e.value for e in again.at.values()] == pytest.approx([e.value for e in found.at.values()])
    width = found.mean.high - found.mean.low
    assert (again.mean.low, again.mean.high) == pytest.approx((found.mean.low, found.mean.high), abs=0.1 * width)


def test_a_base_that_is_drawn_colder_is_where_lines_begin():
    of = lines(A=[(2, 2), (3, 3)], B=[(2, 1), (4, 2)])
    cold = replace(of.measured[0], kl=(1.0,) * 60)
    found = ahead(replace(of, measured=(cold, *of.measured[1:])), JUDGE, "A", "B")
    assert found is not None
    assert (found.low, found.high) == pytest.approx((1, 3))


# --- what has no line ------------------------------------------------------------------------------------------


def test_what_has_no_line_is_said():
    of = lines(A=A, B=B, C=[(1, 1)], D=[(1, 1), (2, 1)], E=[(1, 1), (2, 2)])
    change: dict[str, dict[str, Any]] = {
        "C 0": {"kl": None},
        "D 0": {"weights": {"x": 2.0, "y": 0.0}},
        "D 1": {"weights": {"x": 1.0, "y": 1.0}},
        "E 0": {"weights": {"x": 1.0, "y": 3.0}},
        "E 1": {"weights": {"x": 0.5, "y": 1.5}},
        "B 1": {"steers_another": True},
    }
    of = replace(of, measured=tuple(replace(row, **change.get(row.name, {})) for row in of.measured))
    found = make_frontier(of, JUDGE)
    assert {line.family: line.points for line in found.lines} == {
        "A": ("base", "A 0", "A 1", "A 2"),
        "B": ("base", "B 0"),
        "E": ("base", "E 0", "E 1"),
    }
    assert found.absent == {
        "C 0": "its KL is not known",
        "B 1": "steers another base",
        "D": "its methods differ in the mix of their weights (see the fronts)",
    }
    assert [(lead.first, lead.second) for lead in found.leads] == [("A", "E")]  # not of single points
    shown = figures(of, recipe(of, [JUDGE]))
    (plot,) = (plot for plot in plots(shown) if "KL from the base" in plot.alt)
    (sheet,) = (sheet for sheet in sheets(shown) if sheet.key == "equal-kl")
    for text in (plot.caption, sheet.note):
        assert "C 0, its KL is not known" in text
        assert "B 1, steers another base" in text
    assert "B 1" not in plot.alt
    assert "(from its own base)" in str([s.rows for s in sheets(shown) if s.key == "quality"])
    nowhere = replace(of, measured=(replace(of.measured[0], kl=None), *of.measured[1:]))  # a base without chance
    assert make_frontier(nowhere, JUDGE).lines == ()
    assert ahead(nowhere, JUDGE, "A", "B") is None
    json.dumps(record(figures(nowhere, recipe(nowhere, [JUDGE]))), allow_nan=False)


def test_a_bound_is_said_and_shows_no_lead_over_it():
    of = lines(A=[(1, 2), (2, 4)], B=[(1, 1), (2, 2)], n=200, spread=0.3)
    bound = {"B 0": 1.0, "B 1": 2.0}
    of = replace(
        of,
        measured=tuple(
            replace(row, kl=None, kl_bound=bound[row.name]) if row.name in bound else row for row in of.measured
        ),
    )
    over = rule(Claim(what="frontier", first="A", second="B", judge=JUDGE), of, (), ())
    behind = rule(Claim(what="frontier", first="B", second="A", judge=JUDGE), of, (), ())
    assert over.estimate is not None
    assert over.estimate.low > 0
    assert (over.verdict, behind.verdict, over.bounded) == ("not shown", "not shown", ("B",))
    level = rule(Claim(what="frontier", first="B", second="A", judge=JUDGE, margin=3), of, (), ())
    assert level.verdict == "holds"  # it is no worse than it looks
    shown = figures(of, replace(recipe(of, [JUDGE]), claims=(over.claim,)))
    text = {sheet.key: str(sheet.rows) for sheet in sheets(shown)}
    assert "B (≤)" in text["equal-kl"]
    assert "up to KL 2.00; the KL of B is a bound" in text["claims"]
    assert "A is better than B at equal KL (truth)" in text["claims"]


# --- fronts at equal KL ----------------------------------------------------------------------------------------


def two_fronts(n: int = 80, spread: float = 0.3) -> Results:
    """Gains (objective x, objective y) at KL: A far away, B nearer by, on the same rays of gain per nat."""
    rng = np.random.default_rng(2)
    points = {"A 0": (4, 0, 4), "A 1": (0, 4, 4), "A 2": (2, 2, 3)}
    points |= {"B 0": (2, 0, 2), "B 1": (0, 2, 2), "B 2": (1, 1, 1.5)}
    rows = [measured("base", {o: centred(rng, n, spread) + 7 for o in "xy"}, n, kl=(0.0,) * n)]
    for name, (x, y, kl) in points.items():
        scores = {"x": centred(rng, n, spread) + 7 + x, "y": centred(rng, n, spread) + 7 + y}
        rows.append(measured(name, scores, n, family=name[0], kl=tuple(kl + centred(rng, n, 0.1))))
    return results(*rows)


def test_hypervolumes_at_equal_kl_by_hand():
    of = two_fronts()
    (lead,) = make_fronts(of, "xy")[0].leads
    assert lead.difference.value == pytest.approx(4 - 1)
    assert lead.at_equal_kl is not None
    assert lead.at_equal_kl.value == pytest.approx((4 / 3) ** 2 - 1, abs=0.01)  # A 2 at ⅔ of its way, B as it is
    longer = hypervolume_lead(of, "xy", "A", "B", margin=0.5)
    assert longer is not None
    assert longer.at_equal_kl is not None
    assert longer.at_equal_kl.value == pytest.approx((4 / 3) ** 2 - 0.5, abs=0.01)
    unknown = replace(of, measured=(*of.measured[:-1], replace(of.measured[-1], kl=None)))
    (lead,) = make_fronts(unknown, "xy")[0].leads
    assert lead.at_equal_kl is None
    claim = Claim(what="front", first="A", second="B", equal_kl=True)
    assert rule(claim, of, (), "xy").verdict == "holds"
    assert rule(claim, unknown, (), "xy").verdict == "not shown"
    bound = replace(of, measured=(*of.measured[:-1], replace(of.measured[-1], kl=None, kl_bound=1.5)))
    ruling = rule(claim, bound, (), "xy")
    assert (ruling.verdict, ruling.bounded) == ("not shown", ("B",))


def test_the_same_gain_per_nat_is_no_better_front():
    of, rng = two_fronts(), np.random.default_rng(4)
    far = [replace(row, kl=tuple(4 + centred(rng, 80, 0.1))) for row in of.measured if row.family == "A"]
    twins = [replace(row, name=row.name.replace("A", "C"), family="C") for row in far]
    near = [
        replace(
            row,
            scores={o: tuple(np.array(values) / 2 + 3.5) for o, values in row.scores.items()},
            kl=tuple(np.array(row.kl) / 2),
        )
        for row in far
    ]
    of = results(of.measured[0], *twins, *near)
    claim = Claim(what="front", first="C", second="A")
    assert rule(claim, of, (), "xy").verdict == "holds"
    assert rule(replace(claim, equal_kl=True), of, (), "xy").verdict == "not shown"


# --- recipes ---------------------------------------------------------------------------------------------------

REWARD = {"base": "m", "rewards": {"a": "x"}}
FAMILIES: list[dict[str, Any]] = [
    {"kind": "sample", "name": "base", "model": "m"},
    {"kind": "sample", "name": "T=0.5", "family": "cooled", "model": "m", "sampling": {"temperature": 0.5}},
    {"kind": "sample", "name": "T=0.3", "family": "cooled", "model": "m", "sampling": {"temperature": 0.3}},
    *({"kind": "sample", "name": f"DPO {b}", "family": "DPO", "model": f"dpo-{b}"} for b in (0.1, 0.5)),
    *({"kind": "best-of-n", "name": f"best of {n}", "family": "best", "n": n, **REWARD} for n in (2, 8)),
    *({"kind": "args", "name": f"ARGS {t}", "family": "ARGS", "temperature": t, **REWARD} for t in (0.7, 1.0)),
    {"kind": "args", "name": "ARGS, stronger", "family": "ARGS", "weights": [{"a": 2}, {"a": 4}], **REWARD},
    {"kind": "soup", "base": "m", "policies": {"a": "p"}, "family": "soup", "weights": [{"a": 0.5}, {"a": 1}]},
    {"kind": "soup", "name": "twice", "base": "m", "policies": {"a": "p"}, "family": "soup", "weights": {"a": 2}},
]


def read(tmp_path: Path, claim: dict[str, Any], **changes: Any) -> Recipe:
    path = tmp_path / "recipe.toml"
    judges = [{"name": "truth", "kind": "function", "source": "m:f"}, {"name": "llm", "kind": "llm", "source": "x"}]
    table = {"prompts": {"data": "p", "count": 4}, "reference": "base", "methods": FAMILIES, "judges": judges}
    path.write_text(tomli_w.dumps({"tiny": {**table, "claims": [claim], **changes}}))
    return load_recipe(path, "tiny")


def test_a_family_is_any_knob_turned(tmp_path: Path):
    claim = {"what": "frontier", "first": "cooled", "second": "best", "judge": "truth", "margin": 0.5}
    found = read(tmp_path, claim)
    sizes = Counter(method.family for method in found.methods)
    assert sizes == {"base": 1, "cooled": 2, "DPO": 2, "best": 2, "ARGS": 4, "soup": 3}
    assert found.claims == (Claim(what="frontier", first="cooled", second="best", judge="truth", margin=0.5),)


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ({"first": "base"}, "needs two methods at least in the family 'base', beside the base: give it several"),
        ({"first": "T=0.5"}, "there is no family 'T=0.5'; the recipe has ARGS, DPO"),
        ({"judge": "llm"}, "needs a judge that scores single replies, and 'llm' compares two"),
        ({"judge": ""}, "needs a judge"),
        ({"share": 0.5}, "has a share"),
        ({"equal_kl": True}, "has equal_kl, which is for front"),
        ({"equal_kl": "yes"}, "equal_kl is 'yes'"),
    ],
)
def test_claims_that_do_not_hold_together_are_refused(claim: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, {"what": "frontier", "first": "cooled", "second": "best", "judge": "truth", **claim})


# --- judges side by side ---------------------------------------------------------------------------------------


def test_agreement_of_one_prompt_is_kendalls_tau():
    rng = np.random.default_rng(0)
    for _ in range(20):
        one, other, lengths = rng.integers(0, 4, size=(3, 6))
        rows = [
            measured(f"m{i}", {"a": [a, a], "b": [b, b]}, 2, tokens=(int(length),) * 2)
            for i, (a, b, length) in enumerate(zip(one, other, lengths, strict=True))
        ]
        found = {(a.first, a.second): a for a in agreements(results(*rows), ["a", "b"])}
        assert set(found) == {("a", "b"), ("a", LENGTH), ("b", LENGTH)}
        for key, pair in zip(found, ((one, other), (one, lengths), (other, lengths)), strict=True):
            assert found[key].tau.value == pytest.approx(kendalltau(*pair).statistic, nan_ok=True)
            assert found[key].pairs == 2 * 15
    assert agreements(results(measured("base", {"a": [1.0, 2.0]}, 2)), ["a"]) == ()


def test_agreement_is_within_prompts_and_its_interval_over_them():
    """Hard prompts get low scores by both, which is no agreement on methods."""
    n, rng = 80, np.random.default_rng(1)
    hard = rng.normal(scale=20, size=n)
    scores = rng.normal(size=(2, 5, n))
    scores[1, :, ::2] += scores[0, :, ::2]
    rows = [measured(f"m{i}", {"a": hard + scores[0, i], "b": hard + scores[1, i]}, n) for i in range(5)]
    found = agreements(results(*rows), ["a", "b"])[0].tau
    by_prompt = np.array([kendalltau(scores[0, :, i], scores[1, :, i]).statistic for i in range(n)])
    assert found.value == pytest.approx(by_prompt.mean())  # without ties it is the mean of the prompts' own
    drawn = [by_prompt[rng.integers(0, n, size=n)].mean() for _ in range(3000)]
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.02)
    assert found.n == n


# --- accuracy and behaviour ------------------------------------------------------------------------------------


def rewards(accuracies: dict[str, float], slopes: dict[str, float], n: int = 100) -> Results:
    """ARMs that gain so much for each nat, at strengths that differ."""
    points = {name: [(kl, slope * kl) for kl in (1 + i, 2 + i)] for i, (name, slope) in enumerate(slopes.items())}
    of = lines(n=n, spread=0.1, **points)
    trained = tuple(
        Trained(
            name=name,
            kind="arm",
            loss="arm",
            metrics={"eval_accuracy": rate, "eval_accuracy_low": rate, "eval_accuracy_high": rate, "eval_pairs": 50.0},
        )
        for name, rate in accuracies.items()
    )
    rows = tuple(replace(row, reward=row.family) if row.family in slopes else row for row in of.measured)
    return replace(of, measured=rows, trained=trained)


def test_rewards_by_what_they_know_and_by_what_they_do():
    accuracies = {"p": 0.6, "q": 0.7, "r": 0.8, "unused": 0.9}
    slopes = {"p": 0.5, "q": 1.5, "r": 1.0}
    of = rewards(accuracies, slopes)
    found = behaviour(of, JUDGE)
    assert found is not None
    assert found.kl == pytest.approx(2)  # as far as the first one goes
    gains = {name: gain.value for name, gain in found.gains.items()}
    assert gains == pytest.approx({name: 2 * slope for name, slope in slopes.items()})
    expected = kendalltau(list(accuracies.values())[:3], list(slopes.values())).statistic
    assert {kind: tau.value for kind, tau in found.taus.items()} == {"reward accuracy": pytest.approx(expected)}
    shown = {sheet.key: sheet for sheet in sheets(figures(of, recipe(of, [JUDGE])))}["trained"]
    assert shown.head[3:-1] == ("held-out pairs", "policy accuracy", "truth over the base, KL 2.00")
    assert shown.rows[0][:3] == ("p", "arm", "arm –")
    assert shown.rows[0][5].startswith("1.00 [")
    assert shown.rows[3][5] == "–"
    assert "Kendall's τ over 3 rewards of truth and reward accuracy 0.33" in shown.note
    two = behaviour(rewards({"p": 0.6, "q": 0.7}, {"p": 0.5, "q": 1.5}), JUDGE)
    assert two is not None
    assert two.taus == {}
    assert behaviour(lines(A=A), JUDGE) is None


def test_of_what_is_trained_through_a_policy_both_accuracies_are_told():
    of = rewards({"p": 0.6}, {"p": 0.5})
    ends = {f"{name}_{end}": 0.5 for name in ("eval_accuracy", "eval_reward_accuracy") for end in ("low", "high")}
    product = replace(
        of.trained[0],
        loss="product",
        metrics={"eval_accuracy": 0.75, "eval_reward_accuracy": 0.5, "eval_pairs": 40.0, **ends},
    )
    wish = Trained(name="wish", kind="arm", loss="distil", metrics={"eval_loss": 0.1, "eval_kl_base": 0.4})
    of = replace(of, trained=(product, wish))
    rows = {sheet.key: sheet for sheet in sheets(figures(of, recipe(of, [JUDGE])))}["trained"].rows
    assert rows[0][2:5] == ("product –", "0.500 [0.500, 0.500] (n=40)", "0.750 [0.500, 0.500] (n=40)")
    assert rows[1][2:5] == ("distil 0.100", "KL(wished ‖ guided) 0.1000 nats per token, KL(wished ‖ base) 0.4000", "–")
