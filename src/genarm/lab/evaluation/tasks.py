"""Pairs for a reward from the data of a task: right and wrong solutions, held-out ones on other problems.

Written into the run's `pairs/`: `NAME.jsonl` to train on, `NAME-held-out.jsonl` to measure accuracy on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genarm.errors import ConfigError
from genarm.files import write_text
from genarm.lab.evaluation.recipe import PairSpec
from genarm.lab.tasks import broken, code, mathematics

Row = Mapping[str, Any]


def make_pairs(folder: Path, spec: PairSpec, source: str, seed: int) -> None:
    """Write both files; the second one last.

    Raises:
        ConfigError: an unknown task.
        DataError: `source` is no data of the task.
        UnsupportedError: the sandbox cannot run here.
    """
    train, held_out = _split(spec, source, seed)
    _write(folder / f"{spec.name}.jsonl", train)
    _write(held_out_file(folder, spec), held_out)


def held_out_file(folder: Path, spec: PairSpec) -> Path:
    """The file that is written last."""
    return folder / f"{spec.name}-held-out.jsonl"


def _split(spec: PairSpec, source: str, seed: int) -> tuple[Sequence[Row], Sequence[Row]]:
    match spec.task:
        case "mathematics":
            parts = mathematics.read_pairs(source, held_out=spec.held_out, seed=seed)
            return parts.train, parts.held_out
        case "code":
            problems = code.read_problems(source)
            random.Random(f"problems {seed}").shuffle(problems)
            rows = list(broken.pair_rows(problems[: spec.count], seed=seed))
            kept = max(1, round(spec.held_out * len(rows)))
            return rows[kept:], rows[:kept]
    raise ConfigError(f"the pairs {spec.name!r} are of the task {spec.task!r}; it must be mathematics or code")


def _write(path: Path, rows: Sequence[Row]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
