"""What the server needs of whatever decodes, the restart after a failure, and our own engine in that role."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeAlias, TypeVar

from genarm.engine import Completion, Engine, Request, ScoredPrompt, Stream, Token
from genarm.errors import EngineFailure, GenarmError, MemberError
from genarm.provenance import Record, difference
from genarm.server.engine_process import EngineProcess

Event: TypeAlias = ScoredPrompt | Token | Completion
State: TypeAlias = Literal["ok", "starting again", "failed"]

_log = logging.getLogger("genarm.server")


class BackendReply(Protocol):
    """A request that waits or runs."""

    def __aiter__(self) -> AsyncIterator[Event]:
        """The prompt's numbers if they were asked for, the tokens, and the completion.

        Raises:
            EngineFailure: the backend failed; other errors are this request's own.
        """

    def cancel(self) -> None:
        """End it, wherever it is; what it held is free before the next step."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests that run, and that wait to."""

    running: int
    waiting: int


class Backend(Protocol):
    """Something that decodes many requests at once.

    Attributes:
        streams: how many run at once; others wait.
        context: the most tokens of a prompt and its reply together.
        explains: tokens come with what the base and each reward say of them.
        wishes: requests may have wishes.
    """

    streams: int
    context: int
    explains: bool
    wishes: bool

    def describe(self) -> str:
        """What runs, for the log."""

    def submit(self, request: Request) -> BackendReply:
        """Begin a request.

        Raises:
            GenarmError: the request is not valid; nothing has begun.
            EngineFailure: nothing runs now.
        """

    @property
    def state(self) -> State:
        """Whether requests are taken."""

    @property
    def restarts(self) -> int:
        """How often it was started again."""

    def load(self) -> Load:
        """A moment old at most."""

    def close(self) -> None:
        """End everything."""


class _Counts(Protocol):
    @property
    def running(self) -> int: ...

    @property
    def waiting(self) -> int: ...


class Decoder(Protocol):
    """An engine that runs until it fails; requests are `stream`s."""

    @property
    def streams(self) -> int:
        """How many requests run at once."""

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its reply together."""

    def describe(self) -> str:
        """What runs, for the log."""

    def stream(self, request: Request) -> Stream:
        """Begin a request."""

    def statistics(self) -> _Counts:
        """Requests that run and wait."""

    def close(self) -> None:
        """Stop; what still runs ends with an EngineFailure."""


Running = TypeVar("Running", bound=Decoder)


class RestartingBackend(Generic[Running]):
    """An engine, started again once after a failure.

    A step that fails may leave anything behind, so everything is made anew, from the files on.
    """

    def __init__(
        self,
        make: Callable[[], Running],
        *,
        explains: bool,
        wishes: bool,
        content: Callable[[], Record] | None = None,
    ) -> None:
        """Make the engine now; raises what `make` raises.

        Args:
            make: loads the model and makes the engine; called again after a failure.
            explains, wishes: see `Backend`.
            content: the model by its content (`genarm.provenance`), where it comes from files.

        Raises:
            MemberError: the model's files change while they are loaded.
        """
        self._make = make
        self._content = content
        self._served = None if content is None else content()
        self.explains = explains
        self.wishes = wishes
        self._engine: Running | None = None
        self._state: State = "ok"
        self._why = ""
        self._restarts = 0
        self._closed = False
        self._guard = threading.Lock()
        self._engine = engine = self._made()
        self.streams = engine.streams
        self.context = engine.context

    @property
    def state(self) -> State:
        """See `Backend`."""
        return self._state

    @property
    def restarts(self) -> int:
        """See `Backend`."""
        return self._restarts

    def describe(self) -> str:
        """See `Backend`."""
        return "" if self._engine is None else self._engine.describe()

    def submit(self, request: Request) -> BackendReply:
        """See `Backend`."""
        engine = self._engine
        if engine is None:
            raise EngineFailure(self._why)
        return _EngineReply(engine.stream(request), lambda error: self._failed(engine, error))

    def load(self) -> Load:
        """See `Backend`."""
        engine = self._engine
        if engine is None:
            return Load(running=0, waiting=0)
        statistics = engine.statistics()
        return Load(running=statistics.running, waiting=statistics.waiting)

    def close(self) -> None:
        """See `Backend`."""
        with self._guard:
            self._closed = True
            engine, self._engine = self._engine, None
            self._state, self._why = "failed", "the server is stopping"
        if engine is not None:
            engine.close()

    def _made(self) -> Running:
        """An engine for the model that clients were told of; its files may be others by now, or become so meanwhile."""
        engine = self._make()
        changed = None if self._content is None else difference(self._served, self._content())
        if changed is not None:
            engine.close()
            raise MemberError(f"the model's files are not those that the server began with: {changed}")
        return engine

    def _failed(self, engine: Running, error: EngineFailure) -> None:
        """Called for every request that a failure ends, and when an idle engine ends; the first has an effect."""
        with self._guard:
            if self._closed or engine is not self._engine:
                return
            self._engine, self._why = None, str(error)
            again = self._restarts == 0
            self._restarts += again
            self._state = "starting again" if again else "failed"
        _log.error("the engine failed: %s", error, exc_info=error.__cause__)
        threading.Thread(target=self._replace, args=(engine, again), name="genarm-restart", daemon=True).start()

    def _replace(self, engine: Running, again: bool) -> None:
        engine.close()
        del engine
        gc.collect()  # models refer to themselves, and the next one may need their memory
        if not again:
            _log.error("the engine failed a second time and stays down; restart the server")
            return
        try:
            new = self._made()
        except Exception as error:
            self._state, self._why = "failed", f"the engine could not be started again: {error}"
            _log.error("%s; restart the server", self._why, exc_info=not isinstance(error, GenarmError))
            return
        with self._guard:
            if not self._closed:
                self._engine, self._state = new, "ok"
                _log.warning("the engine was started again")
                return
        new.close()


class ProcessBackend(RestartingBackend[EngineProcess]):
    """`genarm.engine` in a process of its own, which is what `genarm serve` has."""

    def __init__(self, make: Callable[[], Engine], *, content: Callable[[], Record] | None = None) -> None:
        """Make the engine now; `make`, which must be picklable, is called again after a failure."""
        super().__init__(lambda: EngineProcess(make, self._failed), explains=True, wishes=True, content=content)


class EngineBackend(RestartingBackend[Engine]):
    """`genarm.engine` in a thread of its own, for servers within a program that has the model already."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        """Make the engine now; `make` is called again after a failure."""
        super().__init__(lambda: Engine.in_own_thread(make), explains=True, wishes=True)


class _EngineReply:
    def __init__(self, stream: Stream, failed: Callable[[EngineFailure], None]) -> None:
        self._stream = stream
        self._on_failure = failed

    async def __aiter__(self) -> AsyncIterator[Event]:
        told = False
        try:
            async for token in self._stream:
                if not told and self._stream.prompt is not None:
                    told = True
                    yield self._stream.prompt
                yield token
        except EngineFailure as error:
            self._on_failure(error)
            raise
        if not told and self._stream.prompt is not None:
            yield self._stream.prompt
        assert self._stream.completion is not None
        yield self._stream.completion

    def cancel(self) -> None:
        self._stream.cancel()
