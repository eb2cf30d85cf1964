"""The pictures of the report, as SVG that takes its colours from the page around it.

Text stays text, and every colour is a variable of the page's style (`--ink`, `--faint`, `--series-1`, …), so that a
picture fits a light page and a dark one. The same figures give the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from genarm.lab.evaluation.figures import Comparison, Figures, Row
from genarm.lab.evaluation.frontiers import Frontier
from genarm.lab.evaluation.fronts import Curve, Front, Point
from genarm.statistics import Estimate, Mean, WinRate

COLOURS = ("#1f6fb2", "#c4511d", "#2a8a4a", "#8a4fb5", "#a0750a", "#b8336a", "#0f8a8a", "#6b6b6b")
"""One for each `--series-N` of the page, as drawn before it is replaced; it only has to be unlike the others."""

_INK, _FAINT = "#111111", "#999999"
_VARIABLES = {_INK: "--ink", _FAINT: "--faint", **{colour: f"--series-{i}" for i, colour in enumerate(COLOURS, 1)}}
_MARKERS = "osD^vPX*"
_WIDTH = 4.8
"""Inches: narrow enough that the text can still be read on a telephone."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "genarm",
    "text.parse_math": False,
    "font.size": 8.5,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.titlesize": 9,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _FAINT,
    "grid.alpha": 0.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A picture; `alt` says what it shows to those who do not see it, `caption` how to read it."""

    svg: str
    alt: str
    caption: str


@dataclass(frozen=True, kw_only=True)
class _Mark:
    """How a family is drawn."""

    colour: str
    marker: str


def plots(figures: Figures) -> tuple[Plot, ...]:
    """Quality against cost and against KL by each judge, verdicts by each judge, and the fronts."""
    with matplotlib.rc_context(_STYLE):
        return tuple(replace(plot, svg=_part_of_page(plot.svg, f"plot-{i}-")) for i, plot in enumerate(_plots(figures)))


def _plots(figures: Figures) -> Iterator[Plot]:
    marks = _marks(figures)
    for judge in figures.judges:
        yield from _quality_against_cost(figures, judge, marks)
        yield from _quality_against_kl(figures, judge, marks)
    for judge in figures.judges:
        yield from _verdicts(figures, judge)
    for front in figures.fronts:
        for pair in combinations(front.objectives, 2):
            yield _front(front, pair, marks)


def _marks(figures: Figures) -> dict[str, _Mark]:
    """The base in ink; the others in turn, colour and shape both."""
    families = dict.fromkeys(row.family for row in figures.rows)
    base = figures.rows[0].family
    others = [family for family in families if family != base]
    turns = {
        family: _Mark(colour=COLOURS[i % len(COLOURS)], marker=_MARKERS[(i + i // len(COLOURS)) % len(_MARKERS)])
        for i, family in enumerate(others)
    }
    return {base: _Mark(colour=_INK, marker="d"), **turns}


# --- quality ----------------------------------------------------------------------------------------------------


def _quality_against_cost(figures: Figures, judge: str, marks: Mapping[str, _Mark]) -> Iterator[Plot]:
    standings = figures.standings(judge)
    rows = [row for row in figures.rows if row.name in standings and row.seconds_per_128 > 0]
    if not rows:
        return
    canvas, axes = _canvas(4.0)
    axes.set(xscale="log", xlabel="seconds per 128 tokens (logarithmic)", ylabel=_quality_label(figures, judge))
    axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter=NullFormatter())
    for family, members in _by_family(rows).items():
        xs = [row.seconds_per_128 for row in members]
        _series(axes, xs, [standings[row.name] for row in members], marks[family], label=family)
    left, right = axes.get_xlim()
    axes.set_xlim(left / 1.5, right * 1.5)  # at least one tick has a label, however close the methods are
    _legend(canvas)
    yield Plot(
        svg=_svg(canvas),
        alt=f"{_quality_label(figures, judge)} against seconds per 128 tokens. "
        + _listed(f"{row.name}: {_text(standings[row.name])} at {row.seconds_per_128:.3g} s" for row in rows),
        caption=f"Quality by {judge} against cost: better is up, cheaper is left. Bars are 95% intervals.",
    )


def _quality_against_kl(figures: Figures, judge: str, marks: Mapping[str, _Mark]) -> Iterator[Plot]:
    standings = figures.standings(judge)
    rows = [row for row in figures.rows if row.name in standings and _kl(row) is not None and not row.steers_another]
    if len(rows) < 2:
        return
    canvas, axes = _canvas(4.0)
    axes.set(xlabel="KL from the base, nats per reply", ylabel=_quality_label(figures, judge))
    frontier = next((frontier for frontier in figures.frontiers if frontier.judge == judge), None)
    for line in frontier.lines if frontier else ():
        _join(axes, [row for name in line.points for row in rows if row.name == name], judge, marks[line.family])
    for family, members in _by_family(rows).items():
        for bound in (False, True):
            some = [row for row in members if (row.kl is None) == bound]
            xs = [_kl(row) for row in some]
            label = f"{family} (bound)" if bound else family
            _series(axes, xs, [standings[row.name] for row in some], marks[family], label=label, hollow=bound)
    _legend(canvas)
    yield Plot(
        svg=_svg(canvas),
        alt=f"{_quality_label(figures, judge)} against KL from the base. "
        + _listed(f"{row.name}: {_text(standings[row.name])} {_kl_text(row)}" for row in rows),
        caption=f"Quality by {judge} against how far the replies are from the base's: compare heights at the same "
        "distance. Lines join the base and a family's methods, dotted where it is one. Hollow marks stand at an upper "
        "bound." + _without(frontier),
    )


def _without(frontier: Frontier | None) -> str:
    absent = frontier.absent if frontier else {}
    return f" Without a line: {_listed(f'{name}, {why}' for name, why in absent.items())}" if absent else ""


def _join(axes: Axes, rows: Sequence[Row], judge: str, mark: _Mark) -> None:
    """The line of a family, from the base on; dotted where it is that of one method."""
    xs, ys = _spread([_kl(row) for row in rows])[0], [row.scores[judge].value for row in rows]
    style = "-" if len(rows) > 2 else ":"
    axes.plot(xs, ys, color=mark.colour, linewidth=1.2, linestyle=style, alpha=0.6, zorder=1)


def _kl(row: Row) -> Mean | float | None:
    return row.kl if row.kl is not None else row.kl_bound


def _kl_text(row: Row) -> str:
    return f"at {row.kl.value:.2f} nats" if row.kl is not None else f"at most {row.kl_bound:.2f} nats"


def _quality_label(figures: Figures, judge: str) -> str:
    return f"{judge}, mean score" if figures.scored(judge) else f"{judge}, win + ½ tie against {figures.reference}"


def _by_family(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.family, []).append(row)
    return found


# --- verdicts ---------------------------------------------------------------------------------------------------


def _verdicts(figures: Figures, judge: str) -> Iterator[Plot]:
    rows = [comparison for comparison in figures.comparisons if comparison.judge == judge and comparison.rate.n]
    if not rows:
        return
    canvas, axes = _canvas(0.9 + 0.42 * len(rows))
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.4, -0.6), xlabel="share of prompts")
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    for y, row in enumerate(rows):
        _bar(axes, y, row)
    axes.axvline(0.5, color=_INK, linewidth=0.8, linestyle=":")
    _legend(canvas)
    yield Plot(
        svg=_svg(canvas),
        alt=f"Verdicts of {judge}. "
        + _listed(f"{row.first} against {row.second}: {_verdict_text(row)}" for row in rows),
        caption=f"Prompt by prompt, by {judge}: the first against the second. The mark is win + ½ tie with its 95% "
        "interval.",
    )


def _bar(axes: Axes, y: int, row: Comparison) -> None:
    rate = row.rate
    left = 0.0
    for name, count, colour, alpha in (
        ("win", rate.win, COLOURS[0], 0.55),
        ("tie", rate.tie, _FAINT, 0.35),
        ("lose", rate.lose, COLOURS[1], 0.55),
    ):
        axes.barh(
            y,
            count / rate.n,
            left=left,
            height=0.36,
            color=colour,
            alpha=alpha,
            linewidth=0,
            label=name if y == 0 else None,
        )
        left += count / rate.n
    unparsed = f", {rate.unparsed} unparsed" if rate.unparsed else ""
    axes.text(0, y - 0.24, f"{row.first} – {row.second} (n={rate.n}{unparsed})", va="bottom", size=8)
    bars = [[rate.rate - rate.low], [rate.high - rate.rate]]
    axes.errorbar(rate.rate, y, xerr=bars, fmt="d", color=_INK, markersize=4, capsize=2.5, linewidth=1.2)


def _verdict_text(row: Comparison) -> str:
    rate = row.rate
    return f"{rate.win} won, {rate.tie} tied, {rate.lose} lost, win + ½ tie {_text(rate)}"


# --- fronts -----------------------------------------------------------------------------------------------------


def _front(front: Front, pair: tuple[str, str], marks: Mapping[str, _Mark]) -> Plot:
    canvas, axes = _canvas(4.4)
    axes.set(xlabel=f"{pair[0]}, {_scale(front)} →", ylabel=f"{pair[1]}, {_scale(front)} →")
    for curve in front.curves:
        _draw_curve(axes, curve, pair, marks[curve.family])
    x, y = (front.reference[objective] for objective in pair)
    axes.axvline(x, color=_FAINT, linewidth=0.8, linestyle="--", zorder=0)
    axes.axhline(y, color=_FAINT, linewidth=0.8, linestyle="--", zorder=0)
    axes.plot([x], [y], "d", color=_INK, markersize=6, label="base")
    _legend(canvas)
    where = f" in all {len(front.objectives)} objectives" if len(front.objectives) > 2 else ""
    return Plot(
        svg=_svg(canvas),
        alt=f"{pair[1]} against {pair[0]} by {front.scale}, family by family. "
        + _listed(f"{curve.family}: {_points_text(curve, pair)}" for curve in front.curves),
        caption=f"{pair[0]} and {pair[1]} by {front.scale}. Filled marks are on the front of their family{where}, "
        "hollow ones are dominated. The dashed lines cross at the reference point of the hypervolume, the base.",
    )


def _scale(front: Front) -> str:
    return "mean score" if front.scale == "mean score" else "win + ½ tie"


def _draw_curve(axes: Axes, curve: Curve, pair: tuple[str, str], mark: _Mark) -> None:
    best = sorted((p for p in curve.points if p.on_front), key=lambda p: p.values[pair[0]].value)
    if len(curve.points[0].values) == 2:  # the projection of a surface is no line
        line = [[point.values[objective].value for point in best] for objective in pair]
        axes.plot(*line, color=mark.colour, linewidth=1.2, alpha=0.6, zorder=1)
    for hollow in (False, True):
        some = [point for point in curve.points if point.on_front != hollow]
        label = None if hollow and best else curve.family
        _series(axes, _values(some, pair[0]), _values(some, pair[1]), mark, label=label, hollow=hollow)


def _values(points: Sequence[Point], objective: str) -> list[Estimate]:
    return [point.values[objective] for point in points]


def _points_text(curve: Curve, pair: tuple[str, str]) -> str:
    return ", ".join(f"({p.values[pair[0]].value:.2f}, {p.values[pair[1]].value:.2f})" for p in curve.points)


# --- drawing ----------------------------------------------------------------------------------------------------


def _canvas(height: float) -> tuple[Figure, Axes]:
    canvas = Figure(figsize=(_WIDTH, height), layout="constrained")
    canvas.patch.set_alpha(0)
    axes = canvas.add_subplot(facecolor="none")
    axes.grid()
    axes.set_axisbelow(True)
    return canvas, axes


def _series(
    axes: Axes,
    xs: Sequence[Estimate | Mean | WinRate | float | None],
    ys: Sequence[Estimate | Mean | WinRate | float | None],
    mark: _Mark,
    *,
    label: str | None,
    hollow: bool = False,
) -> None:
    """Points with their intervals, in one colour."""
    if not xs:
        return
    (x, dx), (y, dy) = _spread(xs), _spread(ys)
    axes.errorbar(
        x,
        y,
        xerr=dx,
        yerr=dy,
        fmt=mark.marker,
        color=mark.colour,
        markerfacecolor="none" if hollow else mark.colour,
        markersize=5,
        capsize=2,
        linestyle="none",
        elinewidth=0.9,
        label=label,
    )


def _spread(values: Sequence[Estimate | Mean | WinRate | float | None]) -> tuple[list[float], list[list[float]]]:
    """Values, and how far their intervals reach below and above."""
    middles: list[float] = []
    below: list[float] = []
    above: list[float] = []
    for value in values:
        assert value is not None
        middle = value if isinstance(value, float | int) else _middle(value)
        low, high = (middle, middle) if isinstance(value, float | int) else (value.low, value.high)
        middles.append(middle)
        below.append(max(0.0, middle - low))
        above.append(max(0.0, high - middle))
    return middles, [below, above]


def _middle(value: Estimate | Mean | WinRate) -> float:
    return value.rate if isinstance(value, WinRate) else value.value


def _text(value: Estimate | Mean | WinRate) -> str:
    interval = "(no interval)" if math.isnan(value.low) else f"[{value.low:.3g}, {value.high:.3g}]"
    return f"{_middle(value):.3g} {interval}"


def _listed(parts: Iterable[str]) -> str:
    return "; ".join(parts) + "."


def _legend(canvas: Figure) -> None:
    """Below the picture, in as many columns as the longest name leaves room for."""
    _, labels = canvas.axes[0].get_legend_handles_labels()
    columns = max(1, min(4, 75 // (max(map(len, labels)) + 6)))
    canvas.legend(
        loc="outside lower center", ncols=columns, frameon=False, fontsize=8, handletextpad=0.4, columnspacing=1.2
    )


def _svg(canvas: Figure) -> str:
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return buffer.getvalue()


def _part_of_page(svg: str, prefix: str) -> str:
    """The picture without the headers of a file, with variables for its colours and ids that no other picture has."""

    def adapt(tag: re.Match[str]) -> str:
        text = re.sub(r'((?:\bid|href)="#?|url\(#)', rf"\1{prefix}", tag[0])
        return re.sub(r"#[0-9a-f]{6}", lambda colour: f"var({_VARIABLES[colour[0]]})", text)

    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return re.sub(r"<[^>]*>", adapt, svg)
