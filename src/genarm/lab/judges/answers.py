"""Two files of `genarm generate`, matched row by row: what `genarm judge` compares."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from genarm.errors import DataError
from genarm.lab.judges.llm import Pair

Place: TypeAlias = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Matched:
    """The answers of both files in one place: reply `sample` to prompt `index`."""

    index: int
    sample: int
    pair: Pair


def match_answers(first: Path, second: Path) -> list[Matched]:
    """The answers of both files, each prompt's beside each other, in the order of the prompts.

    Raises:
        DataError: a file cannot be read or is not one of answers, or the two do not answer the same prompts.
    """
    ours, theirs = _read(first), _read(second)
    for lacking, missing in ((second, sorted(set(ours) - set(theirs))), (first, sorted(set(theirs) - set(ours)))):
        if missing:
            raise DataError(
                f"{lacking} lacks {len(missing)} answers that the other file has, such as {_name(missing[0])}; judge "
                "two files that answer the same prompts"
            )
    matched = []
    for place in sorted(ours):
        one, other = ours[place], theirs[place]
        if one["prompt"] != other["prompt"]:
            raise DataError(f"{first} and {second} differ in the prompt of {_name(place)}; judge answers to the same")
        pair = Pair(prompt=one["prompt"], first=one["response"], second=other["response"])
        matched.append(Matched(index=place[0], sample=place[1], pair=pair))
    return matched


def _read(path: Path) -> dict[Place, Mapping[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; expected a file of genarm generate --output") from error
    rows: dict[Place, Mapping[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place, row = _row(line, f"{path}, line {number}")
        if place in rows:
            raise DataError(f"{path}, line {number} is a second answer to {_name(place)}")
        rows[place] = row
    if not rows:
        raise DataError(f"{path} has no answers; expected a file of genarm generate --output")
    return rows


def _row(line: str, where: str) -> tuple[Place, Mapping[str, Any]]:
    try:
        row = json.loads(line)
        place = (row["index"], row.get("sample", 0))
        good = all(type(part) is int for part in place) and isinstance(row["response"], str) and row["prompt"]
    except (ValueError, LookupError, TypeError, AttributeError):
        good = False
    if not good:
        raise DataError(f'{where} is no answer; expected {{"index": …, "prompt": …, "response": "…"}}')
    return place, row


def _name(place: Place) -> str:
    index, sample = place
    return f"index {index}" + (f", sample {sample}" if sample else "")
