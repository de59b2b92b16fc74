"""The one shape of all refusals and failures: OpenAI's error object."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from gmpo.serving.backend import BackendError, BackendFault

__all__ = ["ApiError", "error_body", "error_response", "from_backend", "install"]

_STATUS: dict[BackendFault, int] = {
    "bad_request": 400,
    "overloaded": 429,
    "unavailable": 503,
    "timeout": 504,
    "broken": 502,
    "failed": 500,
}
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    502: "upstream_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_LONGEST_VALUE = 80
_OTHER_FORM = ("string_type", "list_type", "int_type")
"""Complaints of the forms of a field that were not meant."""
_FORMS = {
    "prompt": "a text, a list of token ids, or a list of either",
    "stop": "a text or a list of texts",
    "content": "a text or a list of text parts",
}
_TELLS_VALUE = ("missing", "too_long", "too_short")


class ApiError(Exception):
    """An answer with an error status.

    Args:
        status: of HTTP.
        message: what is wrong, the value, what is allowed, what to do.
        param: the request's field at fault.
        code: a name for programs.
        type_: OpenAI's class of errors; None takes that of the status.
        retry_after_seconds: when to ask again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type_: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.type_ = type_ or _TYPES.get(status, "server_error" if status >= 500 else "error")
        self.retry_after_seconds = retry_after_seconds


def from_backend(error: BackendError) -> ApiError:
    """A backend's error as the client sees it."""
    return ApiError(
        _STATUS[error.fault],
        str(error),
        param=error.param,
        code=error.code,
        type_="upstream_disconnect" if error.fault == "broken" else None,
        retry_after_seconds=error.retry_after_seconds
        or (1.0 if error.fault in ("overloaded", "unavailable") else None),
    )


def error_body(error: ApiError) -> dict[str, Any]:
    """OpenAI's error object."""
    return {
        "error": {
            "message": error.message,
            "type": error.type_,
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """A whole response, with `Retry-After` in whole seconds where it is known when to ask again."""
    sent = dict(headers or {})
    if error.retry_after_seconds is not None:
        sent["retry-after"] = str(max(1, math.ceil(error.retry_after_seconds)))
    return JSONResponse(error_body(error), status_code=error.status, headers=sent)


def install(app: FastAPI) -> None:
    """Have every refusal of the framework, and every failure of ours, take this shape."""

    async def ours(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error_response(error)

    async def backends(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, BackendError)
        return error_response(from_backend(error))

    async def not_valid(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(_explained(error.errors()))

    async def of_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        allowed = Headers(error.headers).get("allow", "another method")
        said = {
            400: "the body cannot be read: it is not UTF-8, nests too deeply, or holds a number of "
            "too many digits; send one JSON object as application/json",
            404: f"there is no {request.url.path}; see /openapi.json for what there is",
            405: f"{request.url.path} does not take {request.method}; use {allowed}",
        }.get(error.status_code, str(error.detail))
        return error_response(ApiError(error.status_code, said), error.headers)

    async def unforeseen(_request: Request, _error: Exception) -> JSONResponse:
        # The server logs the error itself; its text may tell what clients should not know.
        return error_response(ApiError(500, "the server failed on this request; it was logged"))

    app.add_exception_handler(ApiError, ours)
    app.add_exception_handler(BackendError, backends)
    app.add_exception_handler(RequestValidationError, not_valid)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(Exception, unforeseen)


def _explained(errors: Sequence[Any]) -> ApiError:
    """The first thing that is wrong with a body, and how many more there are."""
    first = _telling(errors)
    place = [part for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        where = first["loc"][-1]
        return ApiError(
            400, f"the body is not JSON: {first['ctx']['error']} at character {where}; mend it"
        )
    if not place:
        return ApiError(
            400,
            f"the body cannot be used: {first['msg']}; send one JSON object as application/json",
        )
    # Of a field with several forms the name of the form follows; it says nothing to the client.
    names = [str(part) for part in place if not _is_form(str(part))]
    param = ".".join(names)
    value = "" if first["type"] in _TELLS_VALUE else f", not {_shown(first.get('input'))}"
    said = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] in _OTHER_FORM and len(names) < len(place) and names[-1] in _FORMS:
        said = f"it must be {_FORMS[names[-1]]}"
    more = len({str(error["loc"][1:2]) for error in errors}) - 1
    others = f" ({more} more fields are wrong)" if more else ""
    return ApiError(400, f"{param}: {said}{value}{others}", param=param)


def _telling(errors: Sequence[Any]) -> Any:
    """What is wrong with the first field: in the form that was meant, if it has several."""
    field = errors[0]["loc"][:2]
    of_field = [error for error in errors if error["loc"][:2] == field]
    return next((one for one in of_field if one["type"] not in _OTHER_FORM), of_field[0])


def _is_form(part: str) -> bool:
    return "[" in part or part in ("str", "int", "list", "constrained-str", "constrained-int")


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
