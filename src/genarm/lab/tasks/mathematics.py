"""Word problems with a number as the answer, in the form of GSM8K (Cobbe et al., arXiv 2110.14168).

A problem is a row {question, answer} whose answer ends with `#### N`. A response is right if the last number in it
equals N exactly. Pairs for training come from rows that hold right and wrong solutions by several models.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from genarm.data.sources import load_rows
from genarm.errors import DataError
from genarm.statistics import Proportion, proportion
from genarm.text.prompts import as_conversation

PROMPT = "{question}\n\nReason step by step. The last line is 'A: ' and the answer, a number alone."

# A sign belongs to a number unless it stands after a letter, a digit or a bracket, where it means "minus" or "to".
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]])[-−])?(?P<currency>[$€£¥])?(?P<late>(?<=[$€£¥])[-−])?"
    r"(?P<digits>(?<![0-9])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
)

_BEFORE_A_PART = re.compile(r"[0-9.]\s*(?:[/^]|[eE][-+]?)\s*$")
"""Before a denominator or an exponent, which would be the last number of 1/2 or 6e23."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question and the number that answers it."""

    question: str
    gold: Decimal

    @property
    def prompt(self) -> str:
        """The question as a model reads it."""
        return PROMPT.format(question=self.question)


def last_number(text: str) -> Decimal | None:
    """The last number in `text`, or None: digits with commas between thousands, a decimal point, a sign, a currency."""
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    found = numbers[-1]
    value = Decimal(found["digits"].replace(",", ""))
    return value.copy_negate() if found["sign"] or found["late"] else value


def gold_number(answer: str) -> Decimal:
    """The number after the last `####`, or the last number of a text without that mark.

    Raises:
        DataError: there is none.
    """
    text = answer.rpartition("####")[2]
    number = last_number(text)
    if number is None:
        raise DataError(f"the answer {answer[-60:]!r} has no number; expected one that ends with '#### N'")
    if _BEFORE_A_PART.search(text[: [*_NUMBER.finditer(text)][-1].start()]):
        raise DataError(f"the answer {answer[-60:]!r} ends with a part of a number; write it in digits, such as 0.5")
    return number


def read_problems(path: str | Path) -> list[Problem]:
    """The problems of a file of rows {question, answer} (raises DataError, naming the row)."""
    return [_problem(row, f"{path}, row {number}") for number, row in enumerate(load_rows(str(path), split="train"))]


def _problem(row: Mapping[str, Any], where: str) -> Problem:
    question, answer = row.get("question"), row.get("answer")
    if not (isinstance(question, str) and isinstance(answer, str)):
        raise DataError(f"{where}: the keys are {', '.join(row)}; expected the texts 'question' and 'answer'")
    try:
        return Problem(question=question, gold=gold_number(answer))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def score(problem: Problem, response: str) -> float:
    """1 if the last number of `response` is the answer, else 0."""
    return float(last_number(response) == problem.gold)


def accuracy(problems: Sequence[Problem], responses: Sequence[str]) -> Proportion:
    """The share of `problems` that their `responses` answer."""
    right = sum(score(p, r) for p, r in zip(problems, responses, strict=True))
    return proportion(int(right), len(problems))


# --- pairs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PairSplit:
    """Pairs in TRL's conversational format; no question is in both parts."""

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]


def read_pairs(path: str | Path, *, held_out: float = 0.1, seed: int = 0) -> PairSplit:
    """Every right solution of a question against every wrong one, with the share `held_out` of the questions kept.

    Args:
        path: rows with "question", and one object {is_correct, solution} for each model.
        held_out: between 0 and 1.
        seed: of the split.

    Raises:
        DataError: rows of another form, or fewer than two questions with both kinds of solution.
    """
    pairs: dict[str, list[dict[str, Any]]] = {}
    for row in load_rows(str(path), split="train"):
        pairs.setdefault(str(row.get("question")), []).extend(_pairs(row))
    questions = [question for question, own in pairs.items() if own]
    if len(questions) < 2:
        raise DataError(
            f"{path} has {len(questions)} questions with a right and a wrong solution; expected at least 2 rows with a "
            "'question' and objects {'is_correct': …, 'solution': …}"
        )
    random.Random(f"questions {seed}").shuffle(questions)
    kept = min(len(questions) - 1, max(1, round(held_out * len(questions))))
    return PairSplit(
        train=[pair for question in questions[kept:] for pair in pairs[question]],
        held_out=[pair for question in questions[:kept] for pair in pairs[question]],
    )


def _pairs(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    solutions = [value for value in row.values() if isinstance(value, Mapping) and "is_correct" in value]
    right, wrong = (
        dict.fromkeys(str(s["solution"]) for s in solutions if bool(s["is_correct"]) is kind) for kind in (True, False)
    )
    prompt = as_conversation(PROMPT.format(question=row.get("question")))
    return [
        {
            "prompt": prompt,
            "chosen": [{"role": "assistant", "content": good}],
            "rejected": [{"role": "assistant", "content": bad}],
        }
        for good in right
        for bad in wrong
        if good not in wrong and bad not in right
    ]
