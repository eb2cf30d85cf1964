"""Decode many requests with the engine and hand their rows over in order.

Each reply has a seed of its own, derived from the run's seed and the row's number: a run that begins at any row gives
the rows an unbroken one would, however many replies are decoded at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from genarm.batch.plan import Plan
from genarm.batch.requests import BatchRequest
from genarm.engine import Completion, Engine, Stream
from genarm.engine import Request as EngineRequest
from genarm.errors import GenarmError
from genarm.model.references import ModelFiles, check_length
from genarm.sampling import derive_seed

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class BatchJob:
    """A request as the model will read it: `number` counts rows, `index` requests, `sample` replies to one request.

    `contexts` are the prompt's ids as each wish with a weight reads them.
    """

    number: int
    index: int
    sample: int
    request: BatchRequest
    prompt_ids: tuple[int, ...]
    contexts: Mapping[str, Sequence[int]]
    weights: Mapping[str, float]
    max_kl: float | None


def make_jobs(
    files: ModelFiles,
    requests: Sequence[BatchRequest],
    plan: Plan,
    *,
    weights: Mapping[str, float],
    max_kl: float | None = None,
    system: str | None = None,
    raw: bool = False,
) -> list[BatchJob]:
    """Encode every prompt and settle its weights, so that all mistakes are found before anything runs.

    Args:
        files: the model.
        requests: what to answer.
        plan: how.
        weights: the run's reward weights, complete; a request's own go over them.
        max_kl: the most nats per token from the base, if there is a bound; a request's own goes in its place.
        system: a system message for prompts that have none.
        raw: send text prompts without the chat template.

    Raises:
        DataError, WeightsError: a request that cannot be answered, named with its place in the input.
    """
    jobs = []
    for index, request in enumerate(requests):
        where = f"{request.where} (prompt {index})"
        try:
            prompt = files.conversation(request.prompt, system=system, raw=raw)
            ids = files.encode(prompt)
            own = files.weights(request.reward_weights, weights)
            contexts = files.contexts(prompt, own)
        except GenarmError as error:
            raise type(error)(f"{where}: {error}") from error
        longest = max(map(len, (ids, *contexts.values())))
        check_length(files, longest, plan.sampling.max_new_tokens, where=where)
        jobs += [
            BatchJob(
                number=index * plan.num_samples + sample,
                index=index,
                sample=sample,
                request=request,
                prompt_ids=tuple(ids),
                contexts=contexts,
                weights=own,
                max_kl=max_kl if request.max_kl is None else float(request.max_kl),
            )
            for sample in range(plan.num_samples)
        ]
    return jobs


def context_of(jobs: Sequence[BatchJob], plan: Plan) -> int:
    """Positions that the longest of `jobs` needs with its reply."""
    return (
        max(len(ids) for job in jobs for ids in (job.prompt_ids, *job.contexts.values())) + plan.sampling.max_new_tokens
    )


def decode(engine: Engine, jobs: Sequence[BatchJob], plan: Plan, *, settings: str = "") -> Iterator[Row]:
    """The row of each job, in order, as soon as it and those before it are there.

    Args:
        engine: of the model that the jobs were made for.
        jobs: from `make_jobs`; the first ones left out where they are done already.
        plan: how.
        settings: a digest of them that each row carries.
    """
    upcoming = iter(jobs)
    begun: deque[tuple[BatchJob, Stream]] = deque()
    try:
        while True:
            # Twice as many as run at once: the next ones wait in the engine, so that no stream stays empty.
            for job in islice(upcoming, 2 * plan.batch_size - len(begun)):
                begun.append((job, engine.stream(_request(job, plan))))
            if not begun:
                return
            job, stream = begun.popleft()
            yield _row(job, stream.result(), plan, settings)
    finally:
        for _, stream in begun:
            stream.cancel()


def _request(job: BatchJob, plan: Plan) -> EngineRequest:
    return EngineRequest(
        prompt=job.prompt_ids,
        contexts=job.contexts,
        weights=job.weights,
        max_kl=job.max_kl,
        sampling=plan.sampling,
        seed=derive_seed(plan.seed, job.number),
    )


def _row(job: BatchJob, reply: Completion, plan: Plan, settings: str) -> Row:
    return {
        "index": job.index,
        "id": job.request.id,
        "sample": job.sample,
        "prompt": job.request.prompt,
        "response": reply.text,
        "finish_reason": reply.ending,
        "tokens": len(reply.tokens),
        # The last digits depend on the replies that were drawn beside it; a resumed run's file must be the same.
        "kl": None if reply.kl is None else round(reply.kl, 2),
        "seed": derive_seed(plan.seed, job.number),
        "weights": dict(job.weights),
        "max_kl": job.max_kl,
        "settings": settings,
        **job.request.carried,
    }
