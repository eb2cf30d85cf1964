"""The result as tables, as JSON, and pair by pair as JSON lines."""

from __future__ import annotations

import datetime
import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from genarm.files import write_text
from genarm.lab.accuracy.figures import Accuracy, Difference, Figures, Interval
from genarm.lab.accuracy.run import AccuracyResult, Measured
from genarm.lab.accuracy.settings import AccuracySettings
from genarm.lab.machine import code_version, this_machine
from genarm.model.references import find_device
from genarm.statistics import finite

HOW = {
    "arm": "log π(y|x), summed over the tokens of the response",
    "implicit": "log π(y|x) − log π_base(y|x), summed over the tokens of the response",
    "tuned": "log π(y|x) − log π_reference(y|x), summed over the tokens of the response",
    "wish": "log π(y|wish, x) − log π(y|x), summed over the tokens of the response",
    "policy": "the guided policy, log π_guided(y|x) − log π_base(y|x), summed over the tokens of the response",
    "trajectory": "a trajectory reward",
}
NOTHING = "–"


def print_result(console: Console, result: AccuracyResult) -> None:
    """A table for every reward, and one of differences where there are several."""
    for measured in result.measured:
        console.print(_heading(measured.name, _how(measured)))
        console.print(_table(measured))
        console.print(_remark(measured), markup=False, highlight=False)
        console.print()
    if result.differences:
        console.print(_heading("Differences in accuracy", f"from {result.measured[0].name}, on the pairs of both"))
        console.print(_difference_table(result.differences))


def write_result(path: Path, result: AccuracyResult) -> Path:
    """Write the figures to `path` and the scores of every pair beside it; returns the place of the latter.

    Raises:
        OSError: as the operating system says.
    """
    scores = path.with_suffix(".pairs.jsonl")
    write_text(scores, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in pair_rows(result)))
    record = {**as_json(result), "scores": scores.name}
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return scores


def as_json(result: AccuracyResult) -> dict[str, Any]:
    """Settings, circumstances and every figure; null where there is none."""
    device = result.settings.device
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command(result.settings),
        "code": code_version(),
        "machine": asdict(this_machine(find_device(None if device == "auto" else device))),
        "settings": asdict(result.settings),
        "record": result.record,
        "format": result.format,
        "rows": result.rows,
        "models": [
            {
                "name": measured.name,
                "reference": measured.reference,
                "kind": measured.kind,
                "weights": measured.weights,
                "max_kl": measured.max_kl,
                "limits": asdict(measured.limit),
                "data": asdict(measured.report),
                "figures": asdict(measured.figures),
                "per_token": None if measured.per_token is None else asdict(measured.per_token),
            }
            for measured in result.measured
        ],
        "differences": [asdict(difference) for difference in result.differences],
    }
    plain: dict[str, Any] = finite(record)
    return plain


def pair_rows(result: AccuracyResult) -> Iterator[dict[str, Any]]:
    """A record for every row of the data that a reward has scored, with the score and the length of both responses."""
    found: dict[int, dict[str, Any]] = {}
    for measured in result.measured:
        scores = measured.scores
        columns = (scores.chosen_B, scores.rejected_B, scores.chosen_length_B, scores.rejected_length_B)
        for row, *values in zip(scores.rows.tolist(), *(column.tolist() for column in columns), strict=True):
            names = ("chosen", "rejected", "chosen_tokens", "rejected_tokens")
            found.setdefault(row, {})[measured.name] = dict(zip(names, values, strict=True))
    for row in sorted(found):
        category = {} if result.categories is None else {"category": result.categories[row]}
        yield {"row": row, **category, "scores": found[row]}


def command(settings: AccuracySettings) -> str:
    """A command line that measures the same."""
    words = ["genarm", "accuracy", *settings.models]
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name == "models" or value == field.default:
            continue
        option = f"--{field.name.replace('_', '-')}"
        for item in value if isinstance(value, tuple) else (value,):
            words += [option] if item is True else [option, str(item)]
    return shlex.join(words)


def _how(measured: Measured) -> str:
    """How a row's responses are scored; of a policy, at which weights."""
    if measured.weights is None:
        return HOW[measured.kind]
    budget = "" if measured.max_kl is None else f", within {measured.max_kl:g} nats a token"
    weights = ",".join(f"{name}={weight:g}" for name, weight in measured.weights.items())
    return f"{HOW[measured.kind]}, at {weights}{budget}"


def _heading(name: str, what: str) -> Text:
    return Text.assemble((_visible(name), "bold"), f": {_visible(what)}")


def _table(measured: Measured) -> Table:
    """Rows are groups of pairs; where responses have a score per token, its accuracy stands in a column of its own."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("pairs")
    table.add_column("n", justify="right")
    shown = {"accuracy": measured.figures}
    if measured.per_token is not None:
        shown["per token"] = measured.per_token
    for title in shown:
        table.add_column(title, no_wrap=True)
        table.add_column("ties", justify="right")
    for rows in zip(*map(_rows, shown.values()), strict=True):
        label, n, _, _ = rows[0]
        table.add_row(Text(_visible(label)), n, *(cell for _, _, *cells in rows for cell in cells))
    return table


def _rows(figures: Figures) -> Iterator[tuple[str, str, str, str]]:
    """What each row of the table shows of one kind of score: label, n, accuracy, ties."""
    yield _row("all", figures.overall)
    for name, accuracy in figures.categories.items():
        yield _row(f"  {name}", accuracy)
    if figures.macro is not None:
        yield "mean of the categories", "", _interval(figures.macro), ""
    for name, accuracy in figures.lengths.items():
        yield _row(name, accuracy)
    yield "length-balanced", "", _interval(figures.balanced), ""
    yield "correlation of margin and length", "", _interval(figures.length_correlation, signed=True), ""


def _row(label: str, accuracy: Accuracy) -> tuple[str, str, str, str]:
    right = accuracy.right
    rate = Interval(value=right.rate, low=right.low, high=right.high) if right.n else None
    return label, str(right.n), _interval(rate), str(accuracy.ties)


def _difference_table(differences: tuple[Difference, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model")
    for title in ("n", "only it right", "only the first right"):
        table.add_column(title, justify="right")
    table.add_column("difference", no_wrap=True)
    table.add_column("p (McNemar)", justify="right")
    for of in differences:
        counts = map(str, (of.n, of.only_second, of.only_first))
        table.add_row(Text(_visible(of.second)), *counts, _interval(of.accuracy, signed=True), f"{of.p_value:.2g}")
    return table


def _remark(measured: Measured) -> str:
    counts = ", ".join(f"{_visible(label)}: {count:,}" for label, count in measured.report.lines())
    return f"{counts}; at most {measured.limit.prompt} tokens of a prompt and {measured.limit.response} of a response"


def _interval(found: Interval | None, *, signed: bool = False) -> str:
    if found is None:
        return NOTHING
    form = "+.3f" if signed else ".3f"
    return f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"


def _visible(text: str) -> str:
    """`text` without control characters, which could steer the reader's terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)
