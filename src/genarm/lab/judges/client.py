"""An asynchronous client for any OpenAI-compatible /chat/completions endpoint.

A question is tried again after 429 (as late as Retry-After asks), 5xx, a timeout, a broken connection, broken JSON and
a reply of the wrong form; the waits double and are jittered. When the tries are used up, the question is a `Failure`:
counted, no crash. What no question could get past (a wrong key, address or model, a quota that is used up) raises at
once. The key is read from an environment variable, goes into one header, and is struck out of what the endpoint says.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self

import httpx2

from genarm.errors import ConfigError
from genarm.lab.judges.settings import ClientSettings
from genarm.text.prompts import Message

_LONGEST_BACKOFF = 60.0
_LONGEST_WAIT = 300.0
_EXCERPT = 300
_SHORTEST_SECRET = 8


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What the model said (empty where it declined), and the tokens that the endpoint counted."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A question without a reply, and why."""

    reason: str


@dataclass(frozen=True)
class _Retry:
    """A try that may go better the next time."""

    reason: str


class ChatClient:
    """Asks questions within the limits of its settings; an asynchronous context manager.

    Raises:
        ConfigError: as `ClientSettings.find_key`.
    """

    def __init__(self, settings: ClientSettings) -> None:
        self.settings = settings
        self._key = settings.find_key()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx2.Limits(max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency)
        self._http = httpx2.AsyncClient(headers=headers, timeout=None, limits=limits)
        self._url = f"{settings.base_url.rstrip('/')}/chat/completions"
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._gate = _Gate(settings.requests_per_minute)
        self._reached = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def complete(self, messages: Sequence[Message], sampling: Mapping[str, Any]) -> Completion | Failure:
        """The reply to one question.

        Args:
            messages: the conversation.
            sampling: sent beside it, as it is.

        Raises:
            ConfigError: the endpoint cannot be reached, or refuses the key, the address or the model.
        """
        body = {"model": self.settings.model, "messages": [dict(message) for message in messages], **sampling}
        tries = self.settings.retries + 1
        reason = ""
        for number in range(tries):
            if number:
                wait = min(_LONGEST_BACKOFF, self.settings.backoff * 2 ** (number - 1))
                await asyncio.sleep(wait * random.uniform(0.5, 1.0))
            async with self._slots:
                await self._gate.wait()
                answer = await self._try(body)
            if not isinstance(answer, _Retry):
                return answer
            reason = answer.reason
        return Failure(reason=f"{reason} (tried {tries} times)")

    async def _try(self, body: Mapping[str, Any]) -> Completion | Failure | _Retry:
        try:
            async with asyncio.timeout(self.settings.timeout):
                response = await self._http.post(self._url, json=body)
        except TimeoutError:
            return _Retry(f"no reply within {self.settings.timeout:g} s")
        except httpx2.ConnectError as error:
            if not self._reached:
                raise ConfigError(f"cannot reach {self._url}: {error}; check the address, and that it is up") from error
            return _Retry(f"cannot connect: {error}")
        except httpx2.HTTPError as error:
            return _Retry(f"the connection broke: {self._strike(str(error)) or type(error).__name__}")
        self._reached = True
        return self._read(response)

    def _read(self, response: httpx2.Response) -> Completion | Failure | _Retry:
        status, text = response.status_code, self._strike(response.text)
        if response.is_success:
            answer = _parse(text)
            if isinstance(answer, Completion):
                return replace(answer, text=self._strike(answer.text))  # again: JSON may have escaped characters of it
            return answer
        said = self._strike(f"HTTP {status}: {_excerpt(text)}")
        if status in (401, 403, 404):
            raise ConfigError(
                f"{self._url} refuses the model {self.settings.model!r} ({said}); check the address, the model's name "
                f"and the key in {self.settings.key_variable}"
            )
        if status == 429 or status >= 500:
            wait = _retry_after(response.headers.get("Retry-After"))
            if wait > _LONGEST_WAIT or '"insufficient_quota"' in text:
                when = f" for {wait:,.0f} s" if wait else ""
                raise ConfigError(f"{self._url} gives no more replies{when} ({said}); run the same command again later")
            self._gate.hold(wait)
            return _Retry(said)
        return Failure(reason=said)

    def _strike(self, text: str) -> str:
        """`text` without the key, which an endpoint may echo; what is too short for a secret may be a word."""
        return text.replace(self._key, "***") if self._key and len(self._key) >= _SHORTEST_SECRET else text


class _Gate:
    """Lets requests through, evenly spaced, and none before a time that the endpoint set."""

    def __init__(self, per_minute: float | None) -> None:
        self._interval = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._held_until = 0.0

    def hold(self, seconds: float) -> None:
        self._held_until = max(self._held_until, time.monotonic() + seconds)

    async def wait(self) -> None:
        while True:
            now = time.monotonic()
            turn = max(now, self._next, self._held_until)
            self._next = turn + self._interval
            await asyncio.sleep(turn - now)
            if time.monotonic() >= self._held_until:  # it may have been set while this one slept
                return


def _parse(text: str) -> Completion | _Retry:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return _Retry(f"the reply is no JSON: {_excerpt(text)}")
    try:
        content = body["choices"][0]["message"].get("content")
        usage = body.get("usage") or {}
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (LookupError, TypeError, ValueError, AttributeError):
        return _Retry(f"the reply is no chat completion: {_excerpt(text)}")
    if not isinstance(content, str | None):
        return _Retry(f"the message's content is no text: {_excerpt(text)}")
    return Completion(text=content or "", prompt_tokens=tokens[0], completion_tokens=tokens[1])


def _retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for; 0 where there is none that can be read."""
    if header is None:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _excerpt(text: str) -> str:
    """What an endpoint said: OpenAI's error message, or the beginning of the text."""
    try:
        said = str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError, RecursionError):
        said = text
    said = " ".join(said.split())
    return said if len(said) <= _EXCERPT else f"{said[:_EXCERPT]}…"
