"""The one shape of all refusals and failures: OpenAI's error object."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
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
_OF_NUMBERS = (
    "finite_number",
    "float_type",
    "greater_than",
    "greater_than_equal",
    "int_type",
    "less_than",
    "less_than_equal",
)
"""Complaints about a number, each of which names one of its limits or none."""
_MISSING = {
    "messages": "give the turns of the chat",
    "model": "GET /v1/models lists those that there are",
    "prompt": "give the text to continue",
    "request_id": "give the id of an answer",
}
_LONGEST_RETRY_SECONDS = 3600.0


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
            "message": _sayable(error.message),
            "type": error.type_,
            "param": None if error.param is None else _sayable(error.param),
            "code": error.code,
        }
    }


def error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """A whole response, with `Retry-After` in whole seconds where it is known when to ask again.

    It is an hour at most, whatever a server behind asks for.
    """
    sent = dict(headers or {})
    if error.retry_after_seconds is not None:
        seconds = min(error.retry_after_seconds, _LONGEST_RETRY_SECONDS)
        sent["retry-after"] = str(max(1, math.ceil(seconds)))
    return JSONResponse(error_body(error), status_code=error.status, headers=sent)


def install(app: FastAPI) -> None:
    """Have every refusal of the framework, and every failure of ours, take this shape."""

    async def ours(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error_response(error)

    async def backends(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, BackendError)
        return error_response(from_backend(error))

    async def not_valid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(_explained(error.errors(), _fields_of(request)))

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


def _sayable(text: str) -> str:
    """The text with halves of surrogate pairs, which a client's names may hold, spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def _fields_of(request: Request) -> Mapping[str, Any]:
    """JSON schema of each field that the asked route's body has."""
    route = request.scope.get("route")
    field = route.body_field if isinstance(route, APIRoute) else None
    model = None if field is None else field.field_info.annotation
    return _schemas(model) if isinstance(model, type) and issubclass(model, BaseModel) else {}


@cache
def _schemas(model: type[BaseModel]) -> Mapping[str, Any]:
    properties: dict[str, Any] = model.model_json_schema()["properties"]
    return properties


def _explained(errors: Sequence[Any], fields: Mapping[str, Any]) -> ApiError:
    """The first thing that is wrong with a body, and how many more there are.

    Args:
        errors: of pydantic.
        fields: schemas of the fields that the body may have.
    """
    first = _telling(errors)
    place = [part for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        where = first["loc"][-1]
        return ApiError(
            400, f"the body is not JSON: {first['ctx']['error']} at character {where}; mend it"
        )
    if not place and first["type"] == "value_error":
        return ApiError(400, str(first["msg"]).removeprefix("Value error, "))
    if not place:
        return ApiError(
            400,
            f"the body cannot be used: {first['msg']}; send one JSON object as application/json",
        )
    # Of a field with several forms the name of the form follows; it says nothing to the client.
    names = [str(part) for part in place if not _is_form(str(part))]
    param = ".".join(names)
    more = len({str(error["loc"][1:2]) for error in errors}) - 1
    others = f" ({more} more fields are wrong)" if more else ""
    if first["type"] == "extra_forbidden":
        said = _unknown(param, first.get("input"), list(fields) if len(place) == 1 else [])
        return ApiError(400, said + others, param=param, code="unknown_parameter")
    value = "" if first["type"] in _TELLS_VALUE else f", not {_shown(first.get('input'))}"
    said = _said(first, fields.get(param, {}), param)
    if first["type"] in _OTHER_FORM and len(names) < len(place) and names[-1] in _FORMS:
        said = f"it must be {_FORMS[names[-1]]}"
    return ApiError(400, f"{param}: {said}{value}{others}", param=param)


def _said(error: Any, schema: Mapping[str, Any], param: str) -> str:
    """What is wrong with a field, and what it may be."""
    if error["type"] == "missing":
        hint = _MISSING.get(param)
        return "it is required, and missing" + ("" if hint is None else f"; {hint}")
    if error["type"] == "string_pattern_mismatch":
        return "it must hold no NUL character"  # the one pattern that bodies have
    if error["type"] in ("model_type", "model_attributes_type"):
        return "it must be a JSON object"
    allowed = _numbers(schema) if error["type"] in _OF_NUMBERS else None
    return allowed or str(error["msg"]).removeprefix("Value error, ")


def _numbers(schema: Mapping[str, Any]) -> str | None:
    """The numbers that a field may be; None where it has not the one range."""
    forms = [form for form in schema.get("anyOf", [schema]) if "maximum" in form]
    if len(forms) != 1:
        return None
    (form,) = forms
    kind = "a whole number" if form["type"] == "integer" else "a number"
    if "exclusiveMinimum" in form:
        return f"it must be {kind} above {form['exclusiveMinimum']} and at most {form['maximum']}"
    return f"it must be {kind} from {form['minimum']} to {form['maximum']}"


def _unknown(name: str, value: object, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; known are {', '.join(known)}" if known else "; leave it out"
    hint = f"; did you mean {near[0]!r}?" if near else hint
    return f"there is no field {name!a}, which is {_shown(value)}{hint}"


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
