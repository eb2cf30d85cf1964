"""What both ways to ask have in common: sampling, seeds, room, what wishes read, counts."""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest

from genarm.engine import Completion
from genarm.errors import ConversationError
from genarm.model.wishes import with_wish
from genarm.sampling import Sampling, derive_seed
from genarm.server.errors import ApiError
from genarm.server.guidance import Guidance
from genarm.server.job import Service
from genarm.server.replies import Usage
from genarm.server.schema import ChatRequest, CompletionRequest
from genarm.server.texts import characters
from genarm.text.prompts import Prompt

_LEAST_TOP_P = 1e-9
"""OpenAI takes 0 for "only the likeliest token"."""
_SEEDS = 2**64
_FEW_ENTRIES = 2_000

_log = logging.getLogger("genarm.server")


def check_explained(service: Service, asked: ChatRequest | CompletionRequest) -> None:
    """Refuse `return_rewards` where nobody knows them (raises ApiError)."""
    if asked.return_rewards and not service.backend.explains:
        raise ApiError(
            400,
            "return_rewards is not available: this server decodes with vLLM, which reports the guided log-probability "
            "of a token only. Leave return_rewards out, or start the server with --engine genarm.",
            param="return_rewards",
            code="unsupported_parameter",
        )


def sampling_of(asked: ChatRequest | CompletionRequest, limit: int) -> Sampling:
    """How its replies are drawn; `limit` is at least 1 (raises ApiError where `min_tokens` is more)."""
    if (asked.min_tokens or 0) > limit:
        raise ApiError(
            400,
            f"min_tokens is {asked.min_tokens}, and a reply may have up to {limit} tokens; lower min_tokens or give "
            "more room with max_tokens",
            param="min_tokens",
            code="invalid_value",
        )
    return Sampling(
        max_new_tokens=limit,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_k=max(asked.top_k or 0, 0),
        top_p=1.0 if asked.top_p is None else max(asked.top_p, _LEAST_TOP_P),
        min_p=asked.min_p or 0.0,
        repetition_penalty=1.0 if asked.repetition_penalty is None else asked.repetition_penalty,
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        logit_bias={int(token): bias for token, bias in (asked.logit_bias or {}).items()},
        min_new_tokens=asked.min_tokens or 0,
    )


def seeds_of(asked: ChatRequest | CompletionRequest) -> list[int]:
    """One for each of the `n` replies, the same for the same `seed`."""
    seed = secrets.randbits(63) if asked.seed is None else asked.seed % _SEEDS
    return [derive_seed(seed, i) for i in range(asked.n or 1)]


def check_characters(service: Service, prompts: Sequence[Prompt], *, param: str) -> None:
    """Refuse what is too long to be worth tokenising: beyond as many of the longest token as the context has room for.

    Raises:
        ApiError: one of the prompts is.
    """
    most = service.backend.context * service.texts.longest
    for prompt in prompts:
        if (count := characters(prompt)) > most:
            raise ApiError(
                400,
                f"This model's maximum context length is {service.backend.context} tokens; the {param} has {count} "
                f"characters, and this server reads up to {most} ({service.texts.longest} for each token, which is its "
                f"longest). Shorten the {param}.",
                param=param,
                code="context_length_exceeded",
            )


def check_room(service: Service, prompt_tokens: int, limit: int | None, *, param: str, wish: str = "") -> int:
    """The most tokens of a reply: `limit`, or all that there is room for; `wish` names the one that reads the prompt.

    Raises:
        ApiError: the prompt, or the prompt and `limit` tokens, are too long.
    """
    room = service.backend.context - prompt_tokens
    if room < (1 if limit is None else limit):
        asked = "" if limit is None else f" and {limit} for the reply"
        read = f" with the wish {wish!r}" if wish else ""
        raise ApiError(
            400,
            f"This model's maximum context length is {service.backend.context} tokens; the request has "
            f"{prompt_tokens} in the {param}{read}{asked}. Shorten the {param}"
            f"{' or lower max_tokens' if asked else ''}.",
            param=param,
            code="context_length_exceeded",
        )
    return room if limit is None else limit


async def contexts_of(
    service: Service,
    guidance: Guidance,
    prompt: Prompt,
    limit: int | None,
    *,
    param: str,
    template_args: Mapping[str, Any] | None = None,
    continued: bool | None = None,
) -> dict[str, list[int]]:
    """{wish: ids of `prompt` as that wish reads it} of the wishes that count.

    `prompt` itself is known to fit, so that each of them is hardly longer; each waits for its turn among others'
    texts. The other arguments are those of `check_room` and `Texts.encode`.

    Raises:
        ApiError: with a wish, prompt and reply are too long.
        DataError, ConfigError: what `Texts.encode` raises.
    """
    contexts = {}
    for name, text in guidance.heard.items():
        try:
            ids = await service.texts.encode(with_wish(prompt, text), template_args, continued=continued)
        except ConversationError as error:
            raise ConversationError(f"with the wish {name!r} as its system message, {error}") from error
        check_room(service, len(ids), limit, param=param, wish=name)
        contexts[name] = ids
    return contexts


def usage_of(prompt_tokens: int, completions: Sequence[Completion]) -> Usage:
    """`prompt_tokens` counts each prompt once, however many replies it got."""
    drawn = sum(len(completion.tokens) for completion in completions)
    usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=drawn, total_tokens=prompt_tokens + drawn)
    distances = [completion.kl for completion in completions if completion.kl is not None]
    if distances and len(distances) == len(completions):
        usage["kl"] = round(math.fsum(distances), 4)
    return usage


async def written(service: Service, write: Callable[[], bytes], completions: Iterable[Completion]) -> bytes:
    """What `write` returns; another thread calls it where the answer is long."""
    entries = sum(1 + len(token.top) for completion in completions for token in completion.tokens)
    return write() if entries <= _FEW_ENTRIES else await service.workers.writer.run(write)


def request_id(http: HttpRequest) -> str:
    """As the log and the answer's header have it."""
    return str(http.state.request_id)


def log_text(service: Service, http: HttpRequest, what: str, text: object, guidance: Guidance) -> None:
    """Prompts and replies, only where the server was asked to log them."""
    if service.log_prompts:
        wishes = f" wishes {[wish.text for wish in guidance.wishes]}" if guidance.wishes else ""
        _log.info("%s %s %r weights %s%s", request_id(http), what, text, guidance.all_weights, wishes)
