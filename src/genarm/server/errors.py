"""OpenAI's error body for everything that can go wrong."""

from __future__ import annotations

import logging
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from genarm.errors import BudgetError, DataError, EngineFailure, GenarmError, MemberError, WeightsError

_LONGEST_MESSAGE = 2000
_LONGEST_PARAM = 200
_LONGEST_QUOTE = 80
_log = logging.getLogger("genarm.server")


def shortened(text: str, most: int) -> str:
    """`text`, whose middle is left out where it has more than `most` characters."""
    return text if len(text) <= most else f"{text[: most * 3 // 4]} … {text[-most // 4 :]}"


def quoted(value: object) -> str:
    """What a client sent, for a message: no longer than a line, without control characters."""
    if isinstance(value, str):
        return repr(shortened(value, _LONGEST_QUOTE))
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return f"{value!r:.{_LONGEST_QUOTE}}"


class ApiError(Exception):
    """An answer that is an error; what it quotes is cut to a bearable length.

    Attributes:
        status: of HTTP.
        message: what was got, what is allowed, what to do.
        kind: OpenAI's `type`.
        param: the parameter it is about.
        code: a word for programs.
        retry_after: seconds until a client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = shortened(message, _LONGEST_MESSAGE)
        self.kind = kind
        self.param = None if param is None else shortened(param, _LONGEST_PARAM)
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """That go with it."""
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        return {**headers, "WWW-Authenticate": "Bearer"} if self.status == 401 else headers

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers())


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in {
        400: "The request is not valid.",
        401: "The API key is missing or wrong.",
        403: "The host's name is not one that this server answers to.",
        404: "There is no such model.",
        408: "The body did not arrive in time.",
        413: "The body is too large.",
        415: "The body is compressed.",
        429: "The queue is full; try again later.",
        500: "The server failed at this request.",
        503: "The engine is not running.",
        504: "The request took too long.",
    }.items()
}
"""For the OpenAPI document."""

ENGINE_PAUSE = 5.0
"""Seconds after which a client may ask an engine that has failed again."""


def as_api_error(error: BaseException) -> ApiError:
    """The answer to give for `error`; what is nobody's known mistake becomes a 500 that does not say more."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BudgetError):
        return ApiError(400, str(error), param="max_kl", code="invalid_value")
    if isinstance(error, WeightsError):
        return ApiError(400, str(error), param="reward_weights", code="invalid_weights")
    if isinstance(error, DataError):
        return ApiError(400, str(error), code="invalid_prompt")
    if isinstance(error, MemberError):  # what a model says is no matter of who asks it
        return ApiError(500, str(error), kind="server_error", code="model_failure")
    if isinstance(error, GenarmError):
        return ApiError(400, str(error))
    if isinstance(error, EngineFailure):
        message = f"The engine failed and this request ended with it; try again. ({error})"
        return ApiError(503, message, kind="server_error", code="engine_failure", retry_after=ENGINE_PAUSE)
    if isinstance(error, HTTPException):
        message = f"{error.detail}; {_ADVICE[error.status_code]}" if error.status_code in _ADVICE else error.detail
        return ApiError(error.status_code, message)
    return ApiError(500, "The server failed at this request; its log says why.", kind="server_error", code="failure")


_ADVICE = {
    404: "the paths of this server are in /openapi.json",
    405: "the methods of this path are in /openapi.json",
}


def add_error_handlers(app: FastAPI) -> None:
    """Let `app` answer mistakes in OpenAI's words."""

    async def answer(http: Request, error: Exception) -> JSONResponse:
        response = as_api_error(error).response()
        if isinstance(error, MemberError):
            log_failure(http, error)
        if isinstance(error, HTTPException):
            response.headers.update(error.headers or {})
        return response

    for kind in (ApiError, GenarmError, EngineFailure, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def log_failure(http: Request, error: Exception) -> None:
    """Tell the operator what has made a request fail, and from where where the message does not say it."""
    traceback = None if isinstance(error, MemberError) else error
    _log.error("%s failed: %s", http.state.request_id, error, exc_info=traceback)


def first_problem(error: ValidationError) -> ApiError:
    """Pydantic's first complaint as one sentence."""
    problem = error.errors(include_url=False)[0]
    place, kind = [str(part) for part in problem["loc"]], problem["type"]
    context = problem.get("ctx", {})
    if kind == "extra_forbidden":
        place += [str(context["key"])] if "key" in context else []
    param = ".".join(place) or None
    shown = None if param is None else shortened(param, _LONGEST_PARAM)
    if kind == "extra_forbidden":
        near = f"did you mean {context['near']}?" if context.get("near") else "leave it out"
        message = f"Unrecognized request argument supplied: {shown}; {near}"
        return ApiError(400, message, param=param, code="unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"you must provide {shown}", param=param, code="missing_required_parameter")
    message = problem["msg"].removeprefix("Value error, ")
    got = problem["input"]
    said = "" if isinstance(got, dict | list) else f" (got {quoted(got)})"
    return ApiError(400, f"{shown or 'the body'}: {message}{said}", param=param, code="invalid_value")
