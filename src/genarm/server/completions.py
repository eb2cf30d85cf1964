"""/v1/completions: texts that go on, with the prompt's own log-probabilities if `echo` asks for them."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from functools import partial

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from genarm.engine import Completion, Request, ScoredPrompt, Token
from genarm.server.asking import (
    check_characters,
    check_explained,
    check_room,
    contexts_of,
    log_text,
    request_id,
    sampling_of,
    seeds_of,
    usage_of,
    written,
)
from genarm.server.backend import Event
from genarm.server.bodies import body_of
from genarm.server.chat import DONE, error_event, finish_reason
from genarm.server.errors import ERRORS
from genarm.server.guidance import Guidance, check_readable, guidance_of
from genarm.server.job import Job, Service, answer
from genarm.server.labels import Labels, joined_text
from genarm.server.replies import (
    FinishReason,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    TokenShares,
    Usage,
    as_answer,
    as_event,
)
from genarm.server.schema import CompletionRequest

_USUAL_LIMIT = 16
_FEW_IDS = 2_000


def completion_routes(service: Service) -> APIRouter:
    """The route; it answers with JSON, or with events if the request says `stream`."""
    router = APIRouter()

    @router.post(
        "/v1/completions",
        response_model=TextCompletion,
        responses={200: {"content": {"text/event-stream": {}}}, **ERRORS},
        openapi_extra=body_of(CompletionRequest),
    )
    async def completions(http: HttpRequest) -> Response:
        """What follows a text, or each of several texts."""
        return await answer(service, http, CompletionRequest, partial(_Completion.begin, service))

    return router


@dataclass(kw_only=True)
class _Piece:
    """What is new of one choice."""

    text: str = ""
    logprobs: TextLogprobs | None = None
    rewards: list[TokenShares] | None = None
    finish: FinishReason | None = None

    @property
    def empty(self) -> bool:
        return not (self.text or self.logprobs or self.rewards or self.finish)


class _Choice:
    """One reply to one prompt: turns what comes of it into pieces, whose sum is the answer."""

    def __init__(self, service: Service, asked: CompletionRequest, prompt: _Prompt, weights: Mapping[str, float]):
        self._asked = asked
        self._prompt = prompt
        self._labels = Labels(service.texts, weights, fresh=bool(asked.echo))
        self._before = len(prompt.text) if asked.echo else 0
        self.completion: Completion | None = None

    def begin(self) -> _Piece:
        """The prompt, where it is to be echoed and nothing is said of its tokens."""
        if not self._asked.echo or wants_numbers(self._asked):
            return _Piece()
        return _Piece(text=self._prompt.text)

    def piece(self, event: Event) -> _Piece:
        """What an event adds."""
        if isinstance(event, ScoredPrompt):
            return self._echoed(event)
        if isinstance(event, Token):
            return self._drawn(event)
        self.completion = event
        return _Piece(finish=finish_reason(event))

    def _echoed(self, scored: ScoredPrompt) -> _Piece:
        """The prompt with its numbers; its first token has none."""
        first = self._prompt.ids[0]
        piece = _Piece(text=self._prompt.text)
        parts: list[TextLogprobs] = []
        if self._asked.logprobs is not None:
            parts.append(self._labels.first(first))
        if self._asked.return_rewards:
            piece.rewards = [self._labels.first_rewards(first)]
        self._labels.begun()
        for token, offset in zip(scored.tokens, self._prompt.offsets[1:], strict=True):
            added = self._labelled(token, offset, text="")
            parts += [added.logprobs] if added.logprobs else []
            piece.rewards = [*piece.rewards, *added.rewards] if piece.rewards and added.rewards else piece.rewards
        piece.logprobs = joined_text(parts) if parts else None
        return piece

    def _drawn(self, token: Token) -> _Piece:
        return self._labelled(token, self._before + token.offset, text=token.text)

    def _labelled(self, token: Token, offset: int, *, text: str) -> _Piece:
        piece = _Piece(text=text)
        if self._asked.logprobs is not None:
            piece.logprobs = self._labels.completion(token, offset)
        if self._asked.return_rewards:
            piece.rewards = [self._labels.rewards(token)]
        return piece


@dataclass(frozen=True, kw_only=True)
class _Prompt:
    """A prompt as text and as ids, as each wish reads it, and where in the text its ids are if it is to be echoed."""

    text: str
    ids: list[int]
    contexts: Mapping[str, list[int]]
    offsets: list[int]


def wants_numbers(asked: CompletionRequest) -> bool:
    """Whether something is to be said of every token."""
    return asked.logprobs is not None or bool(asked.return_rewards)


@dataclass(frozen=True, kw_only=True)
class _Completion:
    """One request, being answered."""

    asked: CompletionRequest
    http: HttpRequest
    service: Service
    job: Job
    guidance: Guidance
    prompts: list[_Prompt]
    choices: list[_Choice]
    created: int
    id: str

    @classmethod
    async def begin(cls, service: Service, job: Job, asked: CompletionRequest, http: HttpRequest) -> _Completion:
        check_explained(service, asked)
        guidance = guidance_of(service, asked)
        check_readable(guidance, asked.prompts)
        check_characters(service, [text for text in asked.prompts if isinstance(text, str)], param="prompt")
        limit = _USUAL_LIMIT if asked.max_tokens is None else asked.max_tokens
        for ids in asked.prompts:
            if isinstance(ids, list):
                check_room(service, len(ids), limit, param="prompt")
        log_text(service, http, "prompt", asked.prompt, guidance)
        prompts = [await _prompt(service, asked, prompt, guidance, limit) for prompt in asked.prompts]
        sampling = sampling_of(asked, max(1, limit))
        requests = [
            Request(
                prompt=prompt.ids,
                weights=guidance.weights,
                max_kl=guidance.max_kl,
                wishes=guidance.wishes,
                contexts=prompt.contexts,
                sampling=sampling,
                seed=seed,
                stop=asked.stops,
                stop_token_ids=asked.stop_token_ids or (),
                ignore_eos=bool(asked.ignore_eos),
                top_log_probs=asked.logprobs or 0,
                prompt_log_probs=(asked.logprobs or 0) if asked.echo and wants_numbers(asked) else None,
                reply=limit > 0,
                continues=True,
            )
            for prompt in prompts
            for seed in seeds_of(asked)
        ]
        each = asked.n or 1
        await job.begin(requests)
        return cls(
            asked=asked,
            http=http,
            service=service,
            job=job,
            guidance=guidance,
            prompts=prompts,
            choices=[_Choice(service, asked, prompts[i // each], guidance.all_weights) for i in range(len(requests))],
            created=int(time.time()),
            id=f"cmpl-{request_id(http)}",
        )

    async def whole(self) -> bytes:
        """The answer in one piece of JSON."""
        pieces = [[choice.begin()] for choice in self.choices]
        async for index, event in self.job.events():
            pieces[index].append(await self._piece(index, event))
        self._log_replies()
        return await written(self.service, lambda: self._written(pieces), self._completed())

    def _written(self, pieces: list[list[_Piece]]) -> bytes:
        choices = [self._choice(index, _joined(parts), whole=True) for index, parts in enumerate(pieces)]
        return as_answer({**self._answer(choices), "usage": self._usage()})

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer piece by piece; an error ends it."""
        try:
            for index, choice in enumerate(self.choices):
                begun = choice.begin()
                if not begun.empty:
                    yield self._event(index, begun)
            async for index, event in self.job.events():
                piece = await self._piece(index, event)
                if not piece.empty:
                    yield self._event(index, piece)
            self._log_replies()
            if self.asked.wants_usage:
                yield as_event({**self._answer([]), "usage": self._usage()})
            yield DONE
        except Exception as error:
            yield error_event(self.http, error)

    async def _piece(self, index: int, event: Event) -> _Piece:
        if isinstance(event, ScoredPrompt):  # as long as the prompt
            return await self.service.workers.writer.run(lambda: self.choices[index].piece(event))
        return self.choices[index].piece(event)

    def _event(self, index: int, piece: _Piece) -> bytes:
        answer = self._answer([self._choice(index, piece)])
        if self.asked.wants_usage:
            answer["usage"] = None
        return as_event(answer)

    def _choice(self, index: int, piece: _Piece, *, whole: bool = False) -> TextChoice:
        choice = TextChoice(index=index, text=piece.text, logprobs=piece.logprobs, finish_reason=piece.finish)
        rewards = piece.rewards or ([] if whole and self.asked.return_rewards else None)
        if rewards is not None:
            choice["rewards"] = rewards
        return choice

    def _answer(self, choices: list[TextChoice]) -> TextCompletion:
        return TextCompletion(
            id=self.id,
            object="text_completion",
            created=self.created,
            model=self.asked.model,
            choices=choices,
        )

    def _completed(self) -> list[Completion]:
        return [choice.completion for choice in self.choices if choice.completion is not None]

    def _usage(self) -> Usage:
        return usage_of(sum(len(prompt.ids) for prompt in self.prompts), self._completed())

    def _log_replies(self) -> None:
        for completion in self._completed():
            log_text(self.service, self.http, "reply", completion.text, self.guidance)


async def _prompt(
    service: Service, asked: CompletionRequest, prompt: str | list[int], guidance: Guidance, limit: int
) -> _Prompt:
    texts = service.texts
    if isinstance(prompt, str):
        text, ids = prompt, await texts.encode(prompt)
    elif len(prompt) <= _FEW_IDS:
        text, ids = texts.decode(prompt), prompt
    else:
        text, ids = await service.workers.writer.run(lambda: texts.decode(prompt)), prompt
    check_room(service, len(ids), limit, param="prompt")
    contexts = await contexts_of(service, guidance, text, limit, param="prompt")
    offsets = await texts.offsets(text, ids) if asked.echo and wants_numbers(asked) else []
    return _Prompt(text=text, ids=ids, contexts=contexts, offsets=offsets)


def _joined(pieces: list[_Piece]) -> _Piece:
    logprobs = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    rewards = [reward for piece in pieces for reward in piece.rewards or []]
    return _Piece(
        text="".join(piece.text for piece in pieces),
        logprobs=joined_text(logprobs) if logprobs else None,
        rewards=rewards or None,
        finish=pieces[-1].finish,
    )
