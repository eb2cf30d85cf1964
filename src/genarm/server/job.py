"""The replies behind one HTTP request, from its arrival to the end, whatever the end is.

A request takes its places (see `admission`) before anything is done that takes as long as it is large, has until its
deadline for everything that follows, and gives each place back when the reply is drawn: whether its client has read
it is between the client and us, and not a matter of those who wait.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.types import Send

from genarm.engine import Completion, Request, Token
from genarm.server.admission import Admission, Ticket
from genarm.server.backend import Backend, BackendReply, Event
from genarm.server.bodies import Asked, read_form
from genarm.server.errors import ApiError
from genarm.server.metrics import Metrics
from genarm.server.names import Names
from genarm.server.texts import Texts
from genarm.server.workers import Workers

Result = TypeVar("Result")

SLOW_READER = 30.0
"""Seconds for which a client may take nothing of its answer, and which it has once the time for the request is over."""
_PIECE = 2**16
_MANY_IDS = 20_000
_log = logging.getLogger("genarm.server")


@dataclass(frozen=True, kw_only=True)
class Service:
    """All that answering needs.

    Attributes:
        timeout: seconds for one request from its arrival, waiting included.
        log_prompts: prompts and replies may be logged.
        request_wishes: requests may have wishes of their own, where the backend takes them.
        started: when, in seconds of the epoch.
        workers: for what takes as long as a request is large.
    """

    backend: Backend
    texts: Texts
    names: Names
    admission: Admission
    metrics: Metrics
    timeout: float
    log_prompts: bool
    started: int
    request_wishes: bool = True
    workers: Workers = field(default_factory=Workers)

    def close(self) -> None:
        """End the threads, but not the backend."""
        self.texts.close()
        self.workers.close()


class Job:
    """Replies that were admitted together and end together."""

    def __init__(self, service: Service, arrived: float) -> None:
        """Begin with no place and no reply; `arrived` is by the clock of the loop."""
        self.service = service
        self.deadline = arrived + service.timeout
        self._began = time.perf_counter()
        self._ticket: Ticket | None = None
        self._replies: list[BackendReply] = []
        self._pumps: list[asyncio.Task[None]] = []
        self._going = 0
        self._closed = False
        self._events: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue()
        self._timer: asyncio.TimerHandle | None = None

    def enter(self, count: int) -> None:
        """Take places for `count` replies altogether (raises what `Admission.enter` raises)."""
        if self._ticket is None:
            self._ticket = self.service.admission.enter(count)
        else:
            self._ticket.grow(count)

    async def begin(self, requests: Sequence[Request]) -> None:
        """Begin all of them, or none; there must be places for them.

        Raises:
            GenarmError: one of the requests is not valid.
            EngineFailure: nothing runs now.
        """

        def submit() -> None:
            for request in requests:
                self._replies.append(self.service.backend.submit(request))
                if self._closed:  # nobody waits any more for what this thread does
                    self._replies[-1].cancel()
                    return

        if sum(len(ids) for request in requests for ids in (request.prompt, *request.contexts.values())) > _MANY_IDS:
            await self.service.workers.writer.run(submit)
        else:
            submit()
        self._going = len(requests)
        self._pumps = [asyncio.create_task(self._pump(i)) for i in range(len(requests))]
        loop = asyncio.get_running_loop()
        self._timer = loop.call_at(self.deadline, lambda: self._fail(-1, self._overdue()))

    @asynccontextmanager
    async def in_time(self) -> AsyncGenerator[None]:
        """For what comes before the first event (raises ApiError when the time is over)."""
        try:
            async with asyncio.timeout_at(self.deadline) as limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise self._overdue() from None

    async def events(self) -> AsyncGenerator[tuple[int, Event]]:
        """(which reply, what came), until all have ended.

        Raises:
            ApiError: the time is over.
            EngineFailure, or what went wrong in one of the replies.
        """
        ended = 0
        while ended < len(self._pumps):
            index, item = await self._events.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                ended += 1
            else:
                yield index, item

    def close(self) -> None:
        """End what still runs and leave; harmless where all has ended."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for reply in self._replies:
            reply.cancel()
        for pump in self._pumps:
            pump.cancel()
        if self._ticket is not None:
            self._ticket.close()

    async def _pump(self, index: int) -> None:
        """Take a reply's events as they come, whether the client keeps up or not."""
        metrics, last, first = self.service.metrics, self._began, True
        try:
            async for event in self._replies[index]:
                now = time.perf_counter()
                if isinstance(event, Token):
                    metrics.tokens.inc()
                    (metrics.first if first else metrics.gap).observe(now - last)
                    first, last = False, now
                elif isinstance(event, Completion):
                    self._completed(event)
                self._events.put_nowait((index, event))
            self._events.put_nowait((index, None))
        except Exception as error:
            self._fail(index, error)

    def _completed(self, completion: Completion) -> None:
        self.service.metrics.completed(completion)
        self._going -= 1
        if not self._going and self._timer is not None:
            self._timer.cancel()
        if self._ticket is not None:
            self._ticket.give_back()

    def _fail(self, index: int, error: Exception) -> None:
        """One reply's failure, or the end of the time, ends them all."""
        self._events.put_nowait((index, error))
        self.close()

    def _overdue(self) -> ApiError:
        message = f"The request took longer than {self.service.timeout:g} seconds, waiting included, and was ended"
        return ApiError(504, message, kind="server_error", code="timeout")


class Answering(Protocol):
    """A request whose replies have begun."""

    async def whole(self) -> bytes:
        """The answer in one piece of JSON."""

    def events(self) -> AsyncGenerator[bytes]:
        """The answer as server-sent events; an error is one."""


async def answer(
    service: Service,
    http: HttpRequest,
    form: type[Asked],
    begin: Callable[[Job, Asked, HttpRequest], Awaitable[Answering]],
) -> Response:
    """Read what is asked, begin it, and answer with JSON or, where `stream` is asked, with events.

    Raises:
        ApiError, GenarmError, EngineFailure: what is wrong, as long as nothing was sent.
        ClientDisconnect: the client has gone.
    """
    job = Job(service, http.state.arrived)

    async def prepare() -> tuple[Answering, bytes | None]:
        async with job.in_time():
            asked = await read_form(http, form, job.enter, service.workers.reader)
            answering = await begin(job, asked, http)
        return answering, None if asked.stream else await answering.whole()

    try:
        answering, content = await unless_gone(http, prepare())
    except BaseException:
        job.close()
        raise
    if content is None:
        # Proxies that collect an answer before they pass it on would defeat the purpose.
        headers = {
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-store",
            "X-Accel-Buffering": "no",
        }
        return JobResponse(job, answering.events(), headers=headers)
    headers = {"Content-Type": "application/json", "Content-Length": str(len(content))}
    return JobResponse(job, _pieces(content), headers=headers)


async def _pieces(content: bytes) -> AsyncGenerator[bytes]:
    for start in range(0, len(content), _PIECE):
        yield content[start : start + _PIECE]


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


class JobResponse(StreamingResponse):
    """The answer of a job, piece by piece; however it ends, the job has then ended."""

    def __init__(self, job: Job, pieces: AsyncGenerator[bytes], *, headers: dict[str, str]):
        super().__init__(pieces, headers=headers)
        self._job = job
        self._pieces = pieces

    async def stream_response(self, send: Send) -> None:
        """Send all of it, to a client that reads it."""
        limit = max(self._job.deadline, asyncio.get_running_loop().time()) + SLOW_READER
        try:
            async with asyncio.timeout_at(limit):
                await super().stream_response(send)
        except TimeoutError:
            _log.warning("a client did not read its answer to the end in time")
            raise ClientDisconnect from None  # which cuts the connection
        finally:
            self._job.close()
            await self._pieces.aclose()
