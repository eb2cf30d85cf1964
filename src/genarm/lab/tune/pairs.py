"""`tune_on_pairs`: margins of the rewards of a guided model on preference pairs, and the weights that they speak for.

Beside the result stands `margins.jsonl`, a row for each pair as it is scored; an interrupted run goes on with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genarm.files import append_rows, resume_rows
from genarm.lab.accuracy.figures import Interval, correlation
from genarm.lab.accuracy.models import GuidedFiles
from genarm.lab.accuracy.pairs import PairData
from genarm.lab.accuracy.run import Pass, prepare, score_with
from genarm.lab.accuracy.settings import AccuracySettings
from genarm.lab.tune.regression import Coefficient, Fit, Floats, fit_pairs
from genarm.provenance import AT, Record, alone, claim, content_of, model_record, plain
from genarm.statistics import Proportion, proportion

CHUNK = 16
"""Pairs whose margins are written together."""

Advance = Callable[[str, int, int], None]
"""Called with the stage, how much of it is done, and how much there is."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A reward's weight with its 95% interval.

    Attributes:
        scale: of the reward's margins, the root of their mean square, in nats.
        length: correlation of its margins with how much longer the chosen response is; None where there is none.
        alone: how many pairs the reward has right by itself.
    """

    value: float
    low: float
    high: float
    scale: float
    length: Interval | None
    alone: Proportion

    @property
    def decided(self) -> bool:
        """Whether the pairs say on which side of 0 it is."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True)
class PairResult:
    """Weights from pairs.

    Attributes:
        weights: of each reward.
        beta: what a nat costs.
        fit: the regression.
        before: how many pairs the folder's own weights have right, and these weights.
        pairs: how they were read.
        record: what decides the margins.
    """

    weights: Mapping[str, Weight]
    beta: float
    fit: Fit
    before: Proportion
    own: Mapping[str, float]
    pairs: Pass
    record: Record

    @property
    def values(self) -> dict[str, float]:
        """The weights alone, to three digits: the fourth says nothing."""
        return {name: float(f"{weight.value:.3g}") for name, weight in self.weights.items()}


def open_pairs(guided: GuidedFiles, data: PairData, settings: AccuracySettings) -> tuple[Pass, Record]:
    """The pairs as the model reads them, and what decides their margins (raises DataError, ConfigError)."""
    pairs = prepare(guided, data, settings)
    record = {
        "model": model_record(guided.files.reference, guided.files.revision),
        "wishes": guided.files.added_wishes,
        "pairs": {AT: settings.data, "rows": content_of(map(dict, data.rows))},
        "read": {name: getattr(settings, name) for name in ("objective", "raw", "template_arg", "dtype", "device")},
        "limits": asdict(pairs.limit),
    }
    return pairs, plain(record)


def tune_on_pairs(
    output: Path, pairs: Pass, record: Record, settings: AccuracySettings, *, beta: float, seed: int, advance: Advance
) -> PairResult:
    """Score what `output`/margins.jsonl lacks, and fit.

    Raises:
        DataError: margins of other settings or of another origin, or a reward that never tells two responses apart.
        GenarmError: whatever loading and scoring raise.
    """
    guided = pairs.files
    assert isinstance(guided, GuidedFiles)
    rewards = {column: less for _, column, _, less in guided.rewards}
    margins = output / "margins.jsonl"
    with alone(margins):
        rows = _margins(margins, pairs, rewards, record, settings, advance)
    margins_NK = np.array([[row["margins"][name] for name in rewards] for row in rows])
    longer_N = np.array([row["chosen_tokens"] - row["rejected_tokens"] for row in rows], dtype=np.float64)
    prompts = [tuple(pair.prompt_ids) for pair in pairs.encoded.pairs]
    fit = fit_pairs(margins_NK, prompts, [*rewards], seed=seed)
    own = [guided.config.default_weights[name] for name in rewards]
    return PairResult(
        weights={
            name: _weight(of, margins_N, longer_N, beta)
            for name, of, margins_N in zip(rewards, fit.coefficients, margins_NK.T, strict=True)
        },
        beta=beta,
        fit=fit,
        before=_right(margins_NK @ np.array(own)),
        own=dict(zip(rewards, own, strict=True)),
        pairs=pairs,
        record=record,
    )


def _margins(
    path: Path,
    pairs: Pass,
    rewards: Mapping[str, str | None],
    record: Record,
    settings: AccuracySettings,
    advance: Advance,
) -> list[dict[str, Any]]:
    """A row for every pair, in order; `rewards` are columns, each with the one that is taken away from it."""
    digest = claim(path, record)
    rows = resume_rows(path, digest)
    total = len(pairs.encoded.pairs)
    scored = 2 * len(rows)

    def count(_: str, responses: int) -> None:
        nonlocal scored
        scored += responses
        advance("responses", scored, 2 * total)

    count("", 0)
    if len(rows) < total:
        model = pairs.files.load(dtype=settings.dtype, device=settings.device)
        for start in range(len(rows), total, CHUNK):
            part = Pass(files=pairs.files, limit=pairs.limit, encoded=pairs.encoded.part(start, start + CHUNK))
            scores = score_with(model, part, settings.batch_size, count)
            found = {
                column: (scores[column] if less is None else scores[column].minus(scores[less])).margin_B
                for column, less in rewards.items()
            }
            new = [
                {
                    "row": row,
                    "margins": {name: float(margin_B[number]) for name, margin_B in found.items()},
                    "chosen_tokens": len(pair.chosen_ids),
                    "rejected_tokens": len(pair.rejected_ids),
                    "settings": digest,
                }
                for number, (row, pair) in enumerate(zip(part.encoded.rows, part.encoded.pairs, strict=True))
            ]
            append_rows(path, new)
            rows += new
    return rows


def _weight(of: Coefficient, margins_N: Floats, longer_N: Floats, beta: float) -> Weight:
    value, low, high = (part / beta for part in (of.value, of.low, of.high))
    length = correlation(margins_N, longer_N)
    return Weight(value=value, low=low, high=high, scale=of.scale, length=length, alone=_right(margins_N))


def _right(margins_N: Floats) -> Proportion:
    return proportion(int((margins_N > 0).sum()), len(margins_N))


def certainty(result: PairResult) -> Sequence[str]:
    """What the pairs decide and what they leave open, a sentence for each reward and one of the whole."""
    n = result.fit.pairs
    said = []
    for name, weight in result.weights.items():
        tells = (
            f"so {'what it likes' if weight.low > 0 else 'the opposite of what it likes'} was preferred"
            if weight.decided
            else "so they do not tell whether it should count for or against"
        )
        said.append(
            f"with {n} pairs the weight of {name} is between {weight.low:.2g} and {weight.high:.2g} (95%), {tells}"
        )
    held = result.fit.held_out
    if held is None:
        return [*said, "all pairs have one prompt, so nothing says what the weights are worth on another"]
    worth = "better than chance" if held.low > 0.5 else "no better than chance, as far as they show"
    return [
        *said,
        f"on prompts that were held out the fitted weights have {held.count} of {held.n} pairs right: {worth}",
    ]
