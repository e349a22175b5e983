"""Every error of the HTTP surface, in the JSON shape of OpenAI's API."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from kvpilot_engine.contract.metrics import Outcome
from kvpilot_engine.errors import (
    ChangeRefusedError,
    CoreUnavailableError,
    EngineError,
    InvalidRequestError,
    QueueFullError,
    RequestCancelledError,
    RequestTimeoutError,
)
from kvpilot_engine.frontend.completion import fault_lines

CLIENT_CLOSED = 499
"""Status in the access log when the client left before the answer (source: nginx)."""


class ApiError(EngineError):
    """An answer that is not 2xx; a request that HTTP itself refuses counts as invalid.

    Attributes:
        kind: OpenAI's ``type``: invalid_request_error, overloaded_error, ...
        param: the field at fault, if there is one.
    """

    outcome = Outcome.INVALID

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> bytes:
        """The answer's JSON text, in the shape of OpenAI's errors."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def response(self) -> Response:
        """Status, headers and body."""
        return Response(self.body(), self.status, self.headers, "application/json")


def as_api_error(error: Exception) -> ApiError:
    """The HTTP form of an exception; 500 for one that is not the engine's."""
    text = str(error)
    match error:
        case ApiError():
            found = error
        case InvalidRequestError():
            found = ApiError(HTTPStatus.BAD_REQUEST, text, param=error.field)
        case QueueFullError():
            found = ApiError(
                HTTPStatus.TOO_MANY_REQUESTS,
                text,
                kind="overloaded_error",
                code="overloaded",
                headers={"Retry-After": str(error.retry_after_s)},
            )
        case RequestTimeoutError():
            found = ApiError(HTTPStatus.GATEWAY_TIMEOUT, text, kind="timeout_error", code="timeout")
        case CoreUnavailableError():
            found = ApiError(HTTPStatus.SERVICE_UNAVAILABLE, text, kind="server_error", code="unavailable")
        case RequestCancelledError():
            found = ApiError(CLIENT_CLOSED, text, kind="cancelled_error", code="cancelled")
        case ChangeRefusedError(code="invalid"):
            found = ApiError(HTTPStatus.BAD_REQUEST, text, code="invalid")
        case ChangeRefusedError():
            found = ApiError(HTTPStatus.CONFLICT, text, kind="conflict_error", code=error.code)
        case _:
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            found = ApiError(status, f"the engine failed: {text}", kind="server_error")
    return found


def validation_error(error: ValidationError) -> ApiError:
    """400 for a body that does not fit its model, with one clause for each wrong field."""
    first = error.errors()[0]["loc"]
    return ApiError(
        HTTPStatus.BAD_REQUEST,
        "; ".join(fault_lines(error, "unknown parameter")),
        param=str(first[0]) if first else None,
    )


def install(app: FastAPI) -> None:
    """Give every error of ``app``, the framework's included, the same shape."""

    async def ours(_: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def framework(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        detail = error.detail
        if error.status_code == HTTPStatus.NOT_FOUND:
            detail = f"unknown path: {request.method} {request.url.path}"
        elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            detail = f"method {request.method} is not allowed for {request.url.path}"
        headers = dict(error.headers) if error.headers else None
        return ApiError(error.status_code, detail, headers=headers).response()

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        return ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "; ".join(lines)).response()

    handlers: dict[Any, Any] = {
        HTTPException: framework,
        RequestValidationError: invalid,
        EngineError: ours,
        Exception: ours,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
