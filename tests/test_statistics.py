"""Intervals: known answers, scipy's bootstrap, and how often they cover the truth on simulated data."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from scipy.stats import binomtest, multinomial
from scipy.stats import bootstrap as scipy_bootstrap

from genarm.statistics import Outcome, bootstrap, mean, mean_difference, points, win_rate

SETS = 400
COVERED = (0.92, 0.98)


def test_win_rate_by_hand():
    found = win_rate(["win", "tie", "lose", None, "win", "tie", "win", None])
    assert (found.win, found.tie, found.lose, found.unparsed, found.n) == (3, 2, 1, 2, 6)
    assert found.rate == pytest.approx((3 + 1) / 6)
    assert 0 <= found.low < found.rate < found.high <= 1
    assert str(found).endswith("(n=6, 2 unparsed)")


def test_a_verdict_that_cannot_be_read_is_no_tie():
    read: list[Outcome | None] = ["win"] * 30 + ["lose"] * 10
    with_unread = win_rate(read + [None] * 40)
    without = win_rate(read)
    assert with_unread.rate == without.rate == 0.75
    assert (with_unread.low, with_unread.high) == (without.low, without.high)
    assert math.isnan(points([None])[0])


def test_nothing_to_read():
    found = win_rate([None, None])
    assert (found.n, found.unparsed) == (0, 2)
    assert all(math.isnan(value) for value in (found.rate, found.low, found.high))
    assert str(found) == "– (n=0, 2 unparsed)"


def test_unanimous_verdicts_are_not_certain():
    sure = 0.025 ** (1 / 20)
    wins, ties, losses = (win_rate([outcome] * 20) for outcome in ("win", "tie", "lose"))
    assert (wins.rate, wins.low, wins.high) == pytest.approx((1, sure, 1))
    assert (ties.rate, ties.low, ties.high) == pytest.approx((0.5, sure / 2, 1 - sure / 2))
    assert (losses.rate, losses.low, losses.high) == pytest.approx((0, 0, 1 - sure))


@pytest.mark.parametrize("n", [2, 3, 5, 8, 12])
def test_unanimous_verdicts_leave_what_could_have_made_them(n: int):
    """Exactly: every chance of a verdict that gives n times the same with more than 5% is in the interval."""
    for outcome, worth in (("win", 1.0), ("lose", 0.0)):
        found = win_rate([outcome] * n)  # type: ignore[list-item]
        for chance in np.linspace(0, 1, 201):
            if chance**n > 0.05:
                assert found.low <= worth * chance + (1 - worth) * (1 - chance) <= found.high
    ties = win_rate(["tie"] * n)
    assert ties.low < 0.5 < ties.high


@pytest.mark.parametrize("n", [2, 5, 20, 300])
def test_win_rates_without_ties_have_wilsons_interval(n: int):
    for wins in range(1, n):
        found = win_rate(["win"] * wins + ["lose"] * (n - wins))
        wilson = binomtest(wins, n).proportion_ci(method="wilson")
        assert (found.low, found.high) == pytest.approx((wilson.low, wilson.high), abs=1e-6)


@pytest.mark.parametrize("n", [5, 12, 20])
def test_win_rates_cover_the_truth_exactly(n: int):
    """Every outcome of n prompts, weighed by its chance under many truths, near certain ones and many ties too."""
    cases = [(win, lose) for win in range(n + 1) for lose in range(n + 1 - win)]
    rates = [win_rate(["win"] * win + ["lose"] * lose + ["tie"] * (n - win - lose)) for win, lose in cases]  # type: ignore[list-item]
    low, high = (np.array([getattr(rate, end) for rate in rates]) for end in ("low", "high"))
    counts = [(win, lose, n - win - lose) for win, lose in cases]
    shares = []
    for win in np.linspace(0.02, 0.98, 13):
        for tie in np.linspace(0, 1 - win, 9):
            truth = win + tie / 2
            chances = multinomial.pmf(counts, n, [win, 1 - win - tie, tie])
            shares.append(chances[(low - 1e-9 <= truth) & (truth <= high + 1e-9)].sum())
    assert min(shares) > 0.89
    assert np.mean(shares) > 0.95


@pytest.mark.parametrize("value", [0.0, 0.5, 0.1, -3.7, 1e9])
@pytest.mark.parametrize("n", [2, 3, 100])
def test_no_interval_is_a_point(value: float, n: int):
    """What is alike on all rows has an interval where its values are bounded, and else none."""
    alike = [value] * n
    means = mean(alike)
    assert (means.value, means.n) == (pytest.approx(value), n)
    assert str(means) == f"{value:.2f} (n={n}, all alike)"
    columns = np.column_stack([alike, alike, [value + 0.3] * n])
    of_means = bootstrap(lambda means_SK: means_SK, columns)
    differences = bootstrap(lambda means_SK: means_SK[:, 1:] - means_SK[:, :1], columns)
    for found in (means, *of_means, *differences, mean_difference(alike, alike)):
        assert math.isnan(found.low)
        assert math.isnan(found.high)
    for bounded in (
        mean_difference([0.3] * n, [0.1] * n, within=(-1, 1)),
        mean_difference(alike, alike, within=(-1, 1)),
    ):
        assert bounded.low < bounded.value < bounded.high
    for same in (mean_difference([value + 0.3] * n, alike), mean_difference([*range(n)], [*range(n)])):
        assert math.isnan(same.low)  # others may be farther apart than any that were seen
        assert math.isnan(same.high)
    spread = mean_difference([*range(n)], [*range(n)], within=(-5, 5))
    assert spread.low < spread.value == 0 < spread.high == pytest.approx((1 - 0.025 ** (1 / n)) * 5)
    one_moves = bootstrap(lambda means_SK: means_SK, np.column_stack([alike, np.arange(n)]))
    assert math.isnan(one_moves[0].low)
    assert one_moves[1].low < one_moves[1].high


def test_one_row_gives_no_interval():
    """Neither where there is one, nor where one alone has a value."""
    for first, second in (([2.0], [1.0]), ([2.0, math.nan], [1.0, 0.0])):
        found = mean_difference(first, second)
        assert (found.value, found.n) == (1.0, 1)
        assert math.isnan(found.low)
        assert math.isnan(found.high)


def test_interval_is_that_of_scipy():
    rng = np.random.default_rng(3)
    values = rng.exponential(size=150)
    (ours,) = bootstrap(lambda means_SK: means_SK, values[:, None])
    theirs = scipy_bootstrap((values,), np.mean, method="percentile", n_resamples=9999, rng=1).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_a_ratio_is_resampled_in_pairs():
    rng = np.random.default_rng(4)
    prompt = rng.normal(scale=2, size=200)
    first, second = 5 + prompt + rng.normal(size=200), 8 + prompt + rng.normal(size=200)
    (ours,) = bootstrap(lambda means_SK: means_SK[:, :1] / means_SK[:, 1:], np.column_stack([first, second]))
    theirs = scipy_bootstrap(
        (first, second),
        lambda a, b, axis: a.mean(axis=axis) / b.mean(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=9999,
        rng=1,
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.004)


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(5).normal(size=(80, 1))
    one, again, other = (bootstrap(lambda means_SK: means_SK, values, seed=seed)[0] for seed in (0, 0, 1))
    assert one == again
    assert one.low != other.low


def test_rows_that_lack_a_value_are_left_out_of_every_column():
    """Two sides that are alike stay so where one is silent about the hard rows."""
    hard = np.arange(40) % 2 == 0
    value = np.where(hard, 2.0, 8.0) + np.random.default_rng(0).normal(size=40)
    rows = np.column_stack([value, np.where(hard, np.nan, value)])
    first, second, between = bootstrap(lambda m_SK: np.column_stack([m_SK, m_SK[:, 1] - m_SK[:, 0]]), rows)
    assert first == second
    assert (first.value, first.n) == (pytest.approx(value[~hard].mean()), 20)
    assert between.value == 0
    (nothing,) = bootstrap(lambda means_SK: means_SK, np.full((3, 1), np.nan))
    assert math.isnan(nothing.value)
    assert math.isnan(nothing.low)
    assert nothing.n == 0


def test_paired_differences_are_narrower_where_prompts_differ():
    rng = np.random.default_rng(6)
    prompt = rng.normal(scale=3, size=200)
    first, second = prompt + 1 + rng.normal(size=200), prompt + rng.normal(size=200)
    paired = mean_difference(first, second)
    apart = mean_difference(first, rng.permutation(second))
    assert paired.value == pytest.approx(apart.value) == pytest.approx((first - second).mean())
    assert paired.high - paired.low < (apart.high - apart.low) / 2


# --- coverage: of 400 simulated data sets, how many intervals hold the truth --------------------------------------


def covered(intervals: list[tuple[float, float]], truth: float) -> float:
    return float(np.mean([low <= truth <= high for low, high in intervals]))


@pytest.mark.parametrize(("win", "tie"), [(0.5, 0.1), (0.15, 0.05), (0.25, 0.7)])
def test_win_rates_cover_the_truth(win: float, tie: float):
    rng = np.random.default_rng(7)
    names = np.array(["win", "tie", "lose"])
    drawn = rng.choice(names, p=[win, tie, 1 - win - tie], size=(SETS, 300))
    found = [win_rate(outcomes.tolist()) for outcomes in drawn]
    assert COVERED[0] <= covered([(rate.low, rate.high) for rate in found], win + tie / 2) <= COVERED[1]


def test_differences_cover_the_truth():
    rng = np.random.default_rng(8)
    prompt = rng.exponential(scale=2, size=(SETS, 100))
    first, second = prompt + rng.normal(size=(SETS, 100)) + 0.4, prompt + rng.exponential(size=(SETS, 100))
    found = [mean_difference(a, b) for a, b in zip(first, second, strict=True)]
    assert COVERED[0] <= covered([(of.low, of.high) for of in found], 0.4 - 1) <= COVERED[1]


def test_shares_cover_the_truth():
    """Of a gap from 0 to 2, a method at 1.5."""
    rng = np.random.default_rng(9)
    prompt = rng.normal(size=(SETS, 150, 1))
    rows_SNK = prompt + rng.normal(size=(SETS, 150, 3)) + np.array([0, 2, 1.5])

    def share(means_SK):
        return (means_SK[:, 2:] - means_SK[:, :1]) / (means_SK[:, 1:2] - means_SK[:, :1])

    found = [bootstrap(share, rows_NK)[0] for rows_NK in rows_SNK]
    assert COVERED[0] <= covered([(of.low, of.high) for of in found], 0.75) <= COVERED[1]


@pytest.mark.parametrize(("n", "least"), [(2, 0.93), (3, 0.93), (5, 0.93), (20, 0.93)])
def test_differences_of_few_rows_cover_the_truth(n: int, least: float):
    drawn = np.random.default_rng(10).normal(size=(2000, n))
    found = [mean_difference(values.tolist(), [0.0] * n) for values in drawn]
    assert covered([(of.low, of.high) for of in found], 0.0) > least
    assert np.mean([of.low > 0 for of in found]) < 0.035


def test_resamples_of_ten_rows_cover_the_truth():
    drawn = np.random.default_rng(12).normal(size=(1500, 10, 1))
    found = [bootstrap(lambda means_SK: means_SK, rows_N1)[0] for rows_N1 in drawn]
    assert covered([(of.low, of.high) for of in found], 0.0) > 0.93


def test_memory_of_a_bootstrap_does_not_grow_with_its_rows():
    rows = np.random.default_rng(0).normal(size=(20_000, 1))
    tracemalloc.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("genarm.statistics.RESAMPLES", 400)
            found = bootstrap(lambda means_SK: means_SK, rows)[0]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 150e6
    # the same resamples as in one piece
    drawn = np.random.default_rng(0).multinomial(20_000, np.full(20_000, 1 / 20_000), size=400) @ rows / 20_000
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))), rel=1e-3)
