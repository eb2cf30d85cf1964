"""/v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from genarm.engine import Completion, Request, Token
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
from genarm.server.bodies import body_of
from genarm.server.errors import ERRORS, as_api_error, log_failure
from genarm.server.guidance import Guidance, guidance_of
from genarm.server.job import Job, Service, answer
from genarm.server.labels import Labels, joined_chat
from genarm.server.replies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    FinishReason,
    TokenShares,
    as_answer,
    as_event,
)
from genarm.server.schema import ChatRequest
from genarm.text.prompts import Message

DONE = b"data: [DONE]\n\n"


def chat_routes(service: Service) -> APIRouter:
    """The route; it answers with JSON, or with events if the request says `stream`."""
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={200: {"content": {"text/event-stream": {}}}, **ERRORS},
        openapi_extra=body_of(ChatRequest),
    )
    async def chat_completions(http: HttpRequest) -> Response:
        """A reply to a conversation."""
        return await answer(service, http, ChatRequest, partial(_Chat.begin, service))

    return router


@dataclass(frozen=True, kw_only=True)
class _Chat:
    """One request, being answered."""

    service: Service
    asked: ChatRequest
    http: HttpRequest
    job: Job
    guidance: Guidance
    prompt_tokens: int
    labels: list[Labels]
    created: int
    id: str

    @classmethod
    async def begin(cls, service: Service, job: Job, asked: ChatRequest, http: HttpRequest) -> _Chat:
        check_explained(service, asked)
        guidance = guidance_of(service, asked)
        messages: list[Message] = [{"role": _ROLES.get(m.role, m.role), "content": m.text} for m in asked.messages]
        check_characters(service, [messages], param="messages")
        log_text(service, http, "messages", messages, guidance)
        how: dict[str, Any] = {"template_args": asked.chat_template_kwargs, "continued": asked.continued}
        ids = await service.texts.encode(messages, **how)
        check_room(service, len(ids), asked.limit, param="messages")
        contexts = await contexts_of(service, guidance, messages, asked.limit, param="messages", **how)
        longest = max(map(len, (ids, *contexts.values())))
        sampling = sampling_of(asked, check_room(service, longest, asked.limit, param="messages"))
        top = (asked.top_logprobs or 0) if asked.logprobs else 0
        requests = [
            Request(
                prompt=ids,
                weights=guidance.weights,
                max_kl=guidance.max_kl,
                wishes=guidance.wishes,
                contexts=contexts,
                sampling=sampling,
                seed=seed,
                stop=asked.stops,
                stop_token_ids=asked.stop_token_ids or (),
                ignore_eos=bool(asked.ignore_eos),
                top_log_probs=top,
                continues=bool(asked.continued),
            )
            for seed in seeds_of(asked)
        ]
        await job.begin(requests)
        return cls(
            service=service,
            asked=asked,
            http=http,
            job=job,
            guidance=guidance,
            prompt_tokens=len(ids),
            labels=[Labels(service.texts, guidance.all_weights, fresh=not asked.continued) for _ in requests],
            created=int(time.time()),
            id=f"chatcmpl-{request_id(http)}",
        )

    async def whole(self) -> bytes:
        """The answer in one piece of JSON."""
        logprobs: list[list[ChatLogprobs]] = [[] for _ in self.labels]
        rewards: list[list[TokenShares]] = [[] for _ in self.labels]
        completions: dict[int, Completion] = {}
        async for index, event in self.job.events():
            if isinstance(event, Token):
                said, shares = self._label(index, event)
                logprobs[index] += said
                rewards[index] += shares
            elif isinstance(event, Completion):
                completions[index] = event
                log_text(self.service, self.http, "reply", event.text, self.guidance)
        return await written(self.service, lambda: self._written(logprobs, rewards, completions), completions.values())

    def _written(
        self,
        logprobs: list[list[ChatLogprobs]],
        rewards: list[list[TokenShares]],
        completions: Mapping[int, Completion],
    ) -> bytes:
        choices = []
        for i in range(len(self.labels)):
            choice = ChatChoice(
                index=i,
                message=ChatMessage(role="assistant", content=completions[i].text),
                logprobs=joined_chat(logprobs[i]) if self.asked.logprobs else None,
                finish_reason=finish_reason(completions[i]),
            )
            if self.asked.return_rewards:
                choice["rewards"] = rewards[i]
            choices.append(choice)
        return as_answer(
            ChatCompletion(
                id=self.id,
                object="chat.completion",
                created=self.created,
                model=self.asked.model,
                choices=choices,
                usage=usage_of(self.prompt_tokens, list(completions.values())),
            )
        )

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer piece by piece; an error ends it."""
        completions: list[Completion] = []
        try:
            for index in range(len(self.labels)):
                yield self._chunk(index, ChatDelta(role="assistant", content=""))
            async for index, event in self.job.events():
                if isinstance(event, Token):
                    logprobs, rewards = self._label(index, event)
                    if event.text or logprobs or rewards:
                        delta = ChatDelta(content=event.text)
                        yield self._chunk(index, delta, logprobs=logprobs, rewards=rewards)
                elif isinstance(event, Completion):
                    completions.append(event)
                    log_text(self.service, self.http, "reply", event.text, self.guidance)
                    yield self._chunk(index, ChatDelta(), finish=finish_reason(event))
            if self.asked.wants_usage:
                yield self._usage(completions)
            yield DONE
        except Exception as error:
            yield error_event(self.http, error)

    def _label(self, index: int, token: Token) -> tuple[list[ChatLogprobs], list[TokenShares]]:
        labels = self.labels[index]
        logprobs = [labels.chat(token)] if self.asked.logprobs else []
        rewards = [labels.rewards(token)] if self.asked.return_rewards else []
        labels.begun()
        return logprobs, rewards

    def _chunk(
        self,
        index: int,
        delta: ChatDelta,
        *,
        finish: FinishReason | None = None,
        logprobs: list[ChatLogprobs] | None = None,
        rewards: list[TokenShares] | None = None,
    ) -> bytes:
        choice = ChatChunkChoice(
            index=index,
            delta=delta,
            logprobs=joined_chat(logprobs) if logprobs else None,
            finish_reason=finish,
        )
        if rewards:
            choice["rewards"] = rewards
        chunk = self._event([choice])
        if self.asked.wants_usage:
            chunk["usage"] = None
        return as_event(chunk)

    def _usage(self, completions: list[Completion]) -> bytes:
        return as_event({**self._event([]), "usage": usage_of(self.prompt_tokens, completions)})

    def _event(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(
            id=self.id,
            object="chat.completion.chunk",
            created=self.created,
            model=self.asked.model,
            choices=choices,
        )


_ROLES = {"developer": "system"}
"""OpenAI's newer name; templates know the older one."""


def finish_reason(completion: Completion) -> FinishReason:
    """Why a reply ended that nobody has cancelled."""
    assert completion.ending != "cancelled"
    return completion.ending


def error_event(http: HttpRequest, error: Exception) -> bytes:
    """The end of a stream that cannot go on; it counts by its status, though the stream began with 200."""
    answer = as_api_error(error)
    http.state.ended_with = answer.status
    if answer.status == 500:
        log_failure(http, error)
    return as_event(answer.body())
