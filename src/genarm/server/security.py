"""What every request passes: a log line, headers, a key, a limit on its body. Plain ASGI: streams stay streams."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
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
from genarm.server.errors import ApiError, as_api_error
from genarm.server.metrics import Metrics

KEYS_VARIABLE = "GENARM_API_KEYS"
LARGEST_BODY = 8 * 2**20
_BODY_SECONDS = 30.0
_NOBODY_LISTENS = 499
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
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
        scope.setdefault("state", {})["request_id"] = request_id
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
            path = scope["path"] if scope["path"] in self.paths else "other"  # whatever a client may think of
            self.metrics.requests.labels(path, str(status)).inc()
            if scope["method"] == "POST":
                self.metrics.request.observe(seconds)
            _log.info("%s %s %s %d %.3f s", request_id, scope["method"], path, status, seconds)


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


class Body:
    """Reads a body up to a limit of bytes and seconds before anything looks at it, and wants JSON in it.

    A web page of another site can make a browser post text to a server on this machine, but not JSON.
    """

    def __init__(self, app: ASGIApp, largest: int = LARGEST_BODY) -> None:
        self.app = app
        self.largest = largest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass the request on."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            length = headers.get("content-length", "0")
            if length.isdigit() and int(length) > self.largest:
                raise self._too_large(f"{length} bytes")
            async with asyncio.timeout(_BODY_SECONDS):
                body = await self._read(receive)
            if body:
                _check_type(headers.get("content-type", ""))
                _check_text(body)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        except TimeoutError:
            late = ApiError(408, f"the body did not arrive within {_BODY_SECONDS:g} seconds", code="timeout")
            await late.response()(scope, receive, send)
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes:
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self.largest:
                raise self._too_large("longer")
            if not message.get("more_body", False):
                return b"".join(chunks)

    def _too_large(self, got: str) -> ApiError:
        message = f"the body is {got}; this server takes up to {self.largest} bytes"
        return ApiError(413, message, code="body_too_large")


def _check_type(header: str) -> None:
    kind = header.partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f'the content type is {kind or "missing"}; send JSON with the header "Content-Type: application/json"'
        raise ApiError(400, message, code="invalid_content_type")


def _check_text(body: bytes) -> None:
    """JSON can say half of a surrogate pair (an emoji cut in two), which is no text and cannot be encoded again."""
    if b"\\ud" not in body.lower():
        return
    with contextlib.suppress(ValueError, RecursionError):  # no JSON: somebody else says so
        text = json.dumps(json.loads(body), ensure_ascii=False)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start].encode(errors="backslashreplace").decode()
            message = f"the body has {half} alone, half of a character; escape characters beyond \\uffff as pairs"
            raise ApiError(400, message, code="invalid_json") from None


def protected(app: FastAPI, metrics: Metrics, keys: frozenset[str], origins: Sequence[str]) -> ASGIApp:
    """`app` behind all of it: watched first, then CORS if any origin may, then keys if there are any, then the body."""
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
    return Watch(inner, metrics, paths)
