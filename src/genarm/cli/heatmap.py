"""Pictures of `TokenRewards`: coloured text and a table for the terminal, a page for the browser.

A reward's log π_i of a token says little by itself, because whatever is likely to the base is mostly likely to
the reward too. What is coloured is therefore log π_i − log π_base, how much more the reward likes the token than
the base does, and for the whole guided model log π − log π_base. Where a reward is a smaller model than the base,
the difference also holds what the smaller model knows less.

All numbers are natural logarithms (nats).
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, StrictUndefined
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from genarm.model.token_rewards import TokenRewards

_LEAST_LIMIT = 1.0
_TOKEN_WIDTH = 12
_MINUS = ("on #c6dbef", "on #6baed6", "on #2171b5")
_PLUS = ("on #fdd0a2", "on #fd8d3c", "on #c04000")
_INK = ("#000000", "#000000", "#ffffff")


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """One number per token that a colour can show.

    Attributes:
        key: a short name, `guided`, `base` or that of a reward behind `reward-`.
        label: what is written beside it.
        meaning: one sentence for people who have not read the paper.
        values: the number of each token.
    """

    key: str
    label: str
    meaning: str
    values: tuple[float, ...]

    @property
    def limit(self) -> float:
        """Where the colour is full: the size that nine tokens in ten stay below, at least 1 nat.

        One token that a model finds absurd would otherwise pale all the others.
        """
        sizes = sorted(abs(value) for value in self.values if math.isfinite(value))
        tenth = sizes[math.ceil(0.9 * len(sizes)) - 1] if sizes else 0.0
        return max(_LEAST_LIMIT, math.ceil(tenth * 10) / 10)

    @property
    def strengths(self) -> tuple[float, ...]:
        """Each value on the colour scale, from −1 to 1."""
        limit = self.limit
        return tuple(0.0 if math.isnan(v) else max(-1.0, min(1.0, v / limit)) for v in self.values)


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the table: its numbers, their sum, and their places on the colour scale (None: plain).

    A `difference` is written with its sign.
    """

    label: str
    values: tuple[float, ...]
    total: float
    strengths: tuple[float, ...] | None = None
    difference: bool = False

    def number(self, i: int | None) -> str:
        """The number of token `i`, or the sum, as it is written."""
        return format_number(self.total if i is None else self.values[i], signed=self.difference)


def quantities(rewards: TokenRewards) -> tuple[Quantity, ...]:
    """What can be coloured: the guided model's difference first, then each reward's, then the base."""
    guided = Quantity(
        key="guided",
        label="guided − base",
        meaning="log π − log π_base: how much the guidance raised (+) or lowered (−) this token.",
        values=_minus(rewards.guided, rewards.base),
    )
    each = [_of_reward(name, rewards) for name in rewards.rewards]
    base = Quantity(
        key="base",
        label="base",
        meaning="log π_base: how likely the token is to the frozen base; the stronger the colour, the less expected.",
        values=rewards.base,
    )
    return (guided, *each, base)


def _of_reward(name: str, rewards: TokenRewards) -> Quantity:
    """A reward's own distance from the base; of one with a reference, the distance that it is."""
    values, against = rewards.rewards[name], "base"
    if name in rewards.differences:
        against = "reference"
    else:
        values = _minus(values, rewards.base)
    return Quantity(
        key=f"reward-{name}",
        label=f"{name} − {against}",
        meaning=f"log π_{name} − log π_{against}: how much more (+) or less (−) this reward likes the token than the "
        f"{against} does, whatever its weight.",
        values=values,
    )


def columns(rewards: TokenRewards) -> tuple[Column, ...]:
    """The table's columns in reading order: the base, each reward and its weighted part, the guided model."""
    guided, *each, base = quantities(rewards)
    totals, parts = rewards.totals, rewards.contributions
    found = [Column(label="log π_base", values=rewards.base, total=totals["base"], strengths=base.strengths)]
    for (name, values), quantity in zip(rewards.rewards.items(), each, strict=True):
        part = parts[name]
        found += [
            Column(
                label=quantity.label if name in rewards.differences else f"log π_{name}",
                values=values,
                total=totals[name],
                strengths=quantity.strengths,
            ),
            Column(label=f"{rewards.weights[name]:g} × {name}", values=part, total=sum(part)),
        ]
    return (
        *found,
        Column(label="log π guided", values=rewards.guided, total=totals["guided"]),
        Column(
            label=guided.label,
            values=guided.values,
            total=sum(guided.values),
            strengths=guided.strengths,
            difference=True,
        ),
    )


# --- for the terminal -----------------------------------------------------------------------------------------------


def token_table(rewards: TokenRewards) -> Table:
    """One row per token and a row of totals; cells are coloured by what sets them apart from the base."""
    listed = columns(rewards)
    table = Table(show_footer=True, pad_edge=False, box=None, header_style="bold", footer_style="bold")
    longest = max(len("total"), *(len(visible(token)) for token in rewards.tokens))
    table.add_column("token", footer="total", overflow="fold", min_width=min(longest, _TOKEN_WIDTH))
    for column in listed:
        numbers = [column.number(i) for i in (None, *range(len(rewards.tokens)))]
        table.add_column(
            Text(column.label),
            justify="right",
            overflow="fold",
            footer=numbers[0],
            min_width=max(map(len, numbers)),  # a narrow terminal folds the label, never a number
        )
    for i, token in enumerate(rewards.tokens):
        cells = [Text(c.number(i), style=_style(c.strengths[i]) if c.strengths else "") for c in listed]
        table.add_row(Text(visible(token)), *cells)
    return table


def print_table(console: Console, rewards: TokenRewards) -> None:
    """Print `token_table`; a terminal too narrow for its numbers breaks the lines rather than lose any."""
    table = token_table(rewards)
    needed = sum(column.min_width or 0 for column in table.columns) + 2 * (len(table.columns) - 1)
    if console.width < needed:
        table.width = needed
    console.print(table, crop=False)


def heat_text(rewards: TokenRewards, quantity: Quantity) -> Text:
    """The response with every token on its colour."""
    text = Text(overflow="fold")
    for token, strength in zip(rewards.tokens, quantity.strengths, strict=True):
        text.append(_running(token), style=_style(strength))
    return text


def legend(quantity: Quantity) -> Text:
    """The colour scale in one line."""
    text = Text()
    text.append(f" ≤ {format_number(-quantity.limit)} ", style=_style(-1))
    for strength in (-0.6, -0.3):
        text.append("   ", style=_style(strength))
    text.append(" 0 ")
    if quantity.key != "base":  # a log-probability is never above 0
        for strength in (0.3, 0.6):
            text.append("   ", style=_style(strength))
        text.append(f" ≥ {format_number(quantity.limit)} ", style=_style(1))
    return text.append(f"  {quantity.label}, nats per token")


def visible(token: str) -> str:
    """`token` on one line, with white space and control characters made visible."""
    signs = {"\n": "⏎", "\t": "⇥", " ": "␣"}
    shown = "".join(signs.get(c, _harmless(c)) for c in token)
    # A space inside a token is plain to see; only those at its ends are not.
    inner = shown.strip("␣")
    left = len(shown) - len(shown.lstrip("␣"))
    return shown if not inner else shown[:left] + inner.replace("␣", " ") + shown[left + len(inner) :]


def _running(token: str) -> str:
    """`token` as part of running text."""
    return "".join(c if c == " " else {"\n": "⏎\n", "\t": "\t"}.get(c, _harmless(c)) for c in token)


def _harmless(character: str) -> str:
    return "\ufffd" if unicodedata.category(character) == "Cc" else character


def _style(strength: float) -> Style | str:
    """Three steps on each side of nothing."""
    step = min(2, int(abs(strength) * 4) - 1)
    if step < 0:
        return ""
    return Style.parse(f"{_INK[step]} {(_PLUS if strength > 0 else _MINUS)[step]}")


# --- for the browser ------------------------------------------------------------------------------------------------


def html_page(rewards: TokenRewards, *, model: str, prompt: str) -> str:
    """A self-contained page: the response on its colours, the numbers of each token, a table and totals.

    Args:
        rewards: what to show.
        model: its name, for the heading.
        prompt: what was answered.
    """
    shown = quantities(rewards)
    listed = columns(rewards)
    tokens = [
        {
            "text": _running(token),
            "name": visible(token),
            "id": rewards.token_ids[i],
            "strengths": [round(q.strengths[i], 3) for q in shown],
            "numbers": [format_number(q.values[i], signed=q.key != "base") for q in shown],
            "cells": [c.number(i) for c in listed],
            "colours": [round(c.strengths[i], 3) if c.strengths else 0 for c in listed],
        }
        for i, token in enumerate(rewards.tokens)
    ]
    scales = [
        {"label": q.label, "meaning": q.meaning, "limit": format_number(q.limit), "base": q.key == "base"}
        for q in shown
    ]
    page = resources.files("genarm.cli").joinpath("heatmap.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return template.from_string(page).render(
        model=model,
        prompt=prompt,
        weights={name: f"{weight:g}" for name, weight in rewards.weights.items()},
        tokens=tokens,
        scales=scales,
        headers=[c.label for c in listed],
        totals=[c.number(None) for c in listed],
    )


def _minus(left: Sequence[float], right: Sequence[float]) -> tuple[float, ...]:
    return tuple(a - b for a, b in zip(left, right, strict=True))


def format_number(value: float, *, signed: bool = False) -> str:
    """Two decimals with a true minus sign and, if `signed`, a plus; no sign on zero."""
    text = f"{value:+.2f}" if signed else f"{value:.2f}"
    return "0.00" if text in ("-0.00", "+0.00") else text.replace("-", "−").replace("inf", "∞")
