"""Whether a run shows what its recipe claims, and by which numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from genarm.lab.evaluation.costs import Times, times
from genarm.lab.evaluation.frontiers import ahead
from genarm.lab.evaluation.fronts import hypervolume_lead
from genarm.lab.evaluation.gaps import Recovered
from genarm.lab.evaluation.recipe import Claim
from genarm.lab.evaluation.results import Results
from genarm.statistics import Estimate, mean_difference, win_rate

Verdict: TypeAlias = Literal["holds", "does not hold", "not shown"]


@dataclass(frozen=True, kw_only=True)
class Ruling:
    """A claim and what became of it.

    Attributes:
        claim: as in the recipe.
        verdict: "not shown" where the interval leaves it open, or a figure that it needs is undefined.
        estimate: what had to be above `bound`; None for "cheaper", and where it is undefined.
        bound: see above.
        times: for "cheaper", what `first` costs in multiples of `second`.
        reach: for "frontier", the KL up to which both families are compared.
        bounded: at equal KL, those of the two whose KL is only a bound. Such a family is nearer to the base than it
            seems, and may be better at equal KL; so neither a lead over it nor its falling behind shows anything.
    """

    claim: Claim
    verdict: Verdict
    estimate: Estimate | None = None
    bound: float = 0.0
    times: Times | None = None
    reach: float | None = None
    bounded: tuple[str, ...] = ()


def rule(claim: Claim, results: Results, gaps: Sequence[Recovered], objectives: Sequence[str]) -> Ruling:
    """Judge a claim by the results, the gaps made of them, and the objectives that fronts are about."""
    match claim.what:
        case "cheaper":
            return _rule_costs(claim, results)
        case "front":
            return _rule_front(claim, results, objectives)
        case "frontier":
            found = ahead(results, claim.judge, claim.first, claim.second)
            if found is None:
                return _ruling(claim, None, 0.0 - claim.margin)
            ruling = _ruling(claim, found.mean, 0.0 - claim.margin)
            return replace(_careful(ruling, found.bounded), reach=found.high)
        case "gap":
            return _ruling(claim, _share(claim, gaps), claim.share)
    assert claim.what in ("above", "level"), claim.what
    return _ruling(claim, _difference(results, claim.judge, claim.first, claim.second), 0.0 - claim.margin)


def _ruling(claim: Claim, estimate: Estimate | None, bound: float) -> Ruling:
    verdict: Verdict = "not shown"
    if estimate is not None and estimate.low > bound:
        verdict = "holds"
    elif estimate is not None and estimate.high <= bound:
        verdict = "does not hold"
    return Ruling(claim=claim, verdict=verdict, estimate=estimate, bound=bound)


def _rule_front(claim: Claim, results: Results, objectives: Sequence[str]) -> Ruling:
    lead = hypervolume_lead(results, objectives, claim.first, claim.second, claim.margin)
    if lead is None:
        return _ruling(claim, None, 0.0)
    if not claim.equal_kl:
        return _ruling(claim, lead.difference, 0.0)
    return _careful(_ruling(claim, lead.at_equal_kl, 0.0), lead.bounded)


def _careful(ruling: Ruling, bounded: tuple[str, ...]) -> Ruling:
    """Nothing is shown where the verdict may be the doing of a KL that is only a bound."""
    unsure = {"holds": ruling.claim.second, "does not hold": ruling.claim.first}
    verdict = "not shown" if unsure.get(ruling.verdict) in bounded else ruling.verdict
    return replace(ruling, verdict=verdict, bounded=bounded)


def _difference(results: Results, judge: str, first: str, second: str) -> Estimate | None:
    """Of mean scores. Of a judge that only compares: win + ½ tie less ½, or else that against the reference."""
    scored = judge in results.row(first).scores and judge in results.row(second).scores
    direct = None if scored else results.outcomes(judge, first, second)
    if direct is not None:
        rate = win_rate(direct)
        return Estimate(value=rate.rate - 0.5, low=rate.low - 0.5, high=rate.high - 0.5, n=rate.n)
    qualities = [results.quality(judge, name) for name in (first, second)]
    if qualities[0] is None or qualities[1] is None:
        return None
    return mean_difference(qualities[0], qualities[1], within=None if scored else (-1.0, 1.0))


def _share(claim: Claim, gaps: Sequence[Recovered]) -> Estimate | None:
    for gap in gaps:
        if (gap.top, gap.judge) == (claim.second, claim.judge) and claim.first in gap.shares:
            return gap.shares[claim.first]
    return None


def _rule_costs(claim: Claim, results: Results) -> Ruling:
    """Fewer forwards, and fewer seconds in every batch."""
    found = times(results, claim.first, claim.second)
    verdict: Verdict = "not shown"
    if found.forwards < 1 and found.slowest < 1:
        verdict = "holds"
    elif found.forwards >= 1 or found.fastest >= 1:
        verdict = "does not hold"
    return Ruling(claim=claim, verdict=verdict, times=found)
