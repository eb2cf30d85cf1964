"""What a comparison shows: figures with intervals, made from its results alone.

Intervals are of 95% over prompts: Student's for plain means, Tango's for win rates, percentile bootstrap for everything
else; a figure that is the same on every prompt has none, unless it is made of verdicts. What is
compared is compared on the same prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from genarm.lab.evaluation.agreement import Agreement, agreements
from genarm.lab.evaluation.behaviour import Behaviour, behaviour
from genarm.lab.evaluation.claims import Ruling, rule
from genarm.lab.evaluation.costs import Times, times
from genarm.lab.evaluation.frontiers import Frontier, make_frontier
from genarm.lab.evaluation.fronts import Front, make_fronts
from genarm.lab.evaluation.gaps import Recovered, recovered
from genarm.lab.evaluation.recipe import Recipe
from genarm.lab.evaluation.results import Measured, Results, Trained
from genarm.statistics import Estimate, Mean, WinRate, finite, mean, mean_difference, win_rate


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method.

    Attributes:
        name, family: of the method.
        scores: {judge: mean score}, of the judges that score single replies.
        length: tokens of a reply.
        kl: nats per reply from the base; None where it is not known.
        kl_per_token: the same for each token of the replies.
        kl_bound: what it is at most, where only that is known.
        seconds: of all replies together.
        seconds_per_128: seconds per 128 tokens, decoded in the run's batches.
        forwards, positions: {member: how many for each token of the replies}.
        times_base: its cost in multiples of the base's.
        exponent, steers_another: as measured.
    """

    name: str
    family: str
    scores: Mapping[str, Mean]
    length: Mean
    kl: Mean | None
    kl_per_token: float | None
    kl_bound: float | None
    seconds: float
    seconds_per_128: float
    forwards: Mapping[str, float]
    positions: Mapping[str, float]
    times_base: Times
    exponent: float | None
    steers_another: bool


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`first` against `second` by a judge; `difference` is that of the mean scores, None where the judge has none."""

    judge: str
    first: str
    second: str
    rate: WinRate
    difference: Estimate | None


@dataclass(frozen=True, kw_only=True)
class Published:
    """What others published, beside ours where the names are the same.

    Attributes:
        entry: as in the recipe. With `first` and `second` it is a comparison (`win`, `tie` and `lose` in percent); with
            `family`, a `hypervolume` of win + ½ tie against the base; anything else is shown as it is.
        comparisons: ours of the same two methods, one per judge.
        hypervolume: ours of the same family.
    """

    entry: Mapping[str, Any]
    comparisons: tuple[Comparison, ...] = ()
    hypervolume: Estimate | None = None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Everything that tables and report show; `n` is the number of prompts."""

    title: str
    scale: str
    n: int
    base: str
    reference: str
    judges: tuple[str, ...]
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    gaps: tuple[Recovered, ...]
    frontiers: tuple[Frontier, ...]
    fronts: tuple[Front, ...]
    claims: tuple[Ruling, ...]
    agreements: tuple[Agreement, ...]
    trained: tuple[Trained, ...]
    behaviours: tuple[Behaviour, ...]
    published: tuple[Published, ...]

    def scored(self, judge: str) -> bool:
        """Whether `judge` scores single replies."""
        return all(judge in row.scores for row in self.rows)

    def standings(self, judge: str) -> dict[str, Mean | WinRate]:
        """What `judge` makes of each method: its mean score, or else its win rate against the reference."""
        if self.scored(judge):
            return {row.name: row.scores[judge] for row in self.rows}
        against = (c for c in self.comparisons if c.judge == judge and c.second == self.reference)
        return {comparison.first: comparison.rate for comparison in against}


def figures(results: Results, recipe: Recipe) -> Figures:
    """All figures that `recipe` asks for."""
    judges = tuple(judge.name for judge in recipe.judges)
    scoring = [judge for judge in judges if all(judge in row.scores for row in results.measured)]
    gaps = tuple(found for gap in recipe.gaps if (found := recovered(results, gap)) is not None)
    fronts = make_fronts(results, recipe.fronts) if recipe.fronts else ()
    return Figures(
        title=results.title,
        scale=results.scale,
        n=len(results.prompts),
        base=results.measured[0].name,
        reference=results.reference,
        judges=judges,
        rows=tuple(_row(results, measured) for measured in results.measured),
        comparisons=_comparisons(results, recipe, judges),
        gaps=gaps,
        frontiers=tuple(make_frontier(results, judge) for judge in scoring),
        fronts=fronts,
        claims=tuple(rule(claim, results, gaps, recipe.fronts) for claim in recipe.claims),
        agreements=agreements(results, scoring),
        trained=results.trained,
        behaviours=tuple(done for judge in scoring if (done := behaviour(results, judge)) is not None),
        published=tuple(_published(entry, results, judges, fronts) for entry in results.published),
    )


def record(found: Figures) -> dict[str, Any]:
    """The figures as JSON holds them: a number that is undefined is null."""
    plain: dict[str, Any] = finite(asdict(found))
    return plain


def _row(results: Results, measured: Measured) -> Row:
    cost = measured.cost
    return Row(
        name=measured.name,
        family=measured.family,
        scores={judge: mean(scores) for judge, scores in measured.scores.items()},
        length=mean(measured.tokens),
        kl=None if measured.kl is None else mean(measured.kl),
        kl_per_token=None if measured.kl is None else cost.per_token(sum(measured.kl)),
        kl_bound=measured.kl_bound,
        seconds=sum(cost.seconds),
        seconds_per_128=128 * cost.seconds_per_token,
        forwards={member: cost.per_token(count) for member, count in cost.forwards.items()},
        positions={member: cost.per_token(count) for member, count in cost.positions.items()},
        times_base=times(results, measured.name, results.measured[0].name),
        exponent=measured.exponent,
        steers_another=measured.steers_another,
    )


def _comparisons(results: Results, recipe: Recipe, judges: tuple[str, ...]) -> tuple[Comparison, ...]:
    """The recipe's comparisons, and every method against the reference; each once."""
    others = [row.name for row in results.measured if row.name != results.reference]
    pairs = dict.fromkeys([*recipe.comparisons, *((name, results.reference) for name in others)])
    return tuple(found for first, second in pairs for found in _compare(results, judges, first, second))


def _compare(results: Results, judges: tuple[str, ...], first: str, second: str) -> tuple[Comparison, ...]:
    found = []
    for judge in judges:
        outcomes = results.outcomes(judge, first, second)
        mine, theirs = (results.row(name).scores.get(judge) for name in (first, second))
        if outcomes is not None:
            difference = None if mine is None or theirs is None else mean_difference(mine, theirs)
            found.append(
                Comparison(judge=judge, first=first, second=second, rate=win_rate(outcomes), difference=difference)
            )
    return tuple(found)


def _published(
    entry: Mapping[str, Any], results: Results, judges: tuple[str, ...], fronts: tuple[Front, ...]
) -> Published:
    names = {row.name for row in results.measured}
    first, second = entry.get("first"), entry.get("second")
    if first in names and second in names:
        return Published(entry=entry, comparisons=_compare(results, judges, str(first), str(second)))
    curves = (curve for front in fronts if front.scale == "win rate" for curve in front.curves)
    return Published(
        entry=entry, hypervolume=next((c.hypervolume for c in curves if c.family == entry.get("family")), None)
    )
