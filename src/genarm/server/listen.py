"""Serve an application on a socket until the process is told to stop, and let running requests end."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from genarm.errors import ConfigError
from genarm.server.engine_main import TURN
from genarm.server.errors import ApiError
from genarm.server.job import SLOW_READER

_KEEP_ALIVE = 30
"""Seconds that a client has for the head of a request."""
_TICK = 0.25
_PATIENCE = 5.0
_LAST_SECONDS = 1.0
_AT_ONCE = 16
_WAITING = 512
_MOST_CONNECTIONS = 1024
_FILES = 4096
_LARGEST_HEAD = 2**15
_log = logging.getLogger("genarm.server")


def bind(host: str, port: int) -> socket.socket:
    """A socket on `host` and `port` (0: any free one); nobody can connect yet.

    Raises:
        ConfigError: there is no such address, or it is taken.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port is {port}; it must be from 0 (any free one) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot listen on {host}: {error}") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    return listener


def url_of(host: str, listener: socket.socket) -> str:
    """Where a browser finds it."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"


def listen(app: ASGIApp, listener: socket.socket, *, drain: float, announce: Callable[[], None]) -> None:
    """Answer until SIGTERM or Ctrl-C; then take no more requests and let those that run end, for `drain` seconds.

    A second signal ends them at once. `announce` is called when clients can connect.
    """
    _allow_files()
    sys.setswitchinterval(TURN)
    # uvicorn raises a signal once more when it has finished; by then there is nothing left to end.
    before = {number: signal.signal(number, _done) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        Server(app, drain=drain, announce=announce).run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _done(*_: object) -> None:
    """The server has stopped already."""


class Server(uvicorn.Server):
    """uvicorn's, which closes connections that would take a place for nothing."""

    def __init__(self, app: ASGIApp, *, drain: float, announce: Callable[[], None] = lambda: None) -> None:
        """See `listen`."""
        config = uvicorn.Config(
            app,
            loop="asyncio",  # and h11: what is said here of connections holds wherever others are installed, too
            http=_Connection,
            ws="none",
            backlog=_AT_ONCE,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=math.ceil(drain),
        )
        super().__init__(config)
        self._announce = announce
        self._reaper: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to take connections, and to look after them."""
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(_WAITING)  # asyncio takes as many at once as may wait, unless it is told afterwards
        self._reaper = asyncio.create_task(self._reap())
        if self.started:
            self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let what runs end, and close what does not."""
        await super().shutdown(sockets)
        if self.server_state.tasks:  # which end now that their connections are cut
            await asyncio.wait(self.server_state.tasks, timeout=_LAST_SECONDS)
        if self._reaper is not None:
            self._reaper.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets running requests end, the second one does not; see `uvicorn.Server`."""
        if self.should_exit:
            self.force_exit = True
            timer = threading.Timer(_PATIENCE, os._exit, (128 + sig,))  # a step of a large model may take long
            timer.daemon = True
            timer.start()
        super().handle_exit(sig, frame)

    async def _reap(self) -> None:
        while True:
            for connection in list(self.server_state.connections):
                assert isinstance(connection, _Connection)
                if self.force_exit or connection.overdue(time.monotonic()):
                    connection.transport.abort()
            await asyncio.sleep(_TICK)


def most_connections() -> int:
    """How many connections there may be: half of the files that may be open, less those that come at once."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_CONNECTIONS if files < 0 else max(_AT_ONCE, min(_MOST_CONNECTIONS, files // 2 - _AT_ONCE))


def _allow_files() -> None:
    """Raise our own limit of open files, which often is much lower than what we may have."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if most == resource.RLIM_INFINITY else min(_FILES, most)
    if now != resource.RLIM_INFINITY and now < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


class _Transport:
    """A transport that counts what it was given to send."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.written = 0

    def write(self, data: bytes) -> None:
        self.written += len(data)
        self._transport.write(data)

    @property
    def taken(self) -> int:
        """Bytes that have left us."""
        return self.written - self._transport.get_write_buffer_size()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _Parser(h11.Connection):
    """h11's, which understands the same bytes in the same way however the network cuts them."""

    def __init__(self) -> None:
        """For a server, with a limit of its own for heads: h11's would let one pass that comes in one piece."""
        super().__init__(h11.SERVER, max_incomplete_event_size=sys.maxsize)

    @property
    def waiting(self) -> int:
        """Bytes that have arrived and belong to no request yet that was begun."""
        return len(self._receive_buffer)

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """See `h11.Connection`. Line breaks before a request (RFC 9112, 2.2) and bytes after the last one are skipped.

        Raises:
            h11.RemoteProtocolError: it is no request, or has too long a head.
        """
        arrived = self._receive_buffer
        if self.their_state is h11.IDLE:
            start = bytes(arrived)
            arrived.maybe_extract_at_most(len(start) - len(start.lstrip(b"\r\n")))
        elif self.their_state in (h11.MUST_CLOSE, h11.CLOSED):
            arrived.maybe_extract_at_most(len(arrived))
        before = len(arrived)
        event = super().next_event()
        whole = before - len(arrived) if isinstance(event, h11.Request) else 0
        if max(whole, len(arrived) if event is h11.NEED_DATA else 0) > _LARGEST_HEAD:
            raise h11.RemoteProtocolError(f"its head, or a line of it, has more than {_LARGEST_HEAD} bytes")
        return event


class _Flow(FlowControl):
    """uvicorn's, which takes no more from a client as long as requests of its wait to be answered.

    Each time an application asks for more of a request's body uvicorn reads on, and what belongs to later requests
    would pile up: a quarter of a megabyte for each request that is answered, however short.
    """

    def __init__(self, transport: _Transport, parser: _Parser) -> None:
        super().__init__(transport)  # type: ignore[arg-type]
        self._parser = parser

    def resume_reading(self) -> None:
        """Unless more has arrived already than the head of a request may have."""
        if self._parser.waiting <= _LARGEST_HEAD:
            super().resume_reading()


class _Connection(H11Protocol):
    """A connection that knows since when it has been waiting for its client."""

    conn: _Parser
    _counted: _Transport
    since: float
    _taken: int = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See `H11Protocol`."""
        super().__init__(*args, **kwargs)
        self.conn = _Parser()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        self._counted = _Transport(transport)
        self.since = time.monotonic()
        self._taken_at = self.since
        super().connection_made(self._counted)  # type: ignore[arg-type]
        self.flow = _Flow(self._counted, self.conn)
        there = [c for c in self.connections if isinstance(c, _Connection) and not c.transport.is_closing()]
        if len(there) > most_connections():
            idle = [each for each in there if each.idle]  # this one at least
            min(idle, key=lambda each: (each.sends, each.since)).transport.abort()

    def on_response_complete(self) -> None:
        """A request has its answer; from now on the next one is waited for."""
        self.since = time.monotonic()
        super().on_response_complete()
        if self.idle:  # nothing that waited has become a request
            self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no request; client and operator are told why. A connection amid an answer is cut."""
        _log.warning("a connection sent what is no request: %s (%s)", sys.exception(), self.conn.states)
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        problem = ApiError(400, f"this is no HTTP request: {sys.exception()}", code="invalid_http")
        answer = problem.response()
        headers = [*answer.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=headers),
            h11.Data(data=bytes(answer.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    @property
    def idle(self) -> bool:
        """Whether no request has arrived that has no answer yet."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def sends(self) -> bool:
        """Whether its client has not taken all that was sent."""
        return self._counted.written > self._counted.taken

    def overdue(self, now: float) -> bool:
        """Whether its client has sent no whole head of a request, or taken nothing of an answer, for too long."""
        if not self.sends or self._counted.taken != self._taken:
            self._taken, self._taken_at = self._counted.taken, now
        if self.sends:
            return now - self._taken_at > SLOW_READER
        return self.idle and now - self.since > _KEEP_ALIVE
