"""Threads for what takes as long as a request is large: JSON, chat templates, tokenising, long answers.

The event loop does none of it, so that whoever sends little waits for nobody who sends much.
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from genarm.errors import ConversationError

Result = TypeVar("Result")

_TEMPLATE_FILE = "<template>"
"""What Jinja calls the code that it makes of a template."""


class Worker:
    """A thread that does one thing after another; it begins with the first.

    It is a daemon of our own and not an executor's, for which Python waits at its end: a chat template may never end.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def run(self, work: Callable[[], Result]) -> Result:
        """What `work` returns or raises; where the caller is cancelled before its turn, it is not begun."""
        return await asyncio.wrap_future(self.begin(work))

    def begin(self, work: Callable[[], Result]) -> Future[Result]:
        """Have `work` done in its turn."""
        done: Future[Result] = Future()
        self._tasks.put((done, work))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        return done

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            done, work = task
            if done.set_running_or_notify_cancel():
                try:
                    done.set_result(work())
                except BaseException as error:
                    done.set_exception(error)
            del task, done, work  # a traceback holds this frame, and these may hold much

    def close(self) -> None:
        """End the thread after what it has to do."""
        self._tasks.put(None)


class Workers:
    """Those of a server for its requests' bodies and answers.

    Attributes:
        reader: of large bodies.
        writer: of large answers.
    """

    def __init__(self) -> None:
        self.reader = Worker("genarm-reader")
        self.writer = Worker("genarm-writer")

    def close(self) -> None:
        """End them."""
        self.reader.close()
        self.writer.close()


@contextmanager
def template_limit(seconds: float) -> Iterator[None]:
    """End a chat template that computes longer than this in this thread; what else the thread does may take its time.

    A thread cannot be ended from outside, so every line of the template looks at the thread's own clock, which stands
    still while others compute.

    Raises:
        ConversationError: it did.
    """
    until = time.thread_time() + seconds

    def line(*_: Any) -> Any:
        if time.thread_time() > until:
            raise ConversationError(
                f"the chat template was stopped after {seconds:g} s of computing on this conversation; "
                "shorten it, or use /v1/completions"
            )
        return line

    def call(frame: FrameType, *_: Any) -> Any:
        return line() if frame.f_code.co_filename == _TEMPLATE_FILE else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)
