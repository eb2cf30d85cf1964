"""Decode requests batch by batch.

Batches are cut from the requests in their order and each has a random state of its own, derived from the run's
seed and the batch's first row: a run that begins at any batch gives the rows an unbroken one would.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from genarm.batch.requests import Request
from genarm.errors import ConfigError, GenarmError
from genarm.opening import ModelFiles, check_length, weights_tensor
from genarm.sampling import Reply, Sampling, check_seed, derive_seed, sample_replies

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request as the model will read it; `index` counts requests, `sample` the replies to one request."""

    index: int
    sample: int
    request: Request
    prompt_ids: tuple[int, ...]
    weights: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the jobs are decoded.

    Attributes:
        sampling: how each reply is drawn.
        seed: of the run.
        batch_size: jobs per batch.
        num_samples: replies to each request.
    """

    sampling: Sampling
    seed: int = 0
    batch_size: int = 8
    num_samples: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_samples"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        check_seed(self.seed)
        if self.num_samples > 1 and self.sampling.temperature == 0:
            raise ConfigError(
                f"--num-samples is {self.num_samples} and --temperature 0, which would give the same reply "
                f"{self.num_samples} times; use a temperature above 0"
            )


def make_jobs(
    files: ModelFiles,
    requests: Sequence[Request],
    plan: Plan,
    *,
    weights: Mapping[str, float],
    system: str | None = None,
    raw: bool = False,
) -> list[Job]:
    """Encode every prompt and settle its weights, so that all mistakes are found before anything runs.

    Args:
        files: the model.
        requests: what to answer.
        plan: how.
        weights: the run's reward weights, complete; a request's own go over them.
        system: a system message for prompts that have none.
        raw: send text prompts without the chat template.

    Raises:
        DataError, WeightsError: a request that cannot be answered, named with its place in the input.
    """
    jobs = []
    for index, request in enumerate(requests):
        where = f"{request.where} (prompt {index})"
        try:
            ids = files.encode(files.conversation(request.prompt, system=system, raw=raw))
            own = files.weights(request.reward_weights, weights)
        except GenarmError as error:
            raise type(error)(f"{where}: {error}") from error
        check_length(files, len(ids), plan.sampling.max_new_tokens, where=where)
        jobs += [
            Job(index=index, sample=sample, request=request, prompt_ids=tuple(ids), weights=own)
            for sample in range(plan.num_samples)
        ]
    return jobs


def decode(
    model: PreTrainedModel, files: ModelFiles, jobs: Sequence[Job], plan: Plan, *, settings: str = "", start: int = 0
) -> Iterator[list[Row]]:
    """The rows of each batch, as soon as it is decoded.

    Args:
        model: loaded from `files`.
        files: the model's tokenizer.
        jobs: from `make_jobs`.
        plan: how.
        settings: a digest of them that each row carries.
        start: the first job to decode, a multiple of the batch size.
    """
    assert start % plan.batch_size == 0
    for first in range(start, len(jobs), plan.batch_size):
        batch = jobs[first : first + plan.batch_size]
        seed = derive_seed(plan.seed, first)
        replies = sample_replies(
            model,
            files.tokenizer,
            [job.prompt_ids for job in batch],
            plan.sampling,
            seed=seed,
            weights_BR=weights_tensor([job.weights for job in batch]) if files.guided else None,
        )
        yield [_row(job, reply, seed, settings) for job, reply in zip(batch, replies, strict=True)]


def _row(job: Job, reply: Reply, seed: int, settings: str) -> Row:
    return {
        "index": job.index,
        "id": job.request.id,
        "sample": job.sample,
        "prompt": job.request.prompt,
        "response": reply.text,
        "finish_reason": reply.finish_reason,
        "tokens": len(reply.token_ids),
        "seed": seed,
        "weights": dict(job.weights),
        "settings": settings,
        **job.request.carried,
    }
