"""`sweep`: replies under several weights, scored; quality against the distance from the base.

The weights go along a ray: all of them, or the one that is varied, times each scale, and times 0. In `output` stand,
for each scale X,

    replies-X.jsonl    as `genarm generate` writes them, with the same seeds under all weights
    scores-X.jsonl     the score of every different reply

each beside the record of its own settings, so that an interrupted sweep goes on, and a further scale draws its own
replies alone.

Shapes: N prompts, P points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from genarm.batch.output import Settings, begin
from genarm.batch.plan import Plan
from genarm.batch.run import BatchJob, context_of, decode
from genarm.engine import Engine
from genarm.errors import ConfigError, DataError, WeightsError
from genarm.files import append_rows
from genarm.lab.judges.interface import Scorer
from genarm.lab.pairs.run import Advance, Row, score_samples
from genarm.provenance import alone, claim, plain
from genarm.statistics import Estimate, bootstrap, mean_difference
from genarm.text.prompts import Prompt

BASE_SCALE = 0.0


@dataclass(frozen=True, kw_only=True)
class Point:
    """Replies under one set of weights.

    Attributes:
        scale: what the weights were multiplied by.
        weights: of all rewards.
        score: the mean over prompts.
        kl: nats a token from the base, over all tokens of all replies.
        tokens: of a reply in the mean.
        gain: the mean score less that at scale 0, prompt by prompt.
        behind: by how much the mean score is below that of the best point, likewise.
        unscored, cut: replies without a score, and those that reached the length limit.
    """

    scale: float
    weights: Mapping[str, float]
    score: Estimate
    kl: Estimate
    tokens: float
    gain: Estimate
    behind: Estimate
    unscored: int
    cut: int


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """All points, the first at scale 0; `best` is the place of the best one within `budget`."""

    points: tuple[Point, ...]
    best: int
    budget: float | None
    max_kl: float | None
    record: Mapping[str, Any]


def ray(weights: Mapping[str, float], scales: Sequence[float], vary: str | None) -> dict[float, dict[str, float]]:
    """{scale: weights}, from 0 on.

    Raises:
        WeightsError: no reward has the name `vary`, or scaling would change nothing.
    """
    if vary is not None and vary not in weights:
        raise WeightsError(f"--vary is {vary!r}, and no reward is named so; this model has: {', '.join(weights)}")
    scaled = [vary] if vary is not None else [*weights]
    if not any(weights[name] for name in scaled):
        raise WeightsError(
            f"the weight of {' and '.join(map(repr, scaled))} is 0, so scaling changes nothing; give --weights "
            f"{scaled[0]}=1"
        )
    return {
        scale: {name: weight * scale if name in scaled else weight for name, weight in weights.items()}
        for scale in sorted({BASE_SCALE, *scales})
    }


def sweep(
    output: Path,
    jobs: Mapping[float, Sequence[BatchJob]],
    conversations: Sequence[Prompt],
    plan: Plan,
    settings: Settings,
    scorer: Scorer,
    *,
    budget: float | None,
    open_engine: Callable[[int, int], Engine],
    advance: Advance,
) -> SweepResult:
    """Draw and score what `output` lacks, and measure.

    Args:
        output: a folder.
        jobs: of each scale, from `genarm.batch.run.make_jobs`.
        conversations: each prompt as the model reads it.
        plan: how replies are drawn.
        settings: of the run; the weights are each scale's own.
        scorer: scores the replies.
        budget: the most nats a token of the best point, in the mean.
        open_engine: loads the model, given how many replies run at once and the positions that one needs; only called
            where replies are missing.
        advance: told of every step.

    Raises:
        DataError: files of other settings or of another origin, or no score at all.
        ConfigError: no point is within the budget.
    """
    drawn: dict[float, list[Row]] = {}
    scored: dict[float, list[float]] = {}
    with ExitStack() as stack:
        engines: list[Engine] = []

        def engine() -> Engine:
            if not engines:
                context = max(context_of(own, plan) for own in jobs.values())
                streams = min(plan.batch_size, max(map(len, jobs.values())))
                engines.append(stack.enter_context(open_engine(streams, context)))
            return engines[0]

        for scale, own in jobs.items():
            given = replace(settings, weights=own[0].weights)
            path = output / f"replies-{scale:g}.jsonl"
            with alone(path):
                drawn[scale] = _draw(path, scale, own, plan, given, engine, advance)
    for scale, rows in drawn.items():
        path = output / f"scores-{scale:g}.jsonl"
        given = replace(settings, weights=jobs[scale][0].weights)
        stage = f"scores at {scale:g}"
        with alone(path):
            digest = claim(path, plain({**given.record, "score": dict(scorer.record)}))
            scores = score_samples(path, rows, conversations, scorer, digest, lambda _, *n, at=stage: advance(at, *n))
        found = [scores[row["index"], row["response"]] for row in rows]
        scored[scale] = [math.nan if score is None else score for score in found]
    return _measured(jobs, drawn, scored, len(conversations), settings, scorer, budget)


def _draw(
    path: Path,
    scale: float,
    jobs: Sequence[BatchJob],
    plan: Plan,
    settings: Settings,
    engine: Callable[[], Engine],
    advance: Advance,
) -> list[Row]:
    """The rows of one point; those that the file lacks are decoded."""
    rows = begin(path, settings)
    stage = f"replies at {scale:g}"
    advance(stage, len(rows), len(jobs))
    if len(rows) < len(jobs):
        for row in decode(engine(), jobs[len(rows) :], plan, settings=settings.digest):
            append_rows(path, [row])
            rows.append(row)
            advance(stage, len(rows), len(jobs))
    return rows


def _measured(
    jobs: Mapping[float, Sequence[BatchJob]],
    drawn: Mapping[float, Sequence[Row]],
    scored: Mapping[float, Sequence[float]],
    prompts: int,
    settings: Settings,
    scorer: Scorer,
    budget: float | None,
) -> SweepResult:
    if all(math.isnan(score) for scores in scored.values() for score in scores):
        raise DataError("none of the replies has a score; look at the files of replies, and at what scores them")
    columns = {scale: _columns(drawn[scale], scored[scale], prompts) for scale in drawn}
    figures = {
        scale: (
            *bootstrap(lambda score_S1: score_S1, columns_N3[:, :1]),
            *bootstrap(lambda sums_S2: sums_S2[:, :1] / sums_S2[:, 1:], columns_N3[:, 1:]),
        )
        for scale, columns_N3 in columns.items()
    }
    scales = [*drawn]
    within = [scale for scale in scales if budget is None or figures[scale][1].value <= budget]
    if not within:
        least = min(figures[scale][1].value for scale in scales)
        raise ConfigError(
            f"--budget is {budget:g} nats a token, and the nearest of these weights are {least:.3g} away; try smaller "
            "--scales"
        )
    base = columns[scales[0]][:, 0]
    # Not by the scores themselves: where a scorer is silent about the hard prompts of one point, its mean is of others.
    gains = {scale: mean_difference(columns[scale][:, 0], base) for scale in scales}
    if len(within) > 1 and all(math.isnan(gains[scale].value) for scale in within if scale != scales[0]):
        raise DataError(
            "no prompt has a score at scale 0 and at another scale, so none can be told from it; look at the files of "
            "replies, and at what scores them"
        )
    best = max(within, key=lambda scale: -math.inf if math.isnan(gains[scale].value) else gains[scale].value)
    top = columns[best][:, 0]
    points = [
        Point(
            scale=scale,
            weights=jobs[scale][0].weights,
            score=figures[scale][0],
            kl=figures[scale][1],
            tokens=sum(row["tokens"] for row in drawn[scale]) / len(drawn[scale]),
            gain=gains[scale],
            behind=mean_difference(top, columns[scale][:, 0]),
            unscored=sum(map(math.isnan, scored[scale])),
            cut=sum(row["finish_reason"] == "length" for row in drawn[scale]),
        )
        for scale in scales
    ]
    record = plain({**settings.record, "score": dict(scorer.record)})
    return SweepResult(
        points=tuple(points), best=scales.index(best), budget=budget, max_kl=settings.max_kl, record=record
    )


def _columns(rows: Sequence[Row], scores: Sequence[float], prompts: int) -> Any:
    """Of each prompt the mean of its replies' scores, nats and tokens, [N, 3].

    NaN where none has a score, or where nats are not known, whose tokens then do not count either.
    """
    tokens_NS = np.array([row["tokens"] for row in rows], dtype=np.float64).reshape(prompts, -1)
    nats_NS = np.array([math.nan if row["kl"] is None else row["kl"] for row in rows]).reshape(prompts, -1)
    scores_NS = np.array(scores).reshape(prompts, -1)
    known_NS = ~np.isnan(scores_NS)
    with np.errstate(invalid="ignore"):
        score_N = np.where(known_NS, scores_NS, 0.0).sum(axis=1) / known_NS.sum(axis=1)
    nats_N = nats_NS.mean(axis=1)
    return np.stack([score_N, nats_N, np.where(np.isnan(nats_N), math.nan, tokens_NS.mean(axis=1))], axis=1)
