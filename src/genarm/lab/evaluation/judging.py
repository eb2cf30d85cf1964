"""What the judges say of all answers: scores of single replies, and verdicts on pairs of them.

judgements/JUDGE/METHOD.jsonl     a score for each reply
judgements/JUDGE/A--B.jsonl       a verdict on each pair of replies, with all that an LLM said
judgements/JUDGE/replies/         what an LLM has said; nothing is asked twice
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console

from genarm.errors import DataError
from genarm.files import append_rows, resume_rows
from genarm.lab.evaluation.answers import Answers
from genarm.lab.evaluation.comparing import compare_all
from genarm.lab.evaluation.prompts import Question
from genarm.lab.evaluation.provenance import scores_record
from genarm.lab.evaluation.recipe import Recipe, slug
from genarm.lab.evaluation.results import Verdicts
from genarm.lab.judges.interface import Item
from genarm.lab.judges.kinds import JUDGES, JudgeSpec
from genarm.lab.methods.models import Models
from genarm.provenance import claim

CHUNK = 50
"""Scores that are written together."""


Scores: TypeAlias = dict[str, dict[str, tuple[float, ...]]]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """{method: {judge: score of each reply}}, every verdict, and what a reader must know of them."""

    scores: Scores
    verdicts: tuple[Verdicts, ...]
    notes: tuple[str, ...]


def judge_all(
    folder: Path,
    recipe: Recipe,
    questions: Sequence[Question],
    answers: Mapping[str, Answers],
    models: Models,
    console: Console,
) -> Judged:
    """Have every judge judge what it has not yet.

    Raises:
        ConfigError, MemberError: a judge that cannot be had.
        DataError: judgements of other settings, or a score that is no number.
    """
    scores: Scores = {method.name: {} for method in recipe.methods}
    verdicts: list[Verdicts] = []
    notes: list[str] = []
    for judge in recipe.judges:
        where = folder / slug(judge.name)
        if JUDGES[judge.kind].comparer is not None:
            compared, about = compare_all(where, judge, recipe, questions, answers, console)
            verdicts += compared
            notes += about
            continue
        for method in recipe.methods:
            scores[method.name][judge.name] = _score_all(
                where / f"{slug(method.name)}.jsonl",
                judge,
                models,
                questions,
                answers[method.name],
                method.name,
            )
        notes += _all_alike(judge.name, [score for of in scores.values() for score in of[judge.name]])
    return Judged(scores=scores, verdicts=tuple(verdicts), notes=tuple(notes))


def check_judges(recipe: Recipe, questions: Sequence[Question], models: Models) -> None:
    """Find out whether the judges of single replies can judge, before anything is trained or answered.

    Raises:
        ConfigError: a function that cannot be had.
        DataError: a prompt without what a judge needs of its row.
    """
    rows = [_row(question) for question in questions]
    for judge in recipe.judges:
        if JUDGES[judge.kind].comparer is None:
            JUDGES[judge.kind].scores(judge.source, models).check(rows)


def _all_alike(judge: str, scores: Sequence[float]) -> list[str]:
    """A note of a judge that tells nothing apart: more often it cannot read the replies than they are all alike."""
    if len(scores) < 2 or len(set(scores)) > 1:
        return []
    return [f"{judge} gave {scores[0]:g} to all {len(scores)} replies; see that it can read them before you believe it"]


def _row(question: Question) -> dict[str, Any]:
    return {**question.row, "prompt": question.prompt}


def _score_all(
    path: Path, judge: JudgeSpec, models: Models, questions: Sequence[Question], answers: Answers, method: str
) -> tuple[float, ...]:
    settings = claim(path, scores_record(judge, method, models, questions, answers))
    rows = resume_rows(path, settings)
    replies = [
        Item(prompt=question.prompt, response=text, row=_row(question), ids=(question.ids, ids))
        for question, text, ids in zip(questions, answers.replies, answers.token_ids, strict=True)
    ]
    if len(rows) == len(replies):
        return tuple(float(row["score"]) for row in rows)
    scorer = JUDGES[judge.kind].scores(judge.source, models)
    for start in range(len(rows), len(replies), CHUNK):
        part = replies[start : start + CHUNK]
        new = [
            {"index": index, "score": _finite(score, judge.name, index), "settings": settings}
            for index, score in enumerate(scorer.score(part), start=start)
        ]
        append_rows(path, new)
        rows += new
    return tuple(float(row["score"]) for row in rows)


def _finite(score: float | None, judge: str, index: int) -> float:
    if score is None or not math.isfinite(score):
        raise DataError(f"{judge} scores answer {index} with {score}; a score must be a finite number")
    return score
