"""The tokens of one request as they come, for a `for` or an `async for` loop."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Protocol, TypeAlias

from genarm.engine.request import Completion, ScoredPrompt, Token

Event: TypeAlias = Token | ScoredPrompt | Completion | BaseException


class Source(Protocol):
    """What a stream needs of its engine."""

    def advance(self) -> bool:
        """Make a step in this thread; False where another thread makes them."""

    def start(self) -> None:
        """Have a thread make the steps."""


class Bell:
    """Wakes those who wait for something in event loops; all that wait in one loop with one call.

    A call from another thread is a system call, for which the caller gives up the interpreter: with one for each of 64
    streams, an engine would wait for it 64 times a step.
    """

    def __init__(self) -> None:
        """Nobody is to be woken."""
        self._lock = threading.Lock()
        self._held = False
        self._due: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}

    def ring(self, loop: asyncio.AbstractEventLoop, arrived: asyncio.Event) -> None:
        """Set `arrived` in its loop, now or when the bell is let go."""
        with self._lock:
            self._due.setdefault(loop, []).append(arrived)
            held = self._held
        if not held:
            self._wake()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Ring once, at the end, for everything that happens meanwhile."""
        with self._lock:
            self._held = True
        try:
            yield
        finally:
            with self._lock:
                self._held = False
            self._wake()

    def _wake(self) -> None:
        with self._lock:
            due, self._due = self._due, {}
        for loop, events in due.items():
            with suppress(RuntimeError):  # the loop was closed: nobody listens any more
                loop.call_soon_threadsafe(_set_all, events)


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()


class Stream:
    """The tokens of one request, for a `for` or an `async for` loop (one of the two).

    Leaving the loop early does not end the request; `cancel` does, and so does the end of a `with` block.
    """

    def __init__(self, source: Source, cancel: Callable[[], None], bell: Bell | None = None) -> None:
        """Made by `Engine.stream`; `cancel` ends the request there, and `bell` wakes whoever waits in an event loop."""
        self._bell = bell or Bell()
        self._source = source
        self._cancel = cancel
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._completion: Completion | None = None
        self._prompt: ScoredPrompt | None = None
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrived: asyncio.Event | None = None

    def put(self, event: Event) -> None:
        """Called by the engine."""
        with self._lock:
            self._events.put(event)
            loop, arrived = self._loop, self._arrived
        if loop is not None and arrived is not None:
            if loop.is_closed():  # nobody listens any more
                self.cancel()
            else:
                self._bell.ring(loop, arrived)

    def cancel(self) -> None:
        """End the request, if it still runs; its rows are free before the next step."""
        if self._completion is None and self._error is None:
            self._cancel()

    def result(self) -> Completion:
        """Wait for the end; tokens not yet taken from the stream are passed over."""
        for _ in self:
            pass
        assert self._completion is not None
        return self._completion

    @property
    def prompt(self) -> ScoredPrompt | None:
        """The prompt's numbers, where they were asked for; they come before the first token."""
        return self._prompt

    @property
    def completion(self) -> Completion | None:
        """The whole reply, once the stream has been read to its end."""
        return self._completion

    def __iter__(self) -> Iterator[Token]:
        while self._completion is None:
            token = self._take(self._next())
            if token is not None:
                yield token

    def _next(self) -> Event:
        while True:
            if self._error is not None:
                raise self._error
            try:
                return self._events.get_nowait()
            except queue.Empty:
                if not self._source.advance():
                    return self._events.get()

    async def __aiter__(self) -> AsyncIterator[Token]:
        with self._lock:
            self._loop, self._arrived = asyncio.get_running_loop(), asyncio.Event()
        self._source.start()
        while self._completion is None:
            if self._error is not None:
                raise self._error
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                self._arrived.clear()
                if self._events.empty():
                    await self._arrived.wait()
                continue
            token = self._take(event)
            if token is not None:
                yield token

    def _take(self, event: Event) -> Token | None:
        if isinstance(event, Token):
            return event
        if isinstance(event, ScoredPrompt):
            self._prompt = event
            return None
        if isinstance(event, Completion):
            self._completion = event
            return None
        self._error = event
        raise event

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.cancel()
