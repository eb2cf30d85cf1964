"""Weights that were found, as tables, JSON and, of a sweep, a picture."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from genarm.files import write_text
from genarm.lab.machine import code_version, this_machine
from genarm.lab.tune.pairs import PairResult, certainty
from genarm.lab.tune.sweep import Point, SweepResult
from genarm.statistics import Estimate, Proportion, finite

NOTHING = "–"


def show_weights(weights: Mapping[str, float]) -> str:
    """As --weights takes them."""
    return ",".join(f"{name}={weight:.6g}" for name, weight in weights.items())


# --- pairs --------------------------------------------------------------------------------------------------------


def print_pairs(console: Console, result: PairResult) -> None:
    """A table of the rewards, one of what has how many pairs right, and how sure it is."""
    table = _table("reward", "typical margin", "with length", "weight", "95%", "right alone")
    for name, weight in result.weights.items():
        interval = f"[{weight.low:.3g}, {weight.high:.3g}]"
        margin, length = f"{weight.scale:.3g} nats", NOTHING if weight.length is None else f"{weight.length.value:+.2f}"
        table.add_row(name, margin, length, f"{weight.value:.3g}", interval, _rate(weight.alone))
    console.print(table)
    console.print()
    fit = result.fit
    table = _table("weights", "pairs right")
    table.add_row(f"the folder's ({show_weights(result.own)})", _rate(result.before))
    table.add_row("fitted, on held-out prompts", NOTHING if fit.held_out is None else _rate(fit.held_out))
    table.add_row("fitted, on the pairs that they were fitted to", _rate(fit.fitted))
    console.print(table)
    counts = ", ".join(f"{label}: {count:,}" for label, count in result.pairs.encoded.report.lines())
    lines = [
        f"{counts}; {fit.prompts} different prompts",
        *certainty(result),
        f"these weights are for a nat of KL from the base that costs {result.beta:g} in log-odds (--beta)",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def pairs_json(result: PairResult) -> dict[str, Any]:
    """The weights and every figure; null where there is none."""
    fit = result.fit
    return {
        "kind": "pairs",
        "weights": result.values,
        "rewards": {name: asdict(weight) for name, weight in result.weights.items()},
        "beta": result.beta,
        "pairs": fit.pairs,
        "prompts": fit.prompts,
        "right": {
            "folder": asdict(result.before),
            "held_out": None if fit.held_out is None else asdict(fit.held_out),
            "fitted": asdict(fit.fitted),
        },
        "certainty": [*certainty(result)],
        "data": asdict(result.pairs.encoded.report),
        "record": result.record,
    }


# --- a sweep ------------------------------------------------------------------------------------------------------


def print_sweep(console: Console, result: SweepResult) -> None:
    """A row for each point, and what is best."""
    table = _table("scale", "weights", "score", "over 0", "nats a token", "tokens", "")
    for number, point in enumerate(result.points):
        table.add_row(
            f"{point.scale:g}",
            show_weights(point.weights),
            _estimate(point.score),
            _estimate(point.gain, signed=True) if number else NOTHING,
            _estimate(point.kl),
            f"{point.tokens:.0f}",
            "best" if number == result.best else "",
        )
    console.print(table)
    for line in verdict(result):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def verdict(result: SweepResult) -> Sequence[str]:
    """Which point is best, how sure that is, and what was left out, in sentences."""
    best = result.points[result.best]
    within = "" if result.budget is None else f" among those within {result.budget:g} nats a token"
    said = [f"the best{within}: {show_weights(best.weights)}"]
    n = best.gain.n
    if not result.best:
        said = [f"no weights{within} have a higher score than scale 0"]
    elif best.gain.low > 0:
        said.append(f"it is better than scale 0 ({n} prompts)")
    else:
        said.append(f"with {n} prompts it is not shown to be better than scale 0: take more prompts, or --samples")
    rivals = [f"{point.scale:g}" for point in result.points if _level(point, best, result)]
    if rivals:
        said.append(f"not told apart from it: scale {', '.join(rivals)}")
    if unscored := sum(point.unscored for point in result.points):
        said.append(f"{unscored} replies have no score and count in none")
    if cut := sum(point.cut for point in result.points):
        said.append(f"{cut} replies were cut at --max-new-tokens")
    return said


def _level(point: Point, best: Point, result: SweepResult) -> bool:
    """Whether a point within the budget may be as good as the best one."""
    within = result.budget is None or point.kl.value <= result.budget
    return point is not best and within and not point.behind.low > 0


def sweep_json(result: SweepResult) -> dict[str, Any]:
    """Every point, and the best one; null where there is no number."""
    return {
        "kind": "sweep",
        "weights": dict(result.points[result.best].weights),
        "max_kl": result.max_kl,
        "budget": result.budget,
        "best": result.best,
        "points": [asdict(point) for point in result.points],
        "verdict": [*verdict(result)],
        "record": result.record,
    }


def draw_sweep(path: Path, result: SweepResult, *, score: str) -> None:
    """Score against nats a token, with 95% intervals: a PNG at `path`; `score` is what scores the replies."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = canvas.add_subplot(xlabel="KL from the base, nats a token →", ylabel=f"{score}, mean →")
    points = [point for point in result.points if math.isfinite(point.kl.value) and math.isfinite(point.score.value)]
    axes.plot([p.kl.value for p in points], [p.score.value for p in points], color="tab:blue", alpha=0.5, zorder=2)
    for point in points:
        best = point is result.points[result.best]
        colour = "tab:red" if best else "tab:blue"
        x, y = point.kl.value, point.score.value
        across, along = _bars(point.kl), _bars(point.score)
        axes.errorbar(x, y, xerr=across, yerr=along, fmt="o", color=colour, capsize=2.5, zorder=3)
        axes.annotate(
            f"×{point.scale:g}{' (best)' if best else ''}", (x, y), xytext=(6, 6), textcoords="offset points", size=9
        )
    if result.budget is not None:
        axes.axvline(result.budget, color="black", linewidth=1, linestyle="--", label=f"budget {result.budget:g}")
        axes.legend(frameon=False)
    top = result.points[-1]
    axes.set_title(f"×1 is {show_weights(_unit(result))} (n={top.score.n} prompts)", size=10)
    axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=150, metadata={"Software": None})


def _unit(result: SweepResult) -> dict[str, float]:
    """The weights at scale 1."""
    first, last = result.points[0], result.points[-1]
    return {name: zero + (last.weights[name] - zero) / last.scale for name, zero in first.weights.items()}


def _bars(of: Estimate) -> list[list[float]] | None:
    if math.isnan(of.low):
        return None
    return [[max(0.0, of.value - of.low)], [max(0.0, of.high - of.value)]]


# --- both ---------------------------------------------------------------------------------------------------------


def write_json(path: Path, record: Mapping[str, Any], *, device: str) -> None:
    """What was found, with the day, the code and the machine (raises DataError)."""
    about = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "code": code_version(),
        "machine": asdict(this_machine(device)),
    }
    write_text(path, json.dumps(finite({**about, **record}), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, no_wrap=True)
    return table


def _rate(of: Proportion) -> str:
    return f"{of.rate:.3f} [{of.low:.3f}, {of.high:.3f}] (n={of.n})"


def _estimate(of: Estimate, *, signed: bool = False) -> str:
    form = "+.3g" if signed else ".3g"
    if math.isnan(of.value):
        return NOTHING
    return f"{of.value:{form}}" + ("" if math.isnan(of.low) else f" [{of.low:{form}}, {of.high:{form}}]")
