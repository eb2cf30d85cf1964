"""What every request passes: a log line, headers, the host's name, a key. Plain ASGI: streams stay streams."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import os
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from genarm.errors import ConfigError
from genarm.server.bodies import Body
from genarm.server.errors import ApiError, as_api_error, quoted
from genarm.server.metrics import Metrics

KEYS_VARIABLE = "GENARM_API_KEYS"
_NOBODY_LISTENS = 499
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"  # no script of the page can read text as HTML
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}

_log = logging.getLogger("genarm.server")


def read_keys(file: Path | None) -> frozenset[str]:
    """The keys of a file, one a line (# begins a comment), and of the environment variable GENARM_API_KEYS.

    Raises:
        ConfigError: the file cannot be read or has no key; a key with other characters than ASCII has.
    """
    keys = {key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",")} - {""}
    if file is not None:
        try:
            lines = [line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the API keys in {file}: {error}") from error
        found = {line for line in lines if line}
        if not found:
            raise ConfigError(f"{file} has no API key; write one a line")
        keys |= found
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise ConfigError("an API key has a space or a character outside ASCII, which no client can send")
    return frozenset(keys)


class Watch:
    """The outermost layer: a name for each request, a line in the log, counts, and an answer for every exception."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self.app = app
        self.metrics = metrics
        self.paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, arrived=asyncio.get_running_loop().time())
        method = scope["method"]
        if method == "HEAD":  # as GET, whose body is left out where the answer is sent
            scope = {**scope, "method": "GET"}
        began, status, complete = time.perf_counter(), 0, False

        async def watched(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update({"X-Request-Id": request_id, **_HEADERS})
            await send(message)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self.app(scope, receive, watched)
        except (ClientDisconnect, asyncio.CancelledError) as error:
            status = status or _NOBODY_LISTENS
            if isinstance(error, asyncio.CancelledError):
                raise
        except Exception as error:
            _log.exception("%s failed", request_id)
            if not status:
                await as_api_error(error).response()(scope, receive, watched)
            elif not complete:
                raise
        finally:
            seconds = time.perf_counter() - began
            status = state.get("ended_with", status)
            path = scope["path"] if scope["path"] in self.paths else "other"  # whatever a client may think of
            self.metrics.requests.labels(path, str(status)).inc()
            if method == "POST":
                self.metrics.request.observe(seconds)
            _log.info("%s %.20s %s %d %.3f s", request_id, method, path, status, seconds)


class Hosts:
    """Lets requests pass that name this server as it is known to be called.

    A page of another site can have its own name point to this machine (DNS rebinding); its requests are then of one
    origin to the browser, which sends them, but they still carry that name.
    """

    def __init__(self, app: ASGIApp, allowed: Iterable[str]) -> None:
        self.app = app
        self._allowed = {_bare(name) for name in allowed}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass the request on."""
        name = Headers(scope=scope).get("host") if scope["type"] == "http" else None
        if name is not None and not self._knows(_bare(name)):
            message = (
                f"this server does not answer to the host name {quoted(name)}; start it with --allowed-host NAME if "
                "that is one of its names, or with --api-keys, with which any name will do"
            )
            await ApiError(403, message, code="unknown_host").response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _knows(self, name: str) -> bool:
        return name in self._allowed or is_loopback(name)


def _bare(host: str) -> str:
    """A host's name without port, brackets and the dot that ends a full name."""
    host = host.strip().lower()
    name = host[1:].partition("]")[0] if host.startswith("[") else host if host.count(":") > 1 else host.split(":")[0]
    return name.rstrip(".")


def is_loopback(name: str) -> bool:
    """Whether a name or an address is always this machine."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class Keys:
    """Lets requests to /v1 pass that carry one of the keys."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self.app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass the request on."""
        if scope["type"] == "http" and scope["path"].startswith("/v1") and not self._knows(Headers(scope=scope)):
            message = 'a valid API key is needed; send it in the header "Authorization: Bearer KEY"'
            await ApiError(401, message, code="invalid_api_key").response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _knows(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip())
        # Every key is compared, each in constant time: the time taken tells nothing about any of them.
        same = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(same)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def protected(
    app: FastAPI, metrics: Metrics, *, keys: frozenset[str], origins: Sequence[str], hosts: Sequence[str] | None
) -> ASGIApp:
    """`app` behind all of it: watched, then host names, CORS if any origin may, keys if there are any, the body."""
    paths = frozenset({"/", *app.openapi()["paths"]})
    inner: ASGIApp = Body(app)
    if keys:
        inner = Keys(inner, keys)
    if origins:
        inner = CORSMiddleware(
            inner,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    if hosts is not None:
        inner = Hosts(inner, hosts)
    return Watch(inner, metrics, paths)
