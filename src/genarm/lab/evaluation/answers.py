"""The replies of one method to all prompts, batch by batch, in a JSONL file that a killed run goes on with.

A batch is the unit: its replies, its seed and its cost do not depend on earlier ones, and its rows are written at
once. A row that belongs to no whole batch is cut off and made again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from genarm.files import append_rows, keep_rows, resume_rows
from genarm.lab.evaluation.prompts import Question
from genarm.lab.evaluation.results import Cost
from genarm.lab.methods.interface import Meter, Method
from genarm.lab.methods.sample import Distance, Sample
from genarm.lab.prefix import Ids
from genarm.lab.replies import SampledReply
from genarm.sampling import derive_seed


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One method's replies in the order of the prompts, what they cost, and how far each is from the base, if known."""

    replies: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    cost: Cost
    kl: tuple[float, ...] | None


def answering(
    path: Path,
    make: Callable[[], tuple[Method, Sample]],
    questions: Sequence[Question],
    *,
    batch_size: int,
    at_once: int,
    seed: int,
    settings: str,
) -> Iterator[int]:
    """Answer what the file at `path` does not hold yet, a batch for each number of rows that is yielded.

    What the file has already is yielded first. The method is only made where something is left.

    Args:
        path: the JSONL file.
        make: makes the method, and the base that replies are compared with.
        questions: all prompts.
        batch_size: prompts whose replies are written and timed together.
        at_once: how many of them the method answers together, for one that needs more memory than others.
        seed: of the run.
        settings: digest of the settings; each row has it.

    Raises:
        DataError: the file holds rows of other settings.
    """
    done = _keep_whole_batches(path, len(questions), batch_size, settings)
    yield done
    if done == len(questions):
        return
    method, base = make()
    for start in range(done, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        append_rows(path, _answer(method, base, batch, start, at_once, seed, settings))
        yield len(batch)


def read_answers(path: Path, settings: str) -> Answers:
    """What `answering` has written, once it has come to its end (raises DataError, as it does)."""
    return _answers(resume_rows(path, settings))


def _answer(
    method: Method,
    base: Sample,
    batch: Sequence[Question],
    start: int,
    at_once: int,
    seed: int,
    settings: str,
) -> list[dict[str, Any]]:
    prompts = [question.ids for question in batch]
    meter = Meter()
    replies: list[SampledReply] = []
    begun = time.perf_counter()
    for first in range(0, len(batch), at_once):
        part = prompts[first : first + at_once]
        replies += method.answer(part, seed=derive_seed(seed, start + first), meter=meter)
    seconds = time.perf_counter() - begun
    distances = _distances(method, base, prompts, replies)
    cost = {"seconds": seconds, "counts": {name: asdict(count) for name, count in meter.counts.items()}}
    return [
        {
            "index": start + number,
            "prompt": question.prompt,
            "response": reply.text,
            "finish_reason": reply.finish_reason,
            "token_ids": list(reply.token_ids),
            **distance,
            "seed": derive_seed(seed, start + number // at_once * at_once),
            "settings": settings,
            **({"batch_cost": cost} if number == 0 else {}),
        }
        for number, (question, reply, distance) in enumerate(zip(batch, replies, distances, strict=True))
    ]


def _distances(
    method: Method, base: Sample, prompts: Sequence[Ids], replies: Sequence[SampledReply]
) -> list[dict[str, float | None]]:
    """log π and log π_base of each reply in nats, and its `kl`: what either has of it on the average.

    Where the distributions of all tokens are known, `kl` is the sum of their divergences along the reply, which has
    the mean of log π − log π_base and spreads far less.
    """
    if isinstance(method, Sample):
        found = method.distances(base, prompts, replies)
    else:
        own = method.log_probs(prompts, replies)
        of_base = None if own is None else base.log_probs(prompts, replies)
        known = None if own is None or of_base is None else zip(own, of_base, strict=True)
        found = None if known is None else [Distance(p, q, p - q) for p, q in known]
    if found is None:
        return [dict.fromkeys(Distance._fields) for _ in replies]
    return [distance._asdict() for distance in found]


def _keep_whole_batches(path: Path, count: int, batch_size: int, settings: str) -> int:
    """Cut off the rows after the file's last whole batch; returns how many are left."""
    rows = len(resume_rows(path, settings))
    whole = rows if rows == count else rows // batch_size * batch_size
    if whole < rows:
        keep_rows(path, whole)
    return whole


def _answers(rows: Sequence[Mapping[str, Any]]) -> Answers:
    forwards: Counter[str] = Counter()
    positions: Counter[str] = Counter()
    costs = [row["batch_cost"] for row in rows if "batch_cost" in row]
    for cost in costs:
        for name, count in cost["counts"].items():
            forwards[name] += count["forwards"]
            positions[name] += count["positions"]
    known = all(row["log_prob"] is not None for row in rows)
    # Rows of older versions have no `kl`: the difference has the same mean.
    kl = tuple(row.get("kl", row["log_prob"] - row["base_log_prob"]) for row in rows) if known else None
    return Answers(
        replies=tuple(row["response"] for row in rows),
        token_ids=tuple(tuple(row["token_ids"]) for row in rows),
        cost=Cost(
            seconds=tuple(cost["seconds"] for cost in costs),
            tokens=sum(len(row["token_ids"]) for row in rows),
            forwards=forwards,
            positions=positions,
        ),
        kl=kl,
    )
