"""Verdicts of the judges that compare, on pairs of methods; all that an endpoint has said is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from genarm.files import append_rows
from genarm.lab.evaluation.answers import Answers
from genarm.lab.evaluation.prompts import Question
from genarm.lab.evaluation.recipe import Recipe, slug
from genarm.lab.evaluation.results import Verdicts
from genarm.lab.judges.comparing import Calls
from genarm.lab.judges.kinds import JUDGES, JudgeSpec
from genarm.lab.judges.llm import Pair
from genarm.terminal import Bar


def compare_all(
    where: Path,
    judge: JudgeSpec,
    recipe: Recipe,
    questions: Sequence[Question],
    answers: Mapping[str, Answers],
    console: Console,
) -> tuple[list[Verdicts], list[str]]:
    """The verdicts of a judge that compares, written to `where` as well, and what a reader must know of them.

    Raises:
        ConfigError: the judge's settings, or an endpoint that does not take them.
        MissingExtraError: AlpacaEval without its package.
    """
    comparer = JUDGES[judge.kind].comparer
    assert comparer is not None
    found: list[Verdicts] = []
    notes: list[str] = []
    for first, second in pairs_of(recipe):
        about, name = f"{judge.name}, {first} against {second}", f"{slug(first)}--{slug(second)}"
        pairs = [
            Pair(prompt=question.prompt, first=one, second=other, row=question.row, number=question.number)
            for question, one, other in zip(questions, answers[first].replies, answers[second].replies, strict=True)
        ]
        with Bar(console=console) as progress:
            task = progress.add_task(about.replace(",", ":", 1), total=comparer.orders * len(pairs))
            result = comparer.compare(judge, pairs, where, name, lambda task=task: progress.advance(task))
        path = where / f"{name}.jsonl"
        path.unlink(missing_ok=True)  # made anew from what the endpoint has said
        append_rows(path, result.rows)
        found.append(Verdicts(judge=judge.name, first=first, second=second, outcomes=tuple(result.outcomes)))
        notes += [f"{about}: {result.note}"] if result.note else []
    return found, notes


def announce(recipe: Recipe, console: Console) -> None:
    """Say what endpoints will be asked, and look for their keys, before anything is made (raises ConfigError)."""
    for judge, expected in zip(recipe.judges, calls(recipe), strict=True):
        comparer = JUDGES[judge.kind].comparer
        if comparer is not None:
            comparer.endpoint(judge)[0].find_key()
            price = "" if expected.price is None else f", {expected.price:,.2f} at the given prices"
            asked = f"{judge.name} will be asked {expected.calls:,} times at most: {expected.tokens:,.0f} tokens{price}"
            console.print(asked, highlight=False, markup=False)


def calls(recipe: Recipe) -> tuple[Calls, ...]:
    """What each judge would be asked at most: every reply at full length, every verdict as long as it may be."""
    pairs, tokens = len(pairs_of(recipe)) * recipe.prompts.count, recipe.sampling.max_new_tokens
    comparers = [JUDGES[judge.kind].comparer for judge in recipe.judges]
    return tuple(
        comparer.calls(judge, pairs, tokens) if comparer else Calls(judge=judge.name)
        for judge, comparer in zip(recipe.judges, comparers, strict=True)
    )


def pairs_of(recipe: Recipe) -> list[tuple[str, str]]:
    """The recipe's comparisons, then every other method against the reference."""
    compared = {frozenset(pair) for pair in recipe.comparisons}
    others = [(method.name, recipe.reference) for method in recipe.methods if method.name != recipe.reference]
    return [*recipe.comparisons, *(pair for pair in others if frozenset(pair) not in compared)]
