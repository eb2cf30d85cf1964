"""Figures of a comparison: against sums by hand, inclusion and exclusion, and loops that resample naively."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from builders.invented import measured, one_preference, recipe, results, several_objectives
from genarm.errors import ConfigError
from genarm.lab.evaluation.claims import rule
from genarm.lab.evaluation.costs import times
from genarm.lab.evaluation.figures import figures, record
from genarm.lab.evaluation.fronts import hypervolume, hypervolume_lead, make_fronts, preference
from genarm.lab.evaluation.gaps import recovered
from genarm.lab.evaluation.recipe import Claim, Gap
from genarm.lab.evaluation.recipe_file import load_recipe
from genarm.lab.evaluation.results import Cost, Results, Verdicts
from genarm.statistics import mean, mean_difference, win_rate

JUDGE = "truth"


def scored(*, n: int = 4, **scores: Any) -> Results:
    """A run of methods with these scores; a number stands for one that all replies get."""
    columns = {name: np.broadcast_to(np.asarray(values, dtype=float), (n,)) for name, values in scores.items()}
    return results(*(measured(name, {JUDGE: column.tolist()}, n) for name, column in columns.items()))


def around(level: float, n: int = 100) -> list[float]:
    """Scores whose mean is `level`, spread by 1."""
    return [level + (1 if i % 2 else -1) for i in range(n)]


# --- prompt by prompt ------------------------------------------------------------------------------------------


def test_the_higher_score_wins():
    of = scored(base=[0, 1, 2, 3], other=[1, 1, 1, 4])
    assert of.outcomes(JUDGE, "other", "base") == ("win", "tie", "lose", "win")
    assert of.outcomes("nobody", "other", "base") is None
    assert of.quality(JUDGE, "other") == (1, 1, 1, 4)


def test_verdicts_are_read_from_both_sides():
    rows = [measured(name, {}, 4) for name in ("base", "other")]
    verdicts = Verdicts(judge="llm", first="base", second="other", outcomes=("win", "tie", "lose", None))
    of = results(*rows, verdicts=(verdicts,))
    assert of.outcomes("llm", "base", "other") == ("win", "tie", "lose", None)
    assert of.outcomes("llm", "other", "base") == ("lose", "tie", "win", None)
    assert of.quality("llm", "base") == (0.5,) * 4  # the reference
    assert of.quality("llm", "other") == pytest.approx((0, 0.5, 1, math.nan), nan_ok=True)


def test_comparisons_are_the_recipes_and_those_with_the_reference_each_once():
    of, by = one_preference()
    found = figures(of, by).comparisons
    pairs = list(dict.fromkeys((c.first, c.second) for c in found))
    others = [(name, "DPO") for name in ("base", "ARGS", "Transfer-Q", "Best-of-4")]
    assert pairs == [("GenARM", "DPO"), ("GenARM", "ARGS"), *others]
    assert len({(c.judge, c.first, c.second) for c in found}) == len(found)
    assert [c.judge for c in found if c.second == "ARGS"] == ["truth"]  # the other judge was not asked
    first = found[0]
    mine, theirs = (np.array(of.row(name).scores["truth"]) for name in ("GenARM", "DPO"))
    assert (first.rate.win, first.rate.tie, first.rate.lose) == tuple(
        int(np.sum(np.sign(mine - theirs) == sign)) for sign in (1, 0, -1)
    )
    assert first.difference == mean_difference(mine.tolist(), theirs.tolist())
    (verdicts,) = (v for v in of.verdicts if v.first == "GenARM")
    assert found[1].rate == win_rate(verdicts.outcomes)
    assert found[1].rate.unparsed > 0
    assert found[1].difference is None


def test_rows_are_means_with_costs_per_token():
    of, by = one_preference()
    row = next(row for row in figures(of, by).rows if row.name == "Transfer-Q")
    assert row.scores["truth"] == mean(of.row("Transfer-Q").scores["truth"])
    assert row.length.value == pytest.approx(np.mean(of.row("Transfer-Q").tokens))
    assert row.seconds_per_128 == pytest.approx(128 * 0.9)
    assert row.forwards == pytest.approx({"base": 1, "policy": 200, "reward": 10})
    assert row.times_base.forwards == pytest.approx(211)
    assert row.kl is None
    best = next(row for row in figures(of, by).rows if row.name == "Best-of-4")
    assert best.kl_bound == 0.64


def test_costs_as_multiples_batch_by_batch():
    tokens = (2,) * 100 + (4,) * 50  # batches of 200 and of 200 tokens
    fast = Cost(seconds=(1.0, 2.0), tokens=400, forwards={"base": 400}, positions={"base": 900})
    slow = Cost(seconds=(4.0, 4.0), tokens=400, forwards={"base": 400, "arm": 400}, positions={"base": 900, "arm": 900})
    of = results(
        measured("fast", {}, 150, tokens=tokens, cost=fast), measured("slow", {}, 150, tokens=tokens, cost=slow)
    )
    found = times(of, "slow", "fast")
    assert (found.forwards, found.seconds) == pytest.approx((2, 8 / 3))
    assert (found.fastest, found.slowest) == pytest.approx((2, 4))
    nothing = results(measured("mute", {}, 2, tokens=(0, 0)), measured("other", {}, 2))
    assert math.isnan(times(nothing, "other", "mute").seconds)


# --- gaps ------------------------------------------------------------------------------------------------------


def test_shares_of_a_gap_by_hand():
    of = scored(base=[0, 1, 0, 1], middle=[2, 2, 1, 2], top=[3, 3, 2, 2], beyond=4)
    found = recovered(of, Gap(bottom="base", top="top", methods=("base", "middle", "beyond"), judge=JUDGE))
    assert found is not None
    assert found.gap.value == pytest.approx(2)
    shares = [share.value for share in found.shares.values() if share is not None]
    assert shares == pytest.approx([0, 1.25 / 2, 3.5 / 2])


def test_a_share_is_undefined_where_the_gap_may_be_none():
    of = scored(n=100, base=around(0), level=[0.0] * 100, below=-2)
    for top in ("level", "below"):
        found = recovered(of, Gap(bottom="base", top=top, methods=("base",), judge=JUDGE))
        assert found is not None
        assert found.shares == {"base": None}
    assert recovered(of, Gap(bottom="base", top="level", methods=(), judge="nobody")) is None


def test_gaps_of_a_judge_that_only_compares_are_of_win_rates():
    of, _ = one_preference()
    found = recovered(of, Gap(bottom="base", top="DPO", methods=("GenARM",), judge="GPT-4"))
    assert found is not None
    assert found.gap.value == pytest.approx(0.5 - win_rate(of.outcomes("GPT-4", "base", "DPO") or ()).rate)
    base, guided = (np.array(of.quality("GPT-4", name)) for name in ("base", "GenARM"))
    both = ~np.isnan(base + guided)
    assert 0 < both.sum() < np.sum(~np.isnan(guided))
    share = found.shares["GenARM"]
    assert share is not None
    assert share.n == both.sum()
    assert share.value == pytest.approx((guided[both].mean() - base[both].mean()) / (0.5 - base[both].mean()))


def silent_about_the_hard(n: int = 100) -> Results:
    """Families A and B that are as good as each other; one of two judges has no verdict on B's hard half."""
    rng, hard = np.random.default_rng(0), np.arange(n) % 2 == 0
    good = np.where(rng.random(n) < np.where(hard, 0.5, 0.9), "win", "lose").tolist()
    half = tuple(None if h else outcome for h, outcome in zip(hard, good, strict=True))
    verdicts = tuple(
        Verdicts(judge=judge, first=name, second="base", outcomes=outcomes)
        for judge in ("helpful", "harmless")
        for name, outcomes in (("A", tuple(good)), ("B", half))
    )
    return results(*(measured(name, {}, n) for name in ("base", "A", "B")), verdicts=verdicts)


def test_verdicts_that_cannot_be_read_favour_nobody():
    of = silent_about_the_hard()
    found = recovered(of, Gap(bottom="base", top="A", methods=("B",), judge="helpful"))
    assert found is not None
    share = found.shares["B"]
    assert share is not None
    assert (share.value, share.n) == (pytest.approx(1), 50)
    lead = hypervolume_lead(of, ("helpful", "harmless"), "B", "A")
    assert lead is not None
    assert (lead.difference.value, lead.difference.n) == (pytest.approx(0), 50)


def test_a_claim_means_one_gap(tmp_path: Path):
    claim = {"what": "gap", "first": "a", "second": "top", "judge": "truth", "share": 0.5}
    gaps = [{"bottom": bottom, "top": "top", "methods": ["a"], "judge": "truth"} for bottom in ("base", "prompted")]
    methods = [{"kind": "sample", "name": name, "model": "m"} for name in ("base", "prompted", "a", "top")]
    table = {
        **{"seed": 1, "reference": "base", "prompts": {"data": "p.jsonl", "count": 4}, "methods": methods},
        **{"judges": [{"name": "truth", "kind": "function", "source": "m:f"}], "gaps": gaps, "claims": [claim]},
    }
    (tmp_path / "r.toml").write_text(tomli_w.dumps({"tiny": table}))
    with pytest.raises(ConfigError, match=r"needs one entry of gaps .* begin at 'base' and 'prompted'"):
        load_recipe(tmp_path / "r.toml", "tiny")


# --- fronts ----------------------------------------------------------------------------------------------------


def by_inclusion_and_exclusion(points: np.ndarray) -> float:
    """The volume of the union of the boxes between the origin and each point."""
    boxes = np.clip(points, 0, None)
    subsets = (chosen for size in range(1, len(boxes) + 1) for chosen in combinations(boxes, size))
    return sum((-1) ** (len(chosen) + 1) * np.prod(np.min(chosen, axis=0)) for chosen in subsets)


@pytest.mark.parametrize(
    ("points", "volume"),
    [
        ([[3, 1], [2, 2], [1, 3]], 6),
        ([[3, 1], [1, 1]], 3),  # dominated
        ([[3, -1], [-2, -2]], 0),  # beyond the reference point in one objective, or in none
        ([[1, 2, 3], [3, 2, 1]], 6 + 6 - 2),
        ([[1, 1, 1], [2, 2, 2], [0, 9, 9]], 8),
    ],
)
def test_hypervolume_by_hand(points: list[list[float]], volume: float):
    assert hypervolume(np.array([points], dtype=float)) == pytest.approx([volume])


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_hypervolume_by_inclusion_and_exclusion(objectives: int):
    rng = np.random.default_rng(objectives)
    points = rng.normal(0.3, 1, size=(30, 6, objectives))
    assert hypervolume(points) == pytest.approx([by_inclusion_and_exclusion(some) for some in points])
    points[1, 2, 0] = math.nan
    assert [*np.isnan(hypervolume(points))] == [i == 1 for i in range(30)]


def two_families(n: int = 40, spread: float = 1.0) -> Results:
    """The base at (1, 2); family A at gains (3, 1), (2, 2), (1, 1); family B at (2, 1)."""
    rng = np.random.default_rng(1)
    noise = rng.normal(scale=spread, size=(n, 4, 2))
    noise -= noise.mean(axis=0)  # the means are exact
    levels = {"base": (0, 0), "A1": (3, 1), "A2": (2, 2), "A3": (1, 1)}
    weights = {"A1": {"x": 2.0, "y": 0.0}, "A2": {"x": 1.0, "y": 1.0}, "A3": {"x": 1.0, "y": 3.0}}
    rows = [
        measured(
            name,
            {o: (noise[:, k, j] + level[j] + (1, 2)[j]).tolist() for j, o in enumerate("xy")},
            n,
            family=name[0] if name != "base" else name,
            weights=weights.get(name, {}),
        )
        for k, (name, level) in enumerate(levels.items())
    ]
    b = measured("B1", {"x": [3.0] * n, "y": [3.0] * n}, n, family="B")
    return results(*rows, b)


def test_a_front_by_hand():
    scores, wins = make_fronts(two_families(), ("x", "y"))
    assert (scores.scale, wins.scale) == ("mean score", "win rate")
    assert scores.reference == pytest.approx({"x": 1, "y": 2})
    assert [curve.family for curve in scores.curves] == ["A", "B"]
    a, b = scores.curves
    assert [point.on_front for point in a.points] == [True, True, False]
    assert [p.value for p in a.points[0].values.values()] == pytest.approx([4, 3])
    assert a.hypervolume.value == pytest.approx(5)
    assert b.hypervolume.value == pytest.approx(2)
    assert a.mip is not None
    assert a.mip.value == pytest.approx((4 + (3 + 4) / 2 + (2 + 3 * 3) / 4) / 3)
    assert b.mip is None  # without weights
    assert scores.leads == ()  # B has a single point


def test_a_front_of_win_rates_is_against_the_base():
    of = two_families()
    _, wins = make_fronts(of, ("x", "y"))
    rates = [[win_rate(of.outcomes(o, name, "base") or ()).rate for o in "xy"] for name in ("A1", "A2", "A3")]
    assert [[v.value for v in p.values.values()] for p in wins.curves[0].points] == pytest.approx(np.array(rates))
    assert wins.reference == {"x": 0.5, "y": 0.5}
    volume = by_inclusion_and_exclusion(np.array(rates) - 0.5)
    assert wins.curves[0].hypervolume.value == pytest.approx(volume)


def test_judges_that_only_compare_have_fronts_of_win_rates_alone():
    rng = np.random.default_rng(2)
    rows = [measured(name, {}, 60, family=name[0]) for name in ("base", "A1", "A2")]
    verdicts = tuple(
        Verdicts(judge=o, first=name, second="base", outcomes=tuple(rng.choice(["win", "win", "lose"], size=60)))
        for o in "xy"
        for name in ("A1", "A2")
    )
    of = results(*rows, verdicts=verdicts)
    (front,) = make_fronts(of, ("x", "y"))
    assert front.scale == "win rate"
    assert hypervolume_lead(of, ("x", "y"), "A", "A") is not None
    assert make_fronts(of, ("x", "z")) == ()
    assert hypervolume_lead(of, ("x", "z"), "A", "A") is None


def test_intervals_of_hypervolumes_resample_prompts_with_the_base():
    of = two_families(spread=2.0)
    rng = np.random.default_rng(3)
    data = np.array([[of.row(name).scores[o] for o in "xy"] for name in ("A1", "A2", "A3", "base")])
    drawn = []
    for _ in range(2000):
        means = data[:, :, rng.integers(0, 40, size=40)].mean(axis=-1)
        drawn.append(by_inclusion_and_exclusion(means[:3] - means[3]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    found = make_fronts(of, ("x", "y"))[0].curves[0].hypervolume
    assert (found.low, found.high) == pytest.approx((low, high), rel=0.04)


def test_leads_are_differences_on_the_same_resamples():
    of, by = several_objectives(3)
    (front, _) = make_fronts(of, by.fronts)
    (lead,) = front.leads
    volumes = {curve.family: curve.hypervolume.value for curve in front.curves}
    assert lead.difference.value == pytest.approx(volumes["GenARM"] - volumes["Rewarded Soups"])
    back = hypervolume_lead(of, by.fronts, "Rewarded Soups", "GenARM")
    assert back is not None
    assert (back.difference.low, back.difference.high) == pytest.approx((-lead.difference.high, -lead.difference.low))
    same = hypervolume_lead(of, by.fronts, "GenARM", "GenARM", margin=0.25)
    assert same is not None
    assert same.difference.value == pytest.approx(0.25 * volumes["GenARM"])


def test_preferences_add_up_to_one():
    assert preference({"x": 1.5, "y": 0.5}, "xy") == pytest.approx((0.75, 0.25))
    assert preference({"x": 1.0, "z": 1.0}, "xy") is None
    assert preference({"x": 0.0, "y": 0.0}, "xy") is None


# --- claims ----------------------------------------------------------------------------------------------------


def verdict(of: Results, claim: Claim, gaps: tuple[Gap, ...] = (), objectives: tuple[str, ...] = ()) -> str:
    made = [found for gap in gaps if (found := recovered(of, gap)) is not None]
    return rule(claim, of, made, objectives).verdict


@pytest.mark.parametrize(
    ("what", "margin", "level", "expected"),
    [
        ("above", 0.0, 0.5, "holds"),
        ("above", 0.0, 0.05, "not shown"),
        ("above", 0.0, -0.5, "does not hold"),
        ("level", 0.4, -0.1, "holds"),
        ("level", 0.4, -0.45, "not shown"),
        ("level", 0.4, -0.8, "does not hold"),
        ("level", 0.4, 0.5, "holds"),
    ],
)
def test_claims_about_scores(what: str, margin: float, level: float, expected: str):
    of = scored(n=100, base=0, other=around(level))  # an interval of about ±0.2
    assert verdict(of, Claim(what=what, first="other", second="base", judge=JUDGE, margin=margin)) == expected


def test_a_method_is_not_above_itself():
    """Nor shown to be level, by scores without bounds: how far apart other replies would be nobody knows."""
    of = scored(n=100, base=around(0), twin=around(0))
    for what in ("above", "level"):
        assert verdict(of, Claim(what=what, first="twin", second="base", judge=JUDGE, margin=0.1)) == "not shown"


@pytest.mark.parametrize("direct", [True, False])
def test_a_few_verdicts_that_are_all_ties_show_nothing(direct: bool):
    """Between the two, or of each against the reference: resampling alone would be sure of a difference of 0."""
    rows = [measured(name, {}, 5) for name in ("base", "A", "B")]
    pairs = [("A", "B")] if direct else [("A", "base"), ("B", "base")]
    verdicts = tuple(Verdicts(judge="llm", first=a, second=b, outcomes=("tie",) * 5) for a, b in pairs)
    claim = Claim(what="level", first="A", second="B", judge="llm", margin=0.05)
    assert verdict(results(*rows, verdicts=verdicts), claim) == "not shown"


@pytest.mark.parametrize("n", [2, 100])
def test_prompts_that_all_say_the_same_show_nothing_of_scores_without_bounds(n: int):
    """7 nats apart on all of them."""
    of = scored(n=n, base=0.0, A=7.0, B=0.0)
    for what in ("above", "level"):
        assert verdict(of, Claim(what=what, first="A", second="B", judge=JUDGE, margin=0.5)) == "not shown"
    found = recovered(of, Gap(judge=JUDGE, bottom="base", top="A", methods=("B",)))
    assert found is not None
    assert found.gap.value == 7
    assert math.isnan(found.gap.low)
    assert found.shares == {"B": None}


def test_claims_about_verdicts_use_the_direct_ones_first():
    rows = [measured(name, {}, 60) for name in ("base", "A", "B")]

    def says(first: str, second: str, wins: int) -> Verdicts:
        return Verdicts(judge="llm", first=first, second=second, outcomes=("win",) * wins + ("lose",) * (60 - wins))

    against_base = (says("A", "base", 50), says("B", "base", 20))
    claim = Claim(what="above", first="A", second="B", judge="llm")
    indirect = rule(claim, results(*rows, verdicts=against_base), (), ())
    assert indirect.verdict == "holds"
    assert indirect.estimate is not None
    assert indirect.estimate.value == pytest.approx(0.5)
    direct = rule(claim, results(*rows, verdicts=(*against_base, says("A", "B", 15))), (), ())
    assert direct.verdict == "does not hold"
    assert direct.estimate is not None
    assert direct.estimate.value == pytest.approx(-0.25)
    assert rule(claim, results(*rows), (), ()).verdict == "not shown"


@pytest.mark.parametrize(("share", "expected"), [(0.5, "holds"), (0.74, "not shown"), (0.9, "does not hold")])
def test_claims_about_gaps(share: float, expected: str):
    of = scored(n=100, base=around(0), top=4, other=around(3))
    gap = Gap(bottom="base", top="top", methods=("other",), judge=JUDGE)
    claim = Claim(what="gap", first="other", second="top", judge=JUDGE, share=share)
    assert verdict(of, claim, gaps=(gap,)) == expected
    none = scored(n=100, base=0, top=around(0), other=around(3))
    assert verdict(none, claim, gaps=(gap,)) == "not shown"


@pytest.mark.parametrize(
    ("first", "second", "margin", "expected"),
    [
        ("GenARM", "Rewarded Soups", 0.0, "holds"),
        ("Rewarded Soups", "GenARM", 0.1, "does not hold"),
        ("Rewarded Soups", "GenARM", 0.6, "holds"),
        ("Rewarded Soups", "GenARM", 0.44, "not shown"),
    ],
)
def test_claims_about_fronts(first: str, second: str, margin: float, expected: str):
    of, by = several_objectives(2)
    claim = Claim(what="front", first=first, second=second, margin=margin)
    assert verdict(of, claim, objectives=by.fronts) == expected


@pytest.mark.parametrize(
    ("seconds", "forwards", "expected"),
    [
        ((1.0, 1.0), 1, "holds"),
        ((1.0, 3.0), 1, "not shown"),  # slower in a batch
        ((3.0, 3.0), 1, "does not hold"),
        ((1.0, 1.0), 2, "does not hold"),
    ],
)
def test_claims_about_costs(seconds: tuple[float, float], forwards: int, expected: str):
    mine = Cost(seconds=seconds, tokens=2000, forwards={"base": 2000 * forwards}, positions={})
    theirs = Cost(seconds=(2.0, 2.0), tokens=2000, forwards={"base": 4000}, positions={})
    of = results(measured("A", {}, 200, cost=mine), measured("B", {}, 200, cost=theirs))
    assert verdict(of, Claim(what="cheaper", first="A", second="B")) == expected


MINIMAL: dict[str, Any] = {
    "prompts": {"data": "prompts.jsonl", "count": 4},
    "reference": "base",
    "methods": [{"kind": "sample", "name": name, "model": "m"} for name in ("base", "other")],
    "judges": [{"name": "truth", "kind": "function", "source": "m:f"}],
    "gaps": [{"bottom": "base", "top": "other", "methods": ["base"], "judge": "truth"}],
}


def read(tmp_path: Path, claim: dict[str, Any], **changes: Any) -> Claim:
    path = tmp_path / "recipe.toml"
    table = {**MINIMAL, "claims": [{"first": "base", "second": "other", **claim}], **changes}
    path.write_text(tomli_w.dumps({"tiny": table}))
    return load_recipe(path, "tiny").claims[0]


def test_claims_are_read(tmp_path: Path):
    assert read(tmp_path, {"what": "gap", "judge": "truth", "share": 0.7}).share == 0.7
    assert read(tmp_path, {"what": "level", "judge": "truth", "margin": 1}).margin == 1
    assert read(tmp_path, {"what": "front"}, fronts=["truth"]).margin == 0
    assert read(tmp_path, {"what": "cheaper"}).judge == ""


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        (
            {"what": "better"},
            "claims.0.what is 'better'; it must be 'above', 'level', 'frontier', 'front', 'cheaper' or 'gap'",
        ),
        ({"what": "above"}, "needs a judge"),
        ({"what": "cheaper", "judge": "truth"}, "has a judge"),
        ({"what": "level", "judge": "truth"}, "needs a margin above 0"),
        ({"what": "level", "judge": "truth", "margin": -1}, "margin is -1; it must be greater than or equal to 0"),
        ({"what": "level", "judge": "truth", "margin": "little"}, "margin is 'little'; it must be a number"),
        ({"what": "above", "judge": "truth", "margin": 0.1}, "has a margin; it does not go with it"),
        ({"what": "cheaper", "share": 0.1}, "has a share; it does not go with it"),
        ({"what": "gap", "judge": "truth"}, "needs a share above 0"),
        ({"what": "gap", "judge": "truth", "share": 0.7, "first": "other"}, "needs one entry of gaps"),
        ({"what": "front"}, "needs fronts"),
        ({"what": "above", "judge": "truth", "first": "nobody"}, "there is no method 'nobody'"),
    ],
)
def test_claims_that_do_not_hold_together_are_refused(tmp_path: Path, claim: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, claim)


# --- all together ----------------------------------------------------------------------------------------------


def test_published_figures_find_ours():
    of, by = one_preference()
    known, unknown, other = figures(of, by).published
    assert [(c.judge, c.first, c.second) for c in known.comparisons] == [
        ("truth", "GenARM", "DPO"),
        ("GPT-4", "GenARM", "DPO"),
    ]
    assert unknown.comparisons == other.comparisons == ()
    two, by_two = several_objectives(2)
    found = figures(two, by_two)
    genarm, morl = found.published
    assert genarm.hypervolume == found.fronts[1].curves[0].hypervolume
    assert morl.hypervolume is None


def test_the_record_is_json_without_numbers_that_are_none():
    rows = [measured(name, {}, 4) for name in ("base", "other")]
    unread = Verdicts(judge="llm", first="other", second="base", outcomes=(None,) * 4)
    of = results(*rows, verdicts=(unread,))
    text = json.dumps(record(figures(of, recipe(of, ["llm"]))), allow_nan=False)
    (comparison,) = json.loads(text)["comparisons"]
    assert comparison["rate"] == {"win": 0, "tie": 0, "lose": 0, "unparsed": 4, "rate": None, "low": None, "high": None}


def test_the_same_results_give_the_same_figures():
    assert record(figures(*several_objectives(2))) == record(figures(*several_objectives(2)))
