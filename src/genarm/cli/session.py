"""Open a model for a command: first what its files say, so that mistakes are found at once, and its weights last."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from transformers import PreTrainedModel

from genarm.batch.output import Settings
from genarm.batch.plan import Plan
from genarm.batch.requests import BatchRequest, content
from genarm.batch.run import BatchJob, make_jobs
from genarm.cli.arguments import settings_from
from genarm.cli.options import ModelOptions, read_wishes
from genarm.engine import Engine, EngineOptions
from genarm.errors import ConfigError
from genarm.model.references import ModelFiles, find_device, open_files
from genarm.model.weights import check_max_kl, parse_weights
from genarm.provenance import Record, model_record
from genarm.text.prompts import Reading, read_template_args


@dataclass(frozen=True, kw_only=True)
class Session:
    """A model as a command works with it.

    Attributes:
        files: the model, as its files describe it, and `draft` of the one that drafts, if any.
        dtype, device: of all weights, as they are loaded.
        weights: the reward weights, complete.
        max_kl: the most nats per token from the base, if there is a bound.
        system: a system message for prompts that have none.
        raw: text goes without the chat template.
        speculate: the most tokens drafted at once.
    """

    files: ModelFiles
    draft: ModelFiles | None
    dtype: str
    device: str
    weights: dict[str, float]
    max_kl: float | None
    system: str | None
    raw: bool
    speculate: int

    def load(self, *, dtype: str | None = None) -> PreTrainedModel:
        """The model itself, in `dtype` where one is given (raises what `ModelFiles.load` raises)."""
        return self.files.load(dtype=dtype or self.dtype, device=self.device)

    def content(self) -> Record:
        """The models by their content, as their files are now (raises DataError, as `model_record`)."""
        drafting = {} if self.draft is None else {"draft": model_record(self.draft.reference, self.draft.revision)}
        return {"model": model_record(self.files.reference, self.files.revision), **drafting}

    def engine(self, *, streams: int, context: int | None, wishes: int = 0) -> Engine:
        """Load the models and make the engine, for requests with so many wishes of their own.

        Raises:
            What `Engine` raises.
        """
        return Engine(
            self.load(),
            self.files.tokenizer,
            EngineOptions(streams=streams, context=context, speculate=self.speculate, wishes=wishes),
            draft=None if self.draft is None else self.draft.load(dtype=self.dtype, device=self.device),
            draft_tokenizer=None if self.draft is None else self.draft.tokenizer,
        )

    def jobs(self, requests: Sequence[BatchRequest], plan: Plan) -> list[BatchJob]:
        """Every reply that is wanted (raises what `make_jobs` raises)."""
        return make_jobs(
            self.files,
            requests,
            plan,
            weights=self.weights,
            max_kl=self.max_kl,
            system=self.system,
            raw=self.raw,
        )

    def settings(self, requests: Sequence[BatchRequest], plan: Plan) -> Settings:
        """All that decides what the rows of an output file are."""
        return Settings(
            model=model_record(self.files.reference, self.files.revision),
            dtype=self.dtype,
            device=self.device,
            prompts=len(requests),
            prompts_content=content(requests),
            weights=self.weights,
            max_kl=self.max_kl,
            max_new_tokens=plan.sampling.max_new_tokens,
            temperature=plan.sampling.temperature,
            top_p=plan.sampling.top_p,
            seed=plan.seed,
            num_samples=plan.num_samples,
            speculate=self.speculate,
            draft=None if self.draft is None else model_record(self.draft.reference, self.draft.revision),
            system=self.system,
            raw=self.raw,
            reading=asdict(self.files.reading),
            wishes=self.files.added_wishes,
        )


def open_session(arguments: argparse.Namespace) -> Session:
    """Read and check all that a command says of its model; no weights are loaded yet.

    Args:
        arguments: a command line with `ModelOptions`, and whichever others of `genarm.cli.options` the verb has.

    Raises:
        ConfigError, WeightsError: options that are wrong, or that the model does not take.
        MemberError: there is no such model.
    """
    wanted = settings_from(arguments, ModelOptions)
    speculate = getattr(arguments, "speculate", EngineOptions.speculate)
    EngineOptions(speculate=speculate)
    device = find_device(wanted.device)
    files = open_files(wanted.folder, trust_remote_code=wanted.trust_remote_code, reading=_reading(arguments))
    files = files.with_wishes(read_wishes(getattr(arguments, "wish", None)))
    max_kl = getattr(arguments, "max_kl", None)
    check_max_kl(max_kl)
    draft, weights = getattr(arguments, "draft", None), getattr(arguments, "weights", None)
    return Session(
        files=files,
        draft=None if draft is None else open_files(draft, trust_remote_code=wanted.trust_remote_code),
        dtype=wanted.dtype,
        device=device,
        weights=files.weights({} if weights is None else parse_weights(weights)),
        max_kl=max_kl,
        system=getattr(arguments, "system", None),
        raw=getattr(arguments, "raw", False),
        speculate=speculate,
    )


def _reading(arguments: argparse.Namespace) -> Reading:
    if arguments.template_arg and getattr(arguments, "raw", False):
        raise ConfigError("--raw sends text without the chat template, so --template-arg would do nothing; give one")
    return Reading(
        template_args=read_template_args(arguments.template_arg),
        plain_user_text=getattr(arguments, "plain_user_text", False),
    )
