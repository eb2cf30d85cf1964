"""What the demo prints: what each stage does and why, tables, and what to try next."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from genarm.lab.demo.sweep import Measured, Weights, name_weights
from genarm.lab.demo.world import OBJECTIVES, Kind, Request, parse_reply
from genarm.statistics import Mean

COLOURS = {
    Kind.GENTLE: "green",
    Kind.CAUTION: "cyan",
    Kind.DRASTIC: "red",
    Kind.REFUSAL: "yellow",
    Kind.GARBLED: "magenta",
}


@dataclass
class Stages:
    """Numbers the stages, says what each is for, and how long it took."""

    console: Console
    count: int
    started: float = field(default_factory=time.monotonic)
    number: int = 0

    @contextmanager
    def stage(self, title: str, purpose: str) -> Iterator[None]:
        """Print `title` and `purpose` before the block, and its seconds after it."""
        self.number += 1
        self.console.print()
        self.console.rule(f"[bold]{self.number}/{self.count}  {title}", align="left")
        self.console.print(purpose, highlight=False)
        start = time.monotonic()
        yield
        now = time.monotonic()
        self.console.print(f"[dim]{now - start:.0f} s, {now - self.started:.0f} s so far[/dim]", highlight=False)


def side_by_side(requests: Sequence[Request], points: Sequence[Measured]) -> Table:
    """The first replies of each of `points` beside each other; sentences are coloured by what they do, once."""
    table = Table(show_lines=True)
    table.add_column("request", style="bold")
    for point in points:
        table.add_column(point.label.replace(",", "\n"))
    for i, request in enumerate(requests):
        cells = [_reply(point.replies[i], *point.scores[i]) for point in points]
        table.add_row(request.text, *cells)
    return table


def legend() -> Text:
    """What the colours of `side_by_side` mean."""
    styles = {**{kind.value: colour for kind, colour in COLOURS.items()}, "said before": "dim"}
    return Text("Sentences: ").append_text(Text(", ").join(Text(name, style=style) for name, style in styles.items()))


def _reply(reply: str, helpful: float, harmless: float) -> Text:
    text = Text()
    sentences = parse_reply(reply)
    for place, sentence in enumerate(sentences):
        again = sentence in sentences[:place]
        text.append(sentence.text + " ", style="dim" if again else COLOURS.get(sentence.kind, ""))
    return text.append(f"\nhelpful {helpful:+g}, harmless {harmless:+g}", style="dim")


def sweep_table(points: Sequence[Measured], base: Measured) -> Table:
    """True scores of every setting with 95% intervals; bold where they are above the base's beyond doubt."""
    table = Table(title=f"True scores, mean [95% interval] over n={len(base.scores)} held-out requests", title_style="")
    table.add_column("weights")
    for objective in OBJECTIVES:
        table.add_column(objective, justify="right")
    table.add_column("said before", justify="right")
    for point in points:
        cells = (_cell(point, base, objective) for objective in OBJECTIVES)
        table.add_row(point.label, *cells, f"{point.repeated.value:.0%}")
    return table


def _cell(point: Measured, base: Measured, objective: str) -> Text:
    score = point.mean(objective)
    better = point is not base and point.gain(base, objective).low > 0
    return Text(_figure(score), style="bold green" if better else "")


def both_line(point: Measured, base: Measured) -> str:
    """Whether `point` is above `base` in both scores, with the paired intervals."""
    gains = {objective: point.gain(base, objective) for objective in OBJECTIVES}
    if all(gain.low > 0 for gain in gains.values()):
        verdict = "is better than the base in both"
    else:
        verdict = "is not better than the base in both beyond doubt"
    figures = ", ".join(f"{objective} {_figure(gain)}" for objective, gain in gains.items())
    return f"{point.label} {verdict}: {figures} (paired, n={len(base.scores)})."


def _figure(mean: Mean) -> str:
    interval = "(all alike)" if math.isnan(mean.low) else f"[{mean.low:+.2f}, {mean.high:+.2f}]"
    return f"{mean.value:+.2f} {interval}"


def next_commands(output: Path, request: str, reply: str, weights: Sequence[Weights]) -> list[str]:
    """Commands to try on what the demo has left."""
    guided = shlex.quote(str(output / "guided"))
    prompt = shlex.quote(request)
    html = shlex.quote(str(output / "rewards.html"))
    return [
        *(f"genarm generate {guided} --prompt {prompt} --weights {name_weights(w)}" for w in weights),
        f"genarm chat {guided}",
        f"genarm score {guided} --prompt {prompt} --response {shlex.quote(reply)} --html {html}",
    ]
