"""`make_pairs`: sample responses, score them, keep pairs; in three stages, each of which a killed run goes on with.

Beside FILE.jsonl stand

    FILE.samples.jsonl    every response, as `genarm generate` writes them
    FILE.scores.jsonl     the score of every different response
    FILE.jsonl.settings.json
    FILE.jsonl.replies/   of a judge, as they come

Samples and scores are written as they come. The pairs are written at once, when all scores are there; the settings
get the counts last of all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from genarm.batch.output import Settings as SampleSettings
from genarm.batch.output import begin
from genarm.batch.plan import Plan
from genarm.batch.run import BatchJob, context_of, decode
from genarm.engine import Engine
from genarm.errors import DataError
from genarm.files import append_rows, keep_rows, resume_rows, write_text
from genarm.lab.judges.interface import Item, Scorer
from genarm.lab.pairs.select import Scored, Selected, Selection, select
from genarm.provenance import Record, alone, claim, note, plain, settings_file
from genarm.text.prompts import Message, Prompt

Row = dict[str, Any]
Advance = Callable[[str, int, int], None]
"""Called with the stage ("replies", "scores"), how much of it is done, and how much there is."""

CHUNK = 64
"""Responses that are scored together; a killed run scores the last chunk again."""


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """Everything that decides what the pairs are.

    Attributes:
        sampling: of the responses.
        score: what scores them (`Scorer.record`).
        selection: which become pairs.
    """

    sampling: SampleSettings
    score: Mapping[str, Any]
    selection: Selection

    @property
    def record(self) -> Record:
        """All of it, as JSON has it."""
        selection = {"select": self.selection.which, "margin": self.selection.margin}
        return plain({**self.sampling.record, "score": dict(self.score), **selection})


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What became of the responses.

    Attributes:
        prompts: all of them, and `prompts_used` those that gave a pair.
        responses: all that were sampled; `cut` of them reached the length limit.
        empty: responses dropped because they have no word.
        identical: responses dropped because they repeat another to the same prompt.
        unscored: different responses dropped because their scorer gave no score.
        lone: prompts with fewer than two different scored responses.
        ties: candidate pairs dropped because their scores are not far enough apart.
        pairs: what was written, and the means of its scores.
    """

    prompts: int
    prompts_used: int
    responses: int
    cut: int
    empty: int
    identical: int
    unscored: int
    lone: int
    ties: int
    pairs: int
    mean_score_chosen: float
    mean_score_rejected: float


def make_pairs(
    output: Path,
    jobs: Sequence[BatchJob],
    conversations: Sequence[Prompt],
    plan: Plan,
    settings: PairSettings,
    scorer: Scorer,
    *,
    open_engine: Callable[[int, int], Engine],
    advance: Advance,
) -> Counts:
    """Write the pairs to `output`, going on with what an interrupted run has left.

    Args:
        output: FILE.jsonl.
        jobs: from `genarm.batch.run.make_jobs`.
        conversations: each prompt as the model reads it (`ModelFiles.conversation`).
        plan: how responses are sampled.
        settings: what the files beside `output` must have been made with.
        scorer: scores them.
        open_engine: loads the model, given how many replies run at once and the positions that one needs; only called
            where responses are missing.
        advance: told of every step.

    Raises:
        DataError: files of other settings or of another origin (the setting is named), files that another run is
            writing, or no pair at all.
    """
    with alone(output):
        sampled, scored = _beside(output, "samples"), _beside(output, "scores")
        digest = claim(output, settings.record, parts=(sampled, scored))
        samples = _sample(sampled, jobs, plan, settings.sampling, open_engine, advance)
        scores = score_samples(scored, samples, conversations, scorer, digest, advance)
        selected = [select(group, settings.selection) for group in _by_prompt(samples, scores, len(conversations))]
        rows = [
            row for prompt, chosen in zip(conversations, selected, strict=True) for row in _pair_rows(prompt, chosen)
        ]
        counts = _count(samples, selected)
        if not rows:
            if all(score is None for score in scores.values()):
                why = scorer.why_none(_item(samples[0], conversations))
                raise DataError(f"no pairs: none of the {len(scores)} different responses has a score; {why}")
            raise DataError(
                f"no pairs: of {counts.prompts} prompts, {counts.lone} have fewer than two different scored responses "
                f"and {counts.ties} tie; sample more, at a higher temperature, or use a finer score, with another "
                "--output"
            )
        write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        note(settings_file(output), settings.record, counts=asdict(counts))
        return counts


def _beside(output: Path, what: str) -> Path:
    """FILE.jsonl → FILE.`what`.jsonl."""
    return output.with_name(f"{output.name.removesuffix('.jsonl')}.{what}.jsonl")


def _pair_rows(prompt: Prompt, selected: Selected) -> Iterator[Row]:
    """Rows in TRL's format: messages for a conversation, text for a text."""
    for better, worse in selected.pairs:
        yield {
            "prompt": prompt,
            "chosen": _reply(prompt, better.response),
            "rejected": _reply(prompt, worse.response),
            "score_chosen": better.score,
            "score_rejected": worse.score,
            "seed_chosen": better.seed,
            "seed_rejected": worse.seed,
        }


def _reply(prompt: Prompt, response: str) -> str | list[Message]:
    return response if isinstance(prompt, str) else [{"role": "assistant", "content": response}]


# --- the stages -----------------------------------------------------------------------------------------------


def _sample(
    path: Path,
    jobs: Sequence[BatchJob],
    plan: Plan,
    settings: SampleSettings,
    open_engine: Callable[[int, int], Engine],
    advance: Advance,
) -> list[Row]:
    """The row of every job; those that the file lacks are decoded."""
    rows = begin(path, settings)
    done = len(rows)
    advance("replies", done, len(jobs))
    if done < len(jobs):
        with open_engine(min(plan.batch_size, len(jobs) - done), context_of(jobs, plan)) as engine:
            for row in decode(engine, jobs[done:], plan, settings=settings.digest):
                append_rows(path, [row])
                rows.append(row)
                advance("replies", len(rows), len(jobs))
    return rows


def score_samples(
    path: Path,
    samples: Sequence[Row],
    conversations: Sequence[Prompt],
    scorer: Scorer,
    digest: str,
    advance: Advance,
) -> dict[tuple[int, str], float | None]:
    """The score of every different response by (prompt's index, response); chunks that the file lacks are scored.

    Args:
        path: the file of scores.
        samples: rows of `genarm.batch.run.decode`.
        conversations: each prompt as the model reads it.
        scorer: scores the responses.
        digest: of the settings, which each row of the file carries.
        advance: told of every step.

    Raises:
        DataError: rows of other settings, or a scorer that fails.
    """
    different: dict[tuple[int, str], Row] = {}
    for sample in samples:
        different.setdefault((sample["index"], sample["response"]), sample)
    todo = list(different.values())
    rows = resume_rows(path, digest)
    if len(rows) < len(todo):
        whole = len(rows) // CHUNK * CHUNK
        if whole < len(rows):
            keep_rows(path, whole)
        rows = rows[:whole]
    advance("scores", len(rows), len(todo))
    for start in range(len(rows), len(todo), CHUNK):
        chunk = todo[start : start + CHUNK]
        scores = scorer.score([_item(row, conversations) for row in chunk])
        new = [
            {"index": row["index"], "sample": row["sample"], "score": score, "settings": digest}
            for row, score in zip(chunk, scores, strict=True)
        ]
        append_rows(path, new)
        rows += new
        advance("scores", len(rows), len(todo))
    return {key: row["score"] for key, row in zip(different, rows, strict=True)}


_SAMPLED = ("index", "sample", "response", "finish_reason", "tokens", "seed", "weights", "settings")


def _item(row: Row, conversations: Sequence[Prompt]) -> Item:
    """A response with the row of the prompt file that it answers."""
    own = {key: value for key, value in row.items() if key not in _SAMPLED}
    return Item(prompt=conversations[row["index"]], response=row["response"], row=own)


def _by_prompt(
    samples: Sequence[Row], scores: Mapping[tuple[int, str], float | None], prompts: int
) -> list[list[Scored]]:
    groups: list[list[Scored]] = [[] for _ in range(prompts)]
    for row in samples:
        index, response = row["index"], row["response"]
        groups[index].append(
            Scored(
                response=response,
                score=scores[index, response],
                seed=row["seed"],
                cut=row["finish_reason"] == "length",
            )
        )
    return groups


def _count(samples: Sequence[Row], selected: Sequence[Selected]) -> Counts:
    pairs = [pair for one in selected for pair in one.pairs]
    chosen, rejected = (sum(pair[side].score or 0.0 for pair in pairs) for side in (0, 1))
    return Counts(
        prompts=len(selected),
        prompts_used=sum(bool(one.pairs) for one in selected),
        responses=len(samples),
        cut=sum(row["finish_reason"] == "length" for row in samples),
        empty=sum(one.empty for one in selected),
        identical=sum(one.identical for one in selected),
        unscored=sum(one.unscored for one in selected),
        lone=sum(one.lone for one in selected),
        ties=sum(one.ties for one in selected),
        pairs=len(pairs),
        mean_score_chosen=chosen / max(1, len(pairs)),
        mean_score_rejected=rejected / max(1, len(pairs)),
    )
