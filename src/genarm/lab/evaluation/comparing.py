"""Verdicts of judges that compare: an LLM in both orders, or AlpacaEval 2.

Everything that an endpoint has said is kept, so that nothing is asked twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from pydantic import Field, FiniteFloat
from rich.console import Console

from genarm.data.tables import read_table
from genarm.errors import ConfigError, DataError
from genarm.files import append_rows
from genarm.lab.evaluation.answers import Answers
from genarm.lab.evaluation.prompts import Question
from genarm.lab.evaluation.recipe import JudgeSpec, Recipe, slug
from genarm.lab.evaluation.results import Verdicts
from genarm.lab.judges.alpaca_eval import Annotation, Output, annotate, win_rates
from genarm.lab.judges.cache import ReplyCache
from genarm.lab.judges.llm import Pair, Summary, judge_pairs, summarise
from genarm.lab.judges.protocol import Protocol, load_protocol
from genarm.lab.judges.settings import ClientSettings
from genarm.statistics import Outcome
from genarm.terminal import Bar

COMPARING = ("llm", "alpaca-eval")
"""Kinds of judges that compare."""

CHARACTERS = 4
"""Of a token, for estimates."""


@dataclass(frozen=True, kw_only=True)
class Calls:
    """What a judge would be asked: calls of an endpoint, tokens read and written, and their price if known."""

    judge: str
    calls: int = 0
    tokens: float = 0.0
    price: float | None = None


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
    if judge.kind == "alpaca-eval":
        return _alpaca_eval(where, judge, recipe, questions, answers)
    return _llm(where, judge, recipe, questions, answers, console)


def announce(recipe: Recipe, console: Console) -> None:
    """Say what endpoints will be asked, and look for their keys, before anything is made (raises ConfigError)."""
    for judge, expected in zip(recipe.judges, calls(recipe), strict=True):
        if judge.kind in COMPARING:
            settings, _ = _endpoint(judge, judge.source if judge.kind == "alpaca-eval" else _model(judge))
            settings.find_key()
            price = "" if expected.price is None else f", {expected.price:,.2f} at the given prices"
            asked = f"{judge.name} will be asked {expected.calls:,} times at most: {expected.tokens:,.0f} tokens{price}"
            console.print(asked, highlight=False, markup=False)


def pairs_of(recipe: Recipe) -> list[tuple[str, str]]:
    """The recipe's comparisons, then every other method against the reference."""
    compared = {frozenset(pair) for pair in recipe.comparisons}
    others = [(method.name, recipe.reference) for method in recipe.methods if method.name != recipe.reference]
    return [*recipe.comparisons, *(pair for pair in others if frozenset(pair) not in compared)]


def _llm(
    where: Path,
    judge: JudgeSpec,
    recipe: Recipe,
    questions: Sequence[Question],
    answers: Mapping[str, Answers],
    console: Console,
) -> tuple[list[Verdicts], list[str]]:
    protocol = load_protocol(judge.source)
    settings, _ = _endpoint(judge, protocol.model)
    settings.find_key()
    cache = ReplyCache(where / "replies")
    found: list[Verdicts] = []
    notes: list[str] = []
    for first, second in pairs_of(recipe):
        pairs = [
            Pair(prompt=question.prompt, first=one, second=other)
            for question, one, other in zip(questions, answers[first].replies, answers[second].replies, strict=True)
        ]
        with Bar(console=console) as progress:
            task = progress.add_task(f"{judge.name}: {first} against {second}", total=2 * len(pairs))
            judged = judge_pairs(pairs, protocol, settings, cache, lambda task=task: progress.advance(task))  # type: ignore[misc]
        rows = [{"index": i, **verdict.record()} for i, verdict in enumerate(judged)]
        found.append(_written(where, judge, first, second, [v.outcome for v in judged], rows))
        notes += _note(f"{judge.name}, {first} against {second}", summarise(judged))
    return found, notes


def _written(
    where: Path,
    judge: JudgeSpec,
    first: str,
    second: str,
    outcomes: Sequence[Outcome | None],
    rows: Sequence[Mapping[str, object]],
) -> Verdicts:
    path = where / f"{slug(first)}--{slug(second)}.jsonl"
    path.unlink(missing_ok=True)  # made anew from what the endpoint has said
    append_rows(path, rows)
    return Verdicts(judge=judge.name, first=first, second=second, outcomes=tuple(outcomes))


def _note(about: str, summary: Summary) -> list[str]:
    if not summary.unparsed + summary.failed + summary.inconsistent:
        return []
    lost = f"{summary.unparsed} replies could not be read, {summary.failed} calls failed"
    bias = f"{summary.inconsistent} verdicts changed with the order ({summary.for_first} for the answer shown first)"
    return [f"{about}: {lost}, {bias}, of {summary.items}"]


def _alpaca_eval(
    where: Path, judge: JudgeSpec, recipe: Recipe, questions: Sequence[Question], answers: Mapping[str, Answers]
) -> tuple[list[Verdicts], list[str]]:
    settings, _ = _endpoint(judge, judge.source)
    found: list[Verdicts] = []
    notes: list[str] = []
    for first, second in pairs_of(recipe):
        replies = zip(questions, answers[first].replies, answers[second].replies, strict=True)
        outputs = [
            Output(index=i, instruction=question.text, output=one, reference=other)
            for i, (question, one, other) in enumerate(replies)
        ]
        annotations = annotate(outputs, where / f"{slug(first)}--{slug(second)}", settings)
        outcomes = [_outcome(annotation) for annotation in annotations]
        rows = [
            {"index": a.index, "outcome": outcome, "preference": a.preference}
            for a, outcome in zip(annotations, outcomes, strict=True)
        ]
        found.append(_written(where, judge, first, second, outcomes, rows))
        notes.append(f"{judge.name}, {first} against {second}: {_rates(annotations)}")
    return found, notes


def _outcome(annotation: Annotation) -> Outcome | None:
    if annotation.preference is None:
        return None
    return "tie" if annotation.preference == 1.5 else "win" if annotation.preference > 1.5 else "lose"


def _rates(annotations: Sequence[Annotation]) -> str:
    try:
        rates = win_rates(annotations)
    except DataError as error:  # the verdicts are there all the same
        return f"no length control: {error}"
    return (
        f"raw win rate {rates.raw:.1f}% (standard error {rates.raw_error:.1f}), length-controlled "
        f"{rates.controlled:.1f}% ({rates.controlled_error:.1f}), n={rates.n}, {rates.missing} missing"
    )


def _model(judge: JudgeSpec) -> str | None:
    return load_protocol(judge.source).model


def _endpoint(judge: JudgeSpec, model: str | None) -> tuple[ClientSettings, tuple[float | None, float | None]]:
    """Whom to ask, and the prices of a million tokens read and written."""
    given = {"model": model, **judge.settings}
    price = Annotated[FiniteFloat, Field(ge=0)] | None
    price_in, price_out = (
        read_table(price, given.pop(key, None), f"judge {judge.name!r}: {key}") for key in ("price_in", "price_out")
    )
    allowed = [field.name for field in fields(ClientSettings)]
    unknown = [key for key in given if key not in allowed]
    if unknown or given["model"] is None:
        what = f"has the unknown setting {unknown[0]!r}" if unknown else "names no model, and its protocol names none"
        raise ConfigError(f"judge {judge.name!r} {what}; settings are {', '.join(allowed)}, price_in and price_out")
    return ClientSettings(**given), (price_in, price_out)


def calls(recipe: Recipe) -> tuple[Calls, ...]:
    """What each judge would be asked at most: every reply at full length, every verdict as long as it may be."""
    return tuple(_calls(judge, recipe) for judge in recipe.judges)


def _calls(judge: JudgeSpec, recipe: Recipe) -> Calls:
    if judge.kind not in COMPARING:
        return Calls(judge=judge.name)
    protocol: Protocol = load_protocol(judge.source if judge.kind == "llm" else "pairwise")
    _, (price_in, price_out) = _endpoint(judge, protocol.model or judge.source)
    orders, verdict = (2, protocol.reply_limit) if judge.kind == "llm" else (1, 1)
    count = orders * len(pairs_of(recipe)) * recipe.prompts.count
    frame = sum(len(message["content"]) for message in protocol.messages("", "", "")) / CHARACTERS
    read = count * (frame + 3 * recipe.sampling.max_new_tokens)  # two replies, and a prompt of about the same length
    written = count * verdict
    price = None if price_in is None or price_out is None else (read * price_in + written * price_out) / 1e6
    return Calls(judge=judge.name, calls=count, tokens=read + written, price=price)
