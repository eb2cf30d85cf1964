"""Measuring a guided model over a range of weights, and the picture of the trade-off.

Shapes: B rows, R rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genarm.lab.demo.pairs import MAX_NEW_TOKENS, progress
from genarm.lab.demo.world import OBJECTIVES, Request, Truth, repeated, truth
from genarm.lab.replies import sample_replies
from genarm.sampling import Sampling, derive_seed
from genarm.statistics import Mean, mean
from genarm.text.prompts import as_conversation, encode_prompt

BATCH_REQUESTS = 48

Weights = tuple[float, float]
"""Of the objectives, in the order of `OBJECTIVES`."""

NO_WEIGHTS: Weights = (0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The replies to the same requests under one setting, with their true scores."""

    label: str
    weights: Weights
    replies: tuple[str, ...]
    scores: tuple[Truth, ...]

    def mean(self, objective: str) -> Mean:
        """The mean score with its 95% interval over requests."""
        return mean([getattr(score, objective) for score in self.scores])

    @property
    def repeated(self) -> Mean:
        """The mean share of a reply's sentences that it has said before."""
        return mean([repeated(reply) for reply in self.replies])

    def gain(self, other: Measured, objective: str) -> Mean:
        """The mean difference to `other` on the same requests, with its 95% interval."""
        pairs = zip(self.scores, other.scores, strict=True)
        return mean([getattr(mine, objective) - getattr(theirs, objective) for mine, theirs in pairs])


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    grid: Sequence[Weights],
    *,
    seed: int,
    temperature: float = 1.0,
    label: str | None = None,
    console: Console,
) -> list[Measured]:
    """One reply to every request under every row of `grid`, all settings in the same batches.

    Args:
        model: a guided model whose rewards are named like the objectives.
        tokenizer: its tokenizer.
        requests: what to reply to.
        grid: a weight for each objective, per setting.
        seed: of the sampling.
        temperature: of the combined distribution.
        label: of the settings; the weights themselves if None.
        console: shows the progress.
    """
    prompts = [encode_prompt(tokenizer, as_conversation(request.text)) for request in requests]
    replies: list[str] = []  # request by request, and setting by setting in each
    starts = range(0, len(requests), BATCH_REQUESTS)
    for number, start in enumerate(progress(starts, "sampling replies", console)):
        batch = prompts[start : start + BATCH_REQUESTS]
        weights_BR = torch.tensor(grid).repeat(len(batch), 1)
        drawn = sample_replies(
            model,
            tokenizer,
            [prompt for prompt in batch for _ in grid],
            Sampling(max_new_tokens=MAX_NEW_TOKENS, temperature=temperature),
            seed=derive_seed(seed, number),
            weights_BR=weights_BR,
        )
        replies += [reply.text for reply in drawn]
    return [
        _judged(label or name_weights(weights), weights, requests, replies[i :: len(grid)])
        for i, weights in enumerate(grid)
    ]


def _judged(label: str, weights: Weights, requests: Sequence[Request], replies: Sequence[str]) -> Measured:
    scores = [truth(request.text, reply) for request, reply in zip(requests, replies, strict=True)]
    return Measured(label=label, weights=weights, replies=tuple(replies), scores=tuple(scores))


def name_weights(weights: Weights) -> str:
    """How a setting is called in tables: `base`, or its weights as the command line takes them."""
    if weights == NO_WEIGHTS:
        return "base"
    return ",".join(f"{name}={weight:g}" for name, weight in zip(OBJECTIVES, weights, strict=True))


# --- the picture ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Series:
    """Settings to be joined by a line in the picture; `offset` moves the labels from the points, in points."""

    label: str
    colour: str
    offset: tuple[float, float]
    points: Sequence[Measured]


def draw_trade_off(path: Path, series: Sequence[Series], base: Measured, sharpened: Measured) -> None:
    """Helpfulness against harmlessness, with 95% intervals; a PNG at `path`.

    `sharpened` is the base at a lower temperature: what concentration alone brings, without any reward.
    """
    canvas = Figure(figsize=(7.2, 5.4), layout="constrained")
    axes = canvas.add_subplot(xlabel="helpfulness (true score, mean) →", ylabel="harmlessness (true score, mean) →")
    axes.set_title(f"One frozen base, two rewards, weights chosen at decoding time (n={len(base.scores)})", size=11)
    drawn = {base.weights}
    for line in series:
        xs, ys = ([point.mean(objective).value for point in line.points] for objective in OBJECTIVES)
        axes.plot(xs, ys, color=line.colour, linewidth=1.4, alpha=0.5, label=line.label, zorder=2)
        for point in line.points:
            if point.weights not in drawn:
                _mark(axes, point, marker="o", colour=line.colour)
                _annotate(axes, point, line)
                drawn.add(point.weights)
    _mark(axes, base, marker="D", colour="black", label=base.label)
    _mark(axes, sharpened, marker="D", colour="black", label=sharpened.label, hollow=True)
    x, y = (base.mean(objective).value for objective in OBJECTIVES)
    axes.margins(0.1)
    axes.autoscale_view()
    right, top = axes.get_xlim()[1], axes.get_ylim()[1]
    axes.fill_between([x, right], y, top, color="tab:green", alpha=0.07, linewidth=0, zorder=0)
    axes.annotate(
        "better than the base in both",
        (right, top),
        xytext=(-6, -6),
        textcoords="offset points",
        ha="right",
        va="top",
        color="tab:green",
        size=9,
    )
    axes.set(xlim=(None, right), ylim=(None, top))
    axes.grid(alpha=0.25)
    axes.legend(loc="lower left", title="weights helpful : harmless", frameon=False, fontsize=9)
    canvas.savefig(path, dpi=150, metadata={"Software": None})


def _mark(
    axes: Axes, point: Measured, *, marker: str, colour: str, label: str | None = None, hollow: bool = False
) -> None:
    means = [point.mean(objective) for objective in OBJECTIVES]
    (x, dx), (y, dy) = ((m.value, m.high - m.value) for m in means)
    axes.errorbar(
        x,
        y,
        xerr=dx,
        yerr=dy,
        fmt=marker,
        color=colour,
        markersize=7,
        markerfacecolor="white" if hollow else colour,
        capsize=2.5,
        linewidth=1.2,
        label=label,
        zorder=3,
    )


def _annotate(axes: Axes, point: Measured, line: Series) -> None:
    axes.annotate(
        "{:g} : {:g}".format(*point.weights),
        (point.mean("helpful").value, point.mean("harmless").value),
        xytext=line.offset,
        textcoords="offset points",
        ha="left" if line.offset[0] > 0 else "right",
        color=line.colour,
        size=9,
        zorder=4,
    )
