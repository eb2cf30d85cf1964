"""The replies behind one HTTP request, from admission to the end, whatever the end is."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse
from starlette.types import Send

from genarm.engine import Completion, Request, Token
from genarm.server.admission import Admission
from genarm.server.backend import Backend, Event, Reply
from genarm.server.errors import ApiError
from genarm.server.metrics import Metrics
from genarm.server.names import Names
from genarm.server.texts import Texts

Result = TypeVar("Result")

_SLOW_READER = 5.0
"""Seconds that a client has to read the end of a stream, once the time for the request itself is over."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """All that answering needs.

    Attributes:
        timeout: seconds for one request, waiting included.
        log_prompts: prompts and replies may be logged.
        started: when, in seconds of the epoch.
    """

    backend: Backend
    texts: Texts
    names: Names
    admission: Admission
    metrics: Metrics
    timeout: float
    log_prompts: bool
    started: int


class Job:
    """Replies that were admitted together and end together."""

    def __init__(self, service: Service, requests: Sequence[Request]) -> None:
        """Begin all of them, or none.

        Raises:
            ApiError: the queue is full.
            GenarmError: one of the requests is not valid.
            EngineFailure: nothing runs now.
        """
        self.service = service
        self.deadline = asyncio.get_running_loop().time() + service.timeout
        self._began = time.perf_counter()
        self._last = [self._began] * len(requests)
        self._first = [True] * len(requests)
        self._ticket = service.admission.enter(len(requests))
        self._replies: list[Reply] = []
        try:
            for request in requests:
                self._replies.append(service.backend.submit(request))
        except BaseException:
            self.close()
            raise

    async def events(self) -> AsyncGenerator[tuple[int, Event]]:
        """(which reply, what came), until all have ended.

        Raises:
            ApiError: the time is over.
            EngineFailure, or what went wrong in one of the replies.
        """
        merged = _merge(self._replies)
        try:
            while True:
                async with asyncio.timeout_at(self.deadline) as limit:
                    try:
                        index, event = await anext(merged)
                    except StopAsyncIteration:
                        return
                self._observe(index, event)
                yield index, event
        except TimeoutError:
            if not limit.expired():
                raise
            message = f"The request took longer than {self.service.timeout:g} seconds, waiting included, and was ended"
            raise ApiError(504, message, kind="server_error", code="timeout") from None
        finally:
            self.close()
            await merged.aclose()

    def close(self) -> None:
        """End what still runs and leave; harmless where all has ended."""
        for reply in self._replies:
            reply.cancel()
        self._ticket.close()

    def _observe(self, index: int, event: Event) -> None:
        metrics, now = self.service.metrics, time.perf_counter()
        if isinstance(event, Token):
            metrics.tokens.inc()
            (metrics.first if self._first[index] else metrics.gap).observe(now - self._last[index])
            self._first[index], self._last[index] = False, now
        elif isinstance(event, Completion):
            metrics.completed(event)
            self._ticket.give_back()


async def _merge(replies: Sequence[Reply]) -> AsyncGenerator[tuple[int, Event]]:
    """The events of all replies as they come."""
    if len(replies) == 1:
        async for event in replies[0]:
            yield 0, event
        return
    arrived: asyncio.Queue[tuple[int, Event | BaseException | None]] = asyncio.Queue()

    async def pump(index: int, reply: Reply) -> None:
        try:
            async for event in reply:
                arrived.put_nowait((index, event))
            arrived.put_nowait((index, None))
        except Exception as error:
            arrived.put_nowait((index, error))

    tasks = [asyncio.create_task(pump(i, reply)) for i, reply in enumerate(replies)]
    try:
        going = len(tasks)
        while going:
            index, item = await arrived.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                going -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()


async def unless_gone(http: HttpRequest, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` returns; where the client goes away before, it is cancelled.

    Raises:
        ClientDisconnect: it has gone.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(http))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events of a job; however the stream ends, the job has then ended."""

    media_type = "text/event-stream"

    def __init__(self, job: Job, events: AsyncGenerator[str], *, headers: dict[str, str]) -> None:
        # Proxies that collect an answer before they pass it on would defeat the purpose.
        super().__init__(events, headers={**headers, "Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._job = job
        self._events = events

    async def stream_response(self, send: Send) -> None:
        """Send all events, to a client that reads them."""
        try:
            async with asyncio.timeout_at(self._job.deadline + _SLOW_READER):
                await super().stream_response(send)
        except TimeoutError:
            logging.getLogger("genarm.server").warning("a client did not read its stream to the end in time")
        finally:
            self._job.close()
            await self._events.aclose()
