"""What speculation does, in counts that no clock blurs: on made pairs, and on a real one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from genarm.batch.requests import read_requests
from genarm.engine import Engine, EngineOptions, Request
from genarm.errors import MemberError
from genarm.model.modeling import GuidedForCausalLM
from genarm.model.references import ModelFiles, open_files
from genarm.sampling import Sampling
from genarm.statistics import Proportion, proportion
from genarm.text.prompts import Prompt

QUESTIONS = (
    "How do I learn to cook?",
    "What is a good way to save money?",
    "Can you tell me about the history of Rome?",
    "My neighbour is too loud. What should I do?",
    "Which books would you recommend to a child of ten?",
    "Why is the sky blue?",
    "How can I sleep better at night?",
    "What should I think about before I get a dog?",
)
DRAFTS = 8
"""Tokens drafted at once, at most."""
_AT_ONCE = 8
_LONGEST = 1024


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Of some replies, one at a time.

    Attributes:
        tokens: but for the first of each reply, which comes of the prompt's own pass.
        base_passes: forwards of the base's trunk for them.
        drafted, accepted: tokens drafted, and how many of those stayed.
    """

    tokens: int
    base_passes: int
    drafted: int
    accepted: int

    @property
    def passes_per_token(self) -> float:
        """1 without speculation."""
        return self.base_passes / self.tokens


def count(engine: Engine, requests: Sequence[Request]) -> Counts:
    """Counts of the replies to `requests`; every prompt must fit into one chunk, so that it takes one pass."""
    tokens = passes = drafted = accepted = 0
    for request in requests:
        before = engine.statistics().passes[0]
        (completion,) = engine.generate([request])
        tokens += len(completion.tokens) - 1
        passes += engine.statistics().passes[0] - before - 1
        drafted += completion.drafted
        accepted += completion.accepted
    return Counts(tokens=tokens, base_passes=passes, drafted=drafted, accepted=accepted)


def acceptance_options(context: int | None) -> EngineOptions:
    """Options for `acceptance`: every token is drafted once, and every draft is looked at."""
    return EngineOptions(streams=_AT_ONCE, context=context, speculate=1, adapt=False)


def acceptance(engine: Engine, requests: Sequence[Request]) -> Proportion:
    """How often a draft that is looked at stays, in an engine with `acceptance_options`."""
    completions = engine.generate(requests)
    return proportion(sum(c.accepted for c in completions), sum(c.drafted for c in completions))


@dataclass(frozen=True, kw_only=True)
class RealPair:
    """A base guided by an ARM with weight 1 at temperature 1.

    Attributes:
        base, arm: where they are.
        prompts: how many were answered.
        drafting: counts where `DRAFTS` tokens are always drafted.
        usual: counts with the engine's own choice, which drafts as many as pay, and none where the ARM is too large.
        control: counts without speculation.
        acceptance: of drafts that were looked at, drafting one token at a time.
    """

    base: str
    arm: str
    prompts: int
    drafting: Counts
    usual: Counts
    control: Counts
    acceptance: Proportion


def count_real_pair(
    references: tuple[str, str], prompts: Path | None, *, dtype: str, device: str, tokens: int, seed: int
) -> RealPair:
    """Count what speculation does for two models from files.

    Args:
        references: folders or hub ids of the base and of the ARM.
        prompts: a .jsonl or .txt file as `genarm generate --input` takes; a few questions where there is none.
        dtype, device: to load with.
        tokens: the most of a reply, which ends where the model ends it.
        seed: of the first reply; the next one has the next.

    Raises:
        MemberError, VocabularyError, ConfigError: the models cannot be found or do not fit.
        DataError: the prompts cannot be read, or are too long for the models.
    """
    files = tuple(_open(reference) for reference in references)
    asked: Sequence[Prompt] = QUESTIONS if prompts is None else [r.prompt for r in read_requests(prompts)]
    requests = [
        Request(
            prompt=files[0].encode(files[0].conversation(prompt, system=None, raw=False)),
            sampling=Sampling(max_new_tokens=tokens),
            seed=seed + i,
        )
        for i, prompt in enumerate(asked)
    ]
    context = min((n for f in files if (n := f.context) is not None), default=_LONGEST)
    context = min(context, _LONGEST)

    def engine(options: EngineOptions) -> Engine:
        base, arm = (f.load(dtype=dtype, device=device) for f in files)
        tokenizers = {"base": files[0].tokenizer, "arm": files[1].tokenizer}
        model = GuidedForCausalLM.from_members(base, {"arm": arm}, tokenizers=tokenizers)
        return Engine(model, files[0].tokenizer, options)

    alone = EngineOptions(streams=1, context=context, chunk=2 * context, speculate=DRAFTS)
    with engine(replace(alone, adapt=False)) as one:
        drafting = count(one, requests)
    with engine(alone) as one:
        usual = count(one, requests)
    with engine(replace(alone, speculate=0)) as one:
        control = count(one, requests)
    with engine(acceptance_options(context)) as one:
        accepted = acceptance(one, requests)
    return RealPair(
        base=references[0],
        arm=references[1],
        prompts=len(requests),
        drafting=drafting,
        usual=usual,
        control=control,
        acceptance=accepted,
    )


def _open(reference: str) -> ModelFiles:
    files = open_files(reference)
    if files.guided:
        raise MemberError(f"{reference} is a guided folder; --real takes a base and an ARM, which are ordinary models")
    return files
