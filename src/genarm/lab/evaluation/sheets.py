"""The figures as tables of text, drawn up once for the terminal, for Markdown and for the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import genarm.lab.training  # noqa: F401 (so that what an ARM is compared with is among the kinds)
from genarm.lab.evaluation.behaviour import Behaviour, pair_accuracies
from genarm.lab.evaluation.claims import Ruling
from genarm.lab.evaluation.costs import Times
from genarm.lab.evaluation.figures import Comparison, Figures, Published, Row
from genarm.lab.evaluation.frontiers import Ahead, Frontier
from genarm.lab.evaluation.fronts import Front
from genarm.lab.evaluation.gaps import Recovered
from genarm.lab.evaluation.results import Trained
from genarm.statistics import Estimate, Mean, WinRate
from genarm.training.kinds import LOSSES, find_kind

UNKNOWN = "–"


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """One table of text.

    Attributes:
        key: names it in the report.
        title, note: above and below it; the note may be empty.
        head: of the columns.
        rows: of the same width.
        words: how many of the first columns are words; the others are numbers.
    """

    key: str
    title: str
    note: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1


def sheets(figures: Figures) -> tuple[Sheet, ...]:
    """All tables in reading order; those that would be empty are left out."""
    drawn = (
        _claims(figures),
        _quality(figures),
        _frontiers(figures.frontiers),
        _cost(figures),
        _comparisons(figures),
        _agreements(figures),
        _gaps(figures.gaps),
        *(sheet for front in figures.fronts for sheet in (_front(front), _leads(front))),
        _trained(figures),
        _published(figures.published),
    )
    return tuple(sheet for sheet in drawn if sheet.rows)


# --- numbers ---------------------------------------------------------------------------------------------------


def digits(values: Iterable[float]) -> int:
    """Decimals, 2 to 4, that leave the largest of `values` three digits."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return 2 if largest == 0 else min(4, max(2, 2 - math.floor(math.log10(largest))))


def number(value: float, decimals: int) -> str:
    """`value` with a true minus sign, none on zero; a dash where it is undefined."""
    if math.isnan(value):
        return UNKNOWN
    text = f"{value:.{decimals}f}".replace("inf", "∞")
    return text.lstrip("-") if not text.strip("-0.") else text.replace("-", "−")


def interval(estimate: Estimate | Mean | WinRate, decimals: int) -> str:
    """A figure with its interval, or in words that there is none: rows that are all alike do not bound others."""
    value = estimate.rate if isinstance(estimate, WinRate) else estimate.value
    if math.isnan(value):
        return UNKNOWN
    if math.isnan(estimate.low):
        return f"{number(value, decimals)} (no interval)"
    return f"{number(value, decimals)} [{number(estimate.low, decimals)}, {number(estimate.high, decimals)}]"


def _column(estimates: Sequence[Estimate | Mean | None]) -> list[str]:
    """A column of figures with as many decimals each."""
    decimals = digits(estimate.value for estimate in estimates if estimate is not None)
    return [UNKNOWN if estimate is None else interval(estimate, decimals) for estimate in estimates]


# --- sheets -----------------------------------------------------------------------------------------------------


def _claims(figures: Figures) -> Sheet:
    return Sheet(
        key="claims",
        title="Claims of the recipe",
        note="A claim holds where the whole 95% interval is above the bound, does not hold where none of it is, and is "
        "not shown in between.",
        head=("claim", "verdict", "measured", "must be above"),
        rows=tuple((statement(ruling), ruling.verdict, *_reason(ruling)) for ruling in figures.claims),
        words=2,
    )


def statement(ruling: Ruling) -> str:
    """What is claimed, in words."""
    claim = ruling.claim
    match claim.what:
        case "above":
            return f"{claim.first} is better than {claim.second} ({claim.judge})"
        case "level":
            return f"{claim.first} is level with {claim.second}: less than {claim.margin:g} below it ({claim.judge})"
        case "frontier":
            how = f"less than {claim.margin:g} below" if claim.margin else "better than"
            return f"{claim.first} is {how} {claim.second} at equal KL ({claim.judge})"
        case "front":
            least = f"at least {1 - claim.margin:.0%} of" if claim.margin else "above"
            where = " at equal KL" if claim.equal_kl else ""
            return f"the hypervolume of {claim.first} is {least} that of {claim.second}{where}"
        case "gap":
            return f"{claim.first} covers at least {claim.share:.0%} of the way to {claim.second} ({claim.judge})"
    return f"{claim.first} is cheaper than {claim.second}"


def _reason(ruling: Ruling) -> tuple[str, str]:
    if ruling.times is not None:
        forwards = number(ruling.times.forwards, digits([ruling.times.forwards]))
        return f"{forwards} × the forwards, {_slower(ruling.times)} the seconds", UNKNOWN
    if ruling.estimate is None:
        return "undefined", number(ruling.bound, 2)
    decimals = digits([ruling.estimate.value, ruling.estimate.high - ruling.estimate.low])
    reach = "" if ruling.reach is None else f", up to KL {number(ruling.reach, 2)}"
    bounds = f"; the KL of {', '.join(ruling.bounded)} is a bound" if ruling.bounded else ""
    return interval(ruling.estimate, decimals) + reach + bounds, f"{ruling.bound:g}".replace("-", "−")


def _slower(times: Times) -> str:
    decimals = digits([times.seconds])
    least, greatest = (number(ratio, decimals) for ratio in (times.fastest, times.slowest))
    return f"{number(times.seconds, decimals)} × [{least} to {greatest}]"


def _quality(figures: Figures) -> Sheet:
    judges = [judge for judge in figures.judges if figures.scored(judge)]
    columns = [_column([row.scores[judge] for row in figures.rows]) for judge in judges]
    return Sheet(
        key="quality",
        title="Quality",
        note=f"Means with 95% intervals over {figures.n} prompts. KL from the base in nats per reply; ≤ is a bound. "
        "The exponent is the sum of all coefficients over the temperature: where rewards say nothing, the method is "
        "the base with its probabilities to that power.",
        head=("method", *judges, "tokens per reply", "KL from the base", "KL per token", "exponent"),
        rows=tuple(
            (
                row.name,
                *(column[i] for column in columns),
                interval(row.length, 1),
                _kl(row),
                UNKNOWN if row.kl_per_token is None else number(row.kl_per_token, 3),
                UNKNOWN if row.exponent is None else number(row.exponent, 2),
            )
            for i, row in enumerate(figures.rows)
        ),
    )


def _kl(row: Row) -> str:
    own = " (from its own base)" if row.steers_another else ""
    if row.kl is not None:
        return interval(row.kl, 2) + own
    return UNKNOWN if row.kl_bound is None else f"≤ {number(row.kl_bound, 2)}{own}"


def _frontiers(frontiers: Sequence[Frontier]) -> Sheet:
    absent = {name: why for frontier in frontiers for name, why in frontier.absent.items()}
    without = f" Without a line: {'; '.join(f'{name}, {why}' for name, why in absent.items())}." if absent else ""
    return Sheet(
        key="equal-kl",
        title="At equal distance from the base",
        note="Differences of mean score at the same KL from the base, between families of several methods: averaged "
        "from where both begin to where both reach, and at some distances, in nats per reply. A line joins the base "
        f"and a family's methods; ≤ marks a family of which only a bound of the KL is known.{without}",
        head=("first", "second", "judge", "KL", "mean difference", "at some distances"),
        rows=tuple(_ahead(frontier.judge, lead) for frontier in frontiers for lead in frontier.leads),
        words=3,
    )


def _ahead(judge: str, lead: Ahead) -> tuple[str, ...]:
    decimals = digits([lead.mean.value, *(estimate.value for estimate in lead.at.values())])
    return (
        *(f"{name} (≤)" if name in lead.bounded else name for name in (lead.first, lead.second)),
        judge,
        f"{number(lead.low, 2)} to {number(lead.high, 2)}",
        interval(lead.mean, decimals),
        "; ".join(f"{distance:g}: {interval(estimate, decimals)}" for distance, estimate in lead.at.items()) or UNKNOWN,
    )


def _agreements(figures: Figures) -> Sheet:
    return Sheet(
        key="agreement",
        title="Judges side by side",
        note=f"Kendall's τ-b of every two methods' replies to the same prompt: 1 where both always prefer the same "
        f"reply, 0 where they have nothing to do with each other. Intervals over {figures.n} prompts.",
        head=("judge", "beside", "τ", "pairs of replies"),
        rows=tuple((a.first, a.second, interval(a.tau, 2), str(a.pairs)) for a in figures.agreements),
        words=2,
    )


def _cost(figures: Figures) -> Sheet:
    return Sheet(
        key="cost",
        title="Cost",
        note="Seconds of whole batches, over all tokens of the replies that were given; × base is the ratio to the "
        "base's, with the least and the greatest of a batch. A forward is one of a single row.",
        head=(
            "method",
            "s per 128 tokens",
            "s × base",
            "forwards per token",
            "by member",
            "forwards × base",
            "positions per token",
        ),
        rows=tuple(
            (
                row.name,
                number(row.seconds_per_128, 3),
                _slower(row.times_base).replace(" ×", ""),
                number(sum(row.forwards.values()), 2),
                ", ".join(f"{member} {number(count, 2)}" for member, count in row.forwards.items()),
                number(row.times_base.forwards, 2),
                number(sum(row.positions.values()), 1),
            )
            for row in figures.rows
        ),
    )


def _comparisons(figures: Figures) -> Sheet:
    decimals = digits(c.difference.value for c in figures.comparisons if c.difference is not None)
    return Sheet(
        key="comparisons",
        title="Prompt by prompt",
        note="Win + ½ tie of the verdicts that could be read, with its 95% score interval over prompts. Of a judge "
        "that scores, the higher score wins; the difference is that of the mean scores, paired.",
        head=("first", "second", "judge", "win", "tie", "lose", "n", "unparsed", "win + ½ tie", "difference"),
        rows=tuple(_compared(comparison, decimals) for comparison in figures.comparisons),
        words=3,
    )


def _compared(comparison: Comparison, decimals: int) -> tuple[str, ...]:
    rate, difference = comparison.rate, comparison.difference
    counts = (rate.win, rate.tie, rate.lose, rate.n, rate.unparsed)
    return (
        comparison.first,
        comparison.second,
        comparison.judge,
        *map(str, counts),
        interval(rate, 3),
        UNKNOWN if difference is None else interval(difference, decimals),
    )


def _gaps(gaps: Sequence[Recovered]) -> Sheet:
    return Sheet(
        key="gaps",
        title="Share of the gap",
        note="(method − bottom) / (top − bottom), paired over prompts; undefined where the gap's own interval is not "
        "above 0.",
        head=("method", "bottom", "top", "judge", "gap", "share"),
        rows=tuple(
            (
                name,
                gap.bottom,
                gap.top,
                gap.judge,
                *_column([gap.gap]),
                "undefined" if share is None else interval(share, 2),
            )
            for gap in gaps
            for name, share in gap.shares.items()
        ),
        words=4,
    )


def _front(front: Front) -> Sheet:
    volumes = _column([curve.hypervolume for curve in front.curves])
    products = _column([curve.mip for curve in front.curves])
    at = ", ".join(f"{name} {number(value, 2)}" for name, value in front.reference.items())
    return Sheet(
        key=f"front-{front.scale.replace(' ', '-')}",
        title=f"Fronts by {front.scale}",
        note=f"Hypervolume beyond the reference point ({at}: the base). MIP is the mean inner product of preference "
        "and objectives, comparable between families with the same preferences.",
        head=("family", "methods", "on its front", "hypervolume", "MIP"),
        rows=tuple(
            (curve.family, str(len(curve.points)), str(sum(p.on_front for p in curve.points)), volume, product)
            for curve, volume, product in zip(front.curves, volumes, products, strict=True)
        ),
    )


def _leads(front: Front) -> Sheet:
    differences = _column([lead.difference for lead in front.leads])
    return Sheet(
        key=f"leads-{front.scale.replace(' ', '-')}",
        title=f"Differences of hypervolume by {front.scale}",
        note="At equal KL: of what both have within the smaller of their largest KL; of a point beyond it, what the "
        "line from the base to it has there. ≤ marks a family of which only a bound of the KL is known.",
        head=("first", "second", "first − second", "at equal KL"),
        rows=tuple(
            (
                *(f"{name} (≤)" if name in lead.bounded else name for name in (lead.first, lead.second)),
                text,
                equal,
            )
            for lead, text, equal in zip(
                front.leads, differences, _column([lead.at_equal_kl for lead in front.leads]), strict=True
            )
        ),
        words=2,
    )


def _trained(figures: Figures) -> Sheet:
    return Sheet(
        key="trained",
        title="Trained for this",
        note="Of held-out pairs: the share in which the preferred response gets the higher reward, and in which the "
        "policy that the reward makes at weight 1 (or that it was trained for) raises it more over the base; of other "
        "kinds, their own figure. Beside it, what an ARM that guides alone adds to the base's score, at the KL that "
        "all of them reach." + "".join(_taus(found) for found in figures.behaviours),
        head=(
            *("model", "kind", "loss, held out", "held-out pairs", "policy accuracy"),
            *(f"{found.judge} over the base, KL {number(found.kl, 2)}" for found in figures.behaviours),
            "seconds of training",
        ),
        rows=tuple(_trained_row(model, figures.behaviours) for model in figures.trained),
        words=3,
    )


def _trained_row(model: Trained, behaviours: Sequence[Behaviour]) -> tuple[str, ...]:
    kind = find_kind(model.kind) if model.loss is None else LOSSES[model.loss]
    reward, policy = pair_accuracies(model)
    gains = [found.gains.get(model.name) for found in behaviours]
    return (
        model.name,
        model.kind,
        " ".join([*([model.loss] if model.loss else []), number(model.metrics.get("eval_loss", math.nan), 3)]),
        (kind.figure(model.metrics) or UNKNOWN) if reward is None else str(reward),
        UNKNOWN if policy is None else str(policy),
        *(UNKNOWN if gain is None else interval(gain, digits([gain.value])) for gain in gains),
        _seconds(model.metrics),
    )


def _taus(found: Behaviour) -> str:
    """How well accuracy goes with gain, in a sentence; nothing where there are too few rewards."""
    parts = (f"{of} {interval(tau, 2)}" for of, tau in found.taus.items())
    listed = ", ".join(parts)
    return f" Kendall's τ over {len(found.gains)} rewards of {found.judge} and {listed}." if listed else ""


def _seconds(metrics: Mapping[str, float]) -> str:
    return number(metrics.get("train_seconds", float("nan")), 0)


def _published(published: Sequence[Published]) -> Sheet:
    return Sheet(
        key="published",
        title="Published figures",
        note="Published figures are of the models, data and judge of the paper scale; they have no intervals.",
        head=("what", "published", "ours"),
        rows=tuple(row for entry in published for row in _published_rows(entry)),
        words=1,
    )


def _published_rows(published: Published) -> list[tuple[str, str, str]]:
    entry = published.entry
    if {"first", "second", "win", "tie", "lose"} <= set(entry):
        win, tie, lose = (float(entry[key]) for key in ("win", "tie", "lose"))
        theirs = f"{(win + tie / 2) / 100:.3f} ({win:g} / {tie:g} / {lose:g} %)"
        ours = [f"{c.judge}: {interval(c.rate, 3)}" for c in published.comparisons]
        return [
            (
                f"{entry['first']} – {entry['second']}, win + ½ tie (win / tie / lose)",
                theirs,
                "; ".join(ours) or UNKNOWN,
            )
        ]
    if {"family", "hypervolume"} <= set(entry):
        volume = published.hypervolume
        ours_text = UNKNOWN if volume is None else interval(volume, 4)
        return [(f"{entry['family']}, hypervolume of win + ½ tie", f"{entry['hypervolume']:g}", ours_text)]
    words = ", ".join(str(value) for value in entry.values() if isinstance(value, str))
    return [(f"{words}: {key}", str(value), UNKNOWN) for key, value in entry.items() if not isinstance(value, str)]
