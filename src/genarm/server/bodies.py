"""From the bytes of a body to what they ask, within limits that hold before anything is done with them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Receive, Scope, Send

from genarm.server.errors import ApiError, first_problem, quoted
from genarm.server.schema import ChatRequest, CompletionRequest
from genarm.server.workers import Worker

Asked = TypeVar("Asked", ChatRequest, CompletionRequest)

LARGEST_BODY = 8 * 2**20
SMALL_BODY = 2**15
"""What the event loop reads by itself, in a few milliseconds."""
_MOST_HELD = 8 * LARGEST_BODY
_BODY_SECONDS = 30.0
_MOST_VALUES = 1_000_000
_MOST_DIGITS = 400


class Held:
    """The bytes of a body, and their part of the memory that all large bodies may take together."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._chunks: list[bytes] = []
        self.size = 0

    def add(self, chunk: bytes) -> None:
        """A part has arrived (raises ApiError where there is no room for it now)."""
        self._chunks.append(chunk)
        self.size += len(chunk)
        self._budget.held += len(chunk)
        if self.size > SMALL_BODY and self._budget.held > self._budget.most:
            raise ApiError(
                429,
                f"the server is reading {self._budget.held} bytes of requests, and takes {self._budget.most} at once; "
                "try again later",
                kind="rate_limit_error",
                code="queue_full",
                retry_after=1,
            )

    def content(self) -> bytes:
        """All of it."""
        return b"".join(self._chunks)

    def release(self) -> None:
        """Forget it; harmless where that was done before."""
        self._budget.held -= self.size
        self.size, self._chunks = 0, []


class Budget:
    """Bytes of bodies that are being read, or wait to be understood."""

    def __init__(self, most: int = _MOST_HELD) -> None:
        self.most = most
        self.held = 0


class Body:
    """Reads a body up to a limit of bytes and seconds before anything looks at it, and wants JSON in it.

    A web page of another site can make a browser post text to a server on this machine, but not JSON.
    The application finds it in `state.body`.
    """

    def __init__(self, app: ASGIApp, largest: int = LARGEST_BODY) -> None:
        self.app = app
        self.largest = largest
        self.budget = Budget()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass the request on."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        body = Held(self.budget)
        try:
            try:
                async with asyncio.timeout(_BODY_SECONDS):
                    await self._read(Headers(scope=scope), receive, body)
            except TimeoutError:
                late = f"the body did not arrive within {_BODY_SECONDS:g} seconds"
                raise ApiError(408, late, code="timeout") from None
        except ApiError as error:
            body.release()
            await error.response()(scope, receive, send)
            return
        scope["state"]["body"] = body
        try:
            await self.app(scope, receive, send)
        finally:
            body.release()

    async def _read(self, headers: Headers, receive: Receive, body: Held) -> None:
        length = headers.get("content-length", "0")
        if length.isdigit() and (len(length) > _MOST_DIGITS or int(length) > self.largest):
            raise self._too_large(f"{length:.20} bytes")
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body.add(message.get("body", b""))
            if body.size > self.largest:
                raise self._too_large("longer")
            if not message.get("more_body", False):
                break
        if body.size:
            _check_headers(headers)

    def _too_large(self, got: str) -> ApiError:
        message = f"the body is {got}; this server takes up to {self.largest} bytes"
        return ApiError(413, message, code="body_too_large")


def _check_headers(headers: Headers) -> None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = (
            f"the content type is {quoted(kind) if kind else 'missing'}; send JSON with the header "
            '"Content-Type: application/json"'
        )
        raise ApiError(400, message, code="invalid_content_type")
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        message = f"the body is encoded as {quoted(encoding)}; send it as it is, without the header Content-Encoding"
        raise ApiError(415, message, code="invalid_content_encoding")


def body_of(form: type[BaseModel]) -> dict[str, Any]:
    """For the OpenAPI document: the body is a `form`."""
    reference = {"$ref": f"#/components/schemas/{form.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def schemas() -> dict[str, Any]:
    """For the OpenAPI document: all forms by name."""
    forms: list[tuple[type[BaseModel], Literal["validation"]]] = [(f, "validation") for f in Asked.__constraints__]
    _, found = models_json_schema(forms, ref_template="#/components/schemas/{model}")
    return dict(found["$defs"])


async def read_form(http: HttpRequest, form: type[Asked], enter: Callable[[int], None], worker: Worker) -> Asked:
    """What the body of a request asks, with places taken for its replies.

    Small bodies are read at once. A large one takes a place first, and is read in another thread.

    Args:
        http: the request, with a `Held` body.
        form: what its body must be.
        enter: takes places, for so many replies altogether.
        worker: the thread.

    Raises:
        ApiError: it is not valid, or there is no place for it.
    """
    body: Held = http.state.body
    problem = None
    try:
        if body.size <= SMALL_BODY:
            asked = parse(body.content(), form)
        else:
            enter(1)
            asked = await worker.run(lambda: parse(body.content(), form))
    except ApiError as error:
        problem = error.with_traceback(None)  # which holds the body, and whatever was made of it
        problem.__context__ = None
    finally:
        body.release()
    if problem is not None:
        raise problem
    enter(asked.replies)
    return asked


def parse(content: bytes, form: type[Asked]) -> Asked:
    """A body as `form`.

    Raises:
        ApiError: it is no JSON, or not what the form wants.
    """
    if not content:
        raise ApiError(400, "The body is empty; send a JSON object", code="missing_required_parameter")
    values = sum(map(content.count, (b",", b"[", b"{")))
    if values > _MOST_VALUES:
        raise _no_json(f"it has {values} commas and brackets, and this server reads up to {_MOST_VALUES} at once")
    try:
        data = json.loads(content.decode("utf-8-sig"), **_HOOKS)
    except UnicodeDecodeError as error:
        at = f"byte {error.start} is {content[error.start]:#04x}"
        raise _no_json(f"it is not in UTF-8 ({at}); encode it so") from None
    except RecursionError:
        raise _no_json("it is nested too deeply; no request needs more than five levels") from None
    except json.JSONDecodeError as error:
        raise _no_json(str(error)) from None
    if b"\\ud" in content.lower():
        _check_characters(data)
    if not isinstance(data, dict):
        raise ApiError(400, f"The body is {quoted(data)}; send a JSON object", code="invalid_value")
    try:
        return form.model_validate(data)
    except ValidationError as error:
        raise first_problem(error) from None


def _no_json(why: str) -> ApiError:
    return ApiError(400, f"The body is not JSON: {why}", code="invalid_json")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise ApiError(
            400, f"an object of the body has the key {quoted(twice)} twice; give it once", code="invalid_json"
        )
    return found


def _number(kind: type[int] | type[float], text: str) -> float:
    if len(text) > _MOST_DIGITS:
        raise _no_json(f"it has a number of {len(text)} characters; write numbers with up to {_MOST_DIGITS}")
    return kind(text)


_HOOKS: dict[str, Any] = {
    "object_pairs_hook": _object,
    "parse_int": partial(_number, int),
    "parse_float": partial(_number, float),
}


def _check_characters(data: Any) -> None:
    """JSON can say half of a surrogate pair (an emoji cut in two), which is no text and cannot be encoded again."""
    text = json.dumps(data, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode(errors="backslashreplace").decode()
        message = f"the body has {half} alone, half of a character; escape characters beyond \\uffff as pairs"
        raise ApiError(400, message, code="invalid_json") from None
