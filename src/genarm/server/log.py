"""The server's log: one line for each thing that happens, to stderr, and nobody waits for whoever reads it."""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading

_MOST_WAITING = 4 * 2**20
_LAST_SECONDS = 1.0


def start_log() -> None:
    """Send what the project, libraries and Python's warnings say to stderr from now on."""
    # A descriptor of its own: the number of one that somebody else closes may be a client's connection next.
    handler = Unhurried(os.dup(sys.stderr.fileno()))
    handler.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("genarm").setLevel(logging.INFO)
    logging.captureWarnings(True)
    for name in ("transformers", "huggingface_hub"):  # which have handlers of their own
        library = logging.getLogger(name)
        library.handlers, library.propagate = [], True


class PlainFormatter(logging.Formatter):
    """Lines as they look: what a client or a template has said cannot begin a line or speak to the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, and those of a traceback."""
        return "\n".join(map(_plain, super().format(record).split("\n")))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The line itself."""
        return super().formatMessage(record).replace("\n", "\\n")


def _plain(line: str) -> str:
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class Unhurried(logging.Handler):
    """Writes in a thread of its own, so that a pipe that nobody reads stops nothing; what does not fit is counted."""

    def __init__(self, descriptor: int, most: int = _MOST_WAITING) -> None:
        """Begin; up to `most` bytes wait for `descriptor` to take them."""
        super().__init__()
        self._descriptor = descriptor
        self._most = most
        self._lines: queue.SimpleQueue[bytes | threading.Event] = queue.SimpleQueue()
        self._count = threading.Lock()
        self._waiting = 0
        self._dropped = 0
        threading.Thread(target=self._write, name="genarm-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        try:
            line = f"{self.format(record)}\n".encode(errors="backslashreplace")
        except Exception:
            self.handleError(record)
            return
        with self._count:
            if self._waiting + len(line) > self._most:
                self._dropped += 1
                return
            line = self._left_out() + line
            self._waiting += len(line)
        self._lines.put(line)

    def flush(self) -> None:
        """Wait a moment for what has been said to be written."""
        done = threading.Event()
        self._lines.put(done)
        done.wait(_LAST_SECONDS)

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            if isinstance(line, threading.Event):
                line.set()
                continue
            _write_all(self._descriptor, line)
            with self._count:
                self._waiting -= len(line)
                notice = b"" if self._waiting else self._left_out()
            _write_all(self._descriptor, notice)

    def _left_out(self) -> bytes:
        # Said where the lines are missing: before the next one that is taken, or when all that was taken is written.
        dropped, self._dropped = self._dropped, 0
        return f"… {dropped} lines of the log were left out: nobody read it\n".encode() if dropped else b""


def _write_all(descriptor: int, data: bytes) -> None:
    # Not through sys.stderr, whose lock this thread would hold while Python ends.
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError:  # whoever read it is gone
        pass
