"""A small chat-completions endpoint for the tests: a real HTTP server in a thread, which can be told to misbehave."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


@dataclass(kw_only=True)
class Act:
    """What the server does with a request: it waits, then sends the status with the body, cut or reset half-way."""

    status: int = 200
    body: bytes | dict[str, Any] = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    wait: float = 0.0
    reset: bool = False
    truncate: bool = False


def completion(text: str | None, **usage: int) -> dict[str, Any]:
    """The body of an ordinary reply."""
    message = {"role": "assistant", "content": text}
    usage = usage or {"prompt_tokens": 100, "completion_tokens": 7}
    return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}


def says(text: str | None, **more: Any) -> Act:
    """An ordinary reply."""
    return Act(body=completion(text), **more)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A request as it came."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    at: float

    @property
    def question(self) -> str:
        return str(self.body["messages"][-1]["content"])


class JudgeServer:
    """Serves `behave(request, number)` while the block runs; counts requests and how many are under way at once."""

    def __init__(self, behave: Callable[[Seen, int], Act]) -> None:
        self.behave = behave
        self.seen: list[Seen] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                seen = Seen(path=self.path, headers=dict(self.headers), body=json.loads(raw), at=time.monotonic())
                with server._lock:
                    number = len(server.seen)
                    server.seen.append(seen)
                    server._now += 1
                    server.most_at_once = max(server.most_at_once, server._now)
                act = server.behave(seen, number)
                time.sleep(act.wait)
                with server._lock:  # before the reply is out: the client may ask again at once
                    server._now -= 1
                with suppress(BrokenPipeError, ConnectionResetError):
                    self.act(act)

            def act(self, act: Act) -> None:
                body = act.body if isinstance(act.body, bytes) else json.dumps(act.body).encode()
                if act.reset:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    self.close_connection = True
                    return
                self.send_response(act.status)
                for name, value in {"Content-Length": str(len(body)), **act.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if act.truncate else body)
                if act.truncate:
                    self.close_connection = True

        return Handler
