"""Serve an application on a socket until the process is told to stop, and let running requests end."""

from __future__ import annotations

import math
import signal
import socket
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from genarm.errors import ConfigError

_KEEP_ALIVE = 30


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
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=math.ceil(drain),
    )
    # uvicorn raises a signal once more when it has finished; by then there is nothing left to end.
    before = {number: signal.signal(number, _done) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        _Server(config, announce).run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _done(*_: object) -> None:
    """The server has stopped already."""


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announce()
