"""Our engine in a process of its own, so that what the server does for each token takes nothing from the steps.

Server and engine would share one interpreter otherwise: of a step of 64 replies that a client sees with every number, a
tenth and more went into JSON and sockets, on a GPU most of it. Here a step sends one message, whatever it has drawn.

Both ends are this program, so that they speak `marshal` (numbers and texts, for each token) and `pickle`
(requests and errors). Nobody else can reach the pipe.
"""

from __future__ import annotations

import atexit
import marshal
import multiprocessing
import pickle
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from typing import Any, Final

from genarm.engine import Completion, Engine, Request, Stream, Token
from genarm.engine.stream import Bell, Event
from genarm.errors import EngineFailure, GenarmError
from genarm.server.engine_main import main
from genarm.server.log import start_log

Make = Callable[[], Engine]

_TOKEN: Final = 0
_COMPLETION: Final = 1
_OTHER: Final = 2
"""A prompt's numbers, or what went wrong with a reply, pickled."""
_ANSWER: Final = 3
"""To a request: None, or what is wrong with it, pickled."""

_PATIENCE = 5.0
"""Seconds that the process has for its last step before it is ended."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Requests that ran and waited when the engine last said so."""

    running: int
    waiting: int


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """What the engine is, once it is made."""

    streams: int
    context: int
    about: str


class _Reply:
    """A stream here, and what has come of it."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.tokens: list[Token] = []

    def take(self, kind: int, said: Any) -> bool:
        """Hand on what the engine said of it; False where it was the last."""
        event: Event
        if kind == _TOKEN:
            event = Token(**said)
            self.tokens.append(event)
        elif kind == _COMPLETION:
            text = "".join(token.text for token in self.tokens)
            event = Completion(text=text, tokens=tuple(self.tokens), **said)
        else:
            event = pickle.loads(said)
        self.stream.put(event)
        return kind == _TOKEN or not isinstance(event, Completion | BaseException)


class EngineProcess:
    """An engine in a process that was started for it; a `Decoder` (see `genarm.server.backend`).

    The process ends with this object's `close`, with the program that made it, however that ends, and not by Ctrl-C or
    SIGTERM, which are the server's to answer.
    """

    def __init__(self, make: Make, ended: Callable[[EngineProcess, EngineFailure], None] | None = None) -> None:
        """Start the process and have it call `make`, which must be picklable (a function of a module, or a partial).

        `ended` is told where the process ends by itself, whether it had anything to do or not.

        Raises:
            Whatever `make` raises.
            EngineFailure: the process ended before there was an engine.
        """
        spawning = multiprocessing.get_context("spawn")  # of a fork, threads and CUDA would not survive
        self._pipe, theirs = spawning.Pipe()
        self._process = spawning.Process(
            target=main, args=(theirs, pickle.dumps(make)), name="genarm-engine", daemon=True
        )
        self._process.start()
        # Where nothing closes this object, Python would wait at its end for a process that waits for its words.
        atexit.register(self._process.kill)
        theirs.close()
        try:
            ready = self._pipe.recv()
            if isinstance(ready, BaseException):
                raise ready
        except BaseException as error:  # Ctrl-C, too, while it was loading
            about = self._how_it_ended() if isinstance(error, EOFError | OSError) else ""
            self._end()
            if about:
                raise EngineFailure(f"the engine did not start: {about}") from error
            raise
        self.streams: int = ready.streams
        self.context: int = ready.context
        self._about: str = ready.about
        self._numbers = count()
        self._replies: dict[int, _Reply] = {}
        self._answers: dict[int, Future[None]] = {}
        self._counts = Counts(running=0, waiting=0)
        self._bell = Bell()
        self._guard = threading.Lock()  # the three above, whether it has ended, and who writes
        self._failure: EngineFailure | None = None
        self._ended = ended
        self._listener = threading.Thread(target=self._listen, name="genarm-engine-listener", daemon=True)
        self._listener.start()

    def describe(self) -> str:
        """What runs, for the log."""
        return self._about

    def stream(self, request: Request) -> Stream:
        """Begin a request (raises what `Engine.stream` raises)."""
        number, answer = next(self._numbers), Future[None]()
        stream = Stream(_ELSEWHERE, lambda: self._say(("cancel", number)), self._bell)
        with self._guard:
            if self._failure is not None:
                raise self._failure
            self._replies[number], self._answers[number] = _Reply(stream), answer
        try:
            self._say(("begin", number, request))
            answer.result()
        except BaseException:
            self._replies.pop(number, None)
            self._answers.pop(number, None)
            raise
        return stream

    def statistics(self) -> Counts:
        """As of the last step."""
        return self._counts

    def close(self) -> None:
        """Stop; what still runs ends with an EngineFailure."""
        self._fail("the engine was closed")
        self._say(None)
        self._process.join(_PATIENCE)
        self._end()
        self._listener.join()
        self._pipe.close()

    def _end(self) -> None:
        self._process.kill()
        self._process.join()
        atexit.unregister(self._process.kill)

    def _say(self, words: Any) -> None:
        """To the process; where it has ended, its replies are told so by the listener."""
        with self._guard, suppress(OSError):
            self._pipe.send(words)

    def _listen(self) -> None:
        """Hand on what the process says until it ends."""
        try:
            while True:
                running, waiting, said = marshal.loads(self._pipe.recv_bytes())
                self._counts = Counts(running=running, waiting=waiting)
                with self._bell.held():
                    for number, kind, what in said:
                        self._take(number, kind, what)
        except (EOFError, OSError):
            pass
        finally:
            unasked = self._failure is None
            self._fail(f"the engine's process ended: {self._how_it_ended()}")
            if unasked and self._ended is not None and self._failure is not None:
                self._ended(self, self._failure)

    def _take(self, number: int, kind: int, what: Any) -> None:
        if kind == _ANSWER:
            answer = self._answers.pop(number, None)
            if answer is None:
                return
            if what is None:
                answer.set_result(None)
            else:
                answer.set_exception(pickle.loads(what))
            return
        reply = self._replies.get(number)
        if reply is not None and not reply.take(kind, what):
            self._replies.pop(number, None)

    def _fail(self, why: str) -> None:
        """End everything; the first reason stays."""
        with self._guard:
            if self._failure is None:
                self._failure = EngineFailure(why)
            failure = self._failure
            replies, self._replies = self._replies, {}
            answers, self._answers = self._answers, {}
        self._counts = Counts(running=0, waiting=0)
        for answer in answers.values():
            answer.set_exception(failure)
        for reply in replies.values():
            reply.stream.put(failure)

    def _how_it_ended(self) -> str:
        self._process.join(_PATIENCE)
        code = self._process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return f"{name} ended it" + (", which is what a machine without memory left does" if code == -9 else "")
        return f"exit status {code}"


class _Elsewhere:
    """The source of a stream whose steps are made by another process."""

    def advance(self) -> bool:
        return False

    def start(self) -> None:
        """It has begun."""


_ELSEWHERE = _Elsewhere()


# --- in the process -----------------------------------------------------------------------------------------------


class _Outbox:
    """What the engine has said since the last message."""

    def __init__(self, pipe: Connection) -> None:
        self.engine: Engine | None = None
        self._pipe = pipe
        self._said: list[tuple[int, int, Any]] = []
        self._guard = threading.Lock()

    def put(self, number: int, event: Event) -> None:
        """Called by the thread that makes the steps."""
        if isinstance(event, Token):
            self._add(number, _TOKEN, {**vars(event), "rewards": dict(event.rewards)})
        elif isinstance(event, Completion):  # whose tokens were sent one by one
            said = {name: value for name, value in vars(event).items() if name not in ("text", "tokens")}
            self._add(number, _COMPLETION, said)
        else:
            self._add(number, _OTHER, _pickled(event))

    def _add(self, number: int, kind: int, said: Any) -> None:
        with self._guard:
            self._said.append((number, kind, said))

    def send(self) -> None:
        """Send all of it, if there is any."""
        assert self.engine is not None
        with self._guard:
            said, self._said = self._said, []
            if said:
                counts = self.engine.statistics()
                with suppress(OSError):  # nobody is there any more; the main thread finds out, too
                    self._pipe.send_bytes(marshal.dumps((counts.running, counts.waiting, said)))

    def answer(self, number: int, error: BaseException | None) -> None:
        """Say whether a request has begun."""
        self._add(number, _ANSWER, None if error is None else _pickled(error))
        self.send()


def _pickled(event: Any) -> bytes:
    """`event`, or, of an error that has more than a message, its message."""
    try:
        said = pickle.dumps(event)
        pickle.loads(said)
    except Exception:
        if not isinstance(event, BaseException):
            raise
        kind = GenarmError if isinstance(event, GenarmError) else RuntimeError
        return pickle.dumps(kind(f"{event}"))
    return said


def run_engine(pipe: Connection, make: Make) -> None:
    """Make the engine and do what the server says, until it closes the pipe."""
    start_log()
    try:
        engine = Engine.in_own_thread(make)
    except BaseException as error:
        with suppress(OSError):
            pipe.send_bytes(_pickled(error))
        return
    outbox = _Outbox(pipe)
    outbox.engine = engine
    engine.after_step = outbox.send
    pipe.send(_Ready(streams=engine.streams, context=engine.context, about=engine.describe()))
    running: dict[int, Callable[[], None]] = {}
    with suppress(EOFError, OSError):
        while (words := pipe.recv()) is not None:
            _obey(engine, outbox, running, words)
    engine.close()


def _obey(engine: Engine, outbox: _Outbox, running: dict[int, Callable[[], None]], words: tuple[Any, ...]) -> None:
    verb, number, *rest = words
    if verb == "cancel":
        if number in running:
            running[number]()
        return

    ended = threading.Event()

    def deliver(event: Event) -> None:
        outbox.put(number, event)
        if isinstance(event, Completion | BaseException):
            ended.set()
            running.pop(number, None)

    try:
        running[number] = engine.begin(rest[0], deliver)
    except Exception as error:
        outbox.answer(number, error)
        return
    if ended.is_set():  # before it was noted
        running.pop(number, None)
    outbox.answer(number, None)
