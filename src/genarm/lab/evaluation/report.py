"""One HTML page of a comparison: claims, tables, pictures, answers side by side, and how it was made.

The page needs no other file, no network and no script. Whatever models or prompts say in it is text.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from genarm.lab.evaluation.figures import Figures
from genarm.lab.evaluation.plots import plots
from genarm.lab.evaluation.results import Measured, Results
from genarm.lab.evaluation.sheets import number, sheets

BEFORE_PICTURES = ("claims", "quality")
"""Sheets that come first."""

SAMPLES = 12
"""Prompts whose answers are shown."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A method's reply to a prompt, with `scores` as text."""

    method: str
    text: str
    scores: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt and all methods' answers; `number` counts from 1."""

    number: int
    prompt: str
    answers: tuple[Answer, ...]


def report(results: Results, figures: Figures) -> str:
    """The page; the same results give the same page, byte for byte."""
    drawn = sheets(figures)
    page = resources.files("genarm.lab.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return template.from_string(page).render(
        results=results,
        figures=figures,
        first=[sheet for sheet in drawn if sheet.key in BEFORE_PICTURES],
        then=[sheet for sheet in drawn if sheet.key not in BEFORE_PICTURES],
        plots=[(Markup(plot.svg), plot) for plot in plots(figures)],  # drawn here, and escaped by matplotlib
        samples=samples(results),
        notes=[plain(note) for note in results.notes],
        settings={name.replace("_", " "): value for name, value in results.settings.items()},
    )


def samples(results: Results) -> list[Sample]:
    """The answers to prompts that are spread evenly over all of them."""
    count = len(results.prompts)
    shown = [i * count // min(SAMPLES, count) for i in range(min(SAMPLES, count))]
    return [
        Sample(
            number=i + 1,
            prompt=plain(results.prompts[i]),
            answers=tuple(
                Answer(
                    method=row.name,
                    text=plain(row.replies[i]),
                    scores=", ".join(_facts(row, i)),
                )
                for row in results.measured
            ),
        )
        for i in shown
    ]


def _facts(row: Measured, index: int) -> Iterator[str]:
    """What judges give a reply, and what else may have swayed them."""
    yield from (f"{judge} {number(scores[index], 2)}" for judge, scores in row.scores.items())
    yield f"{row.tokens[index]} tokens"
    if row.kl is not None:
        yield f"KL {number(row.kl[index], 2)}"


def plain(text: str) -> str:
    """`text` with a sign in the place of every character that a page must not hold."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text)
