"""``/v1/completions``, ``/v1/chat/completions`` and ``/v1/models``, as OpenAI's own client expects them."""

from __future__ import annotations

import asyncio
import time
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kvpilot_engine.errors import EngineError, RequestCancelledError
from kvpilot_engine.frontend.session import Session, Ticket
from kvpilot_engine.ipc.client import RequestHandle
from kvpilot_engine.server.errors import ApiError, as_api_error
from kvpilot_engine.server.schemas import ChatRequest, CompletionRequest, parse
from kvpilot_engine.server.stream import Stream, Templates, usage

MAX_BODY_BYTES = 8 * 1024 * 1024
SESSION_HEADER = "x-session-id"


async def read_body(request: Request) -> bytes:
    """The whole body.

    Raises:
        ApiError: 413 beyond MAX_BODY_BYTES, whether announced or not.
        RequestCancelledError: the client left.
    """
    announced = request.headers.get("content-length", "0")
    size, parts = int(announced) if announced.isdecimal() else 0, []
    if size <= MAX_BODY_BYTES:
        size = 0
        try:
            async for part in request.stream():
                size += len(part)
                if size > MAX_BODY_BYTES:
                    break
                parts.append(part)
        except ClientDisconnect:
            raise RequestCancelledError("the client closed the request") from None
    if size > MAX_BODY_BYTES:
        raise ApiError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"body: at most {MAX_BODY_BYTES} bytes are allowed",
            headers={"Connection": "close"},
        )
    return b"".join(parts)


class Endpoint:
    """One generating endpoint."""

    def __init__(self, session: Session, kind: type[CompletionRequest] | type[ChatRequest]) -> None:
        self._session = session
        self._kind = kind
        self._chat = kind is ChatRequest
        self._prefix = "chatcmpl-" if self._chat else "cmpl-"

    async def __call__(self, request: Request) -> Response:
        """Answer in one piece, or hand over to a stream."""
        session = self._session
        ticket = session.arrive()
        try:
            body = parse(self._kind, await read_body(request))
            require_model(session, body.model)
            message = session.compose(body.to_prompt(), body, request.headers.get(SESSION_HEADER))
            ticket.enter_or_shed()
            handle = ticket.send(message)
            ticket.guard(asyncio.ensure_future(_cancel_on_disconnect(handle, request.receive)))
            answer, name = session.answer(handle, body.stop), self._prefix + message.id
            if body.stream:
                templates = Templates(self._chat, name, session.model, body.include_usage)
                return Stream(ticket, handle, answer, templates, self._headers())
            text = await answer.whole()
            return _Whole(self._body(name, text, answer.reason, handle), ticket, self._headers())
        except EngineError as error:
            ticket.fail(error)
            return as_api_error(error).response()
        except BaseException as error:
            ticket.fail(error)
            raise

    def _headers(self) -> list[tuple[bytes, bytes]]:
        """While draining, ask the client to return on another connection."""
        return [(b"connection", b"close")] if self._session.draining else []

    def _body(self, name: str, text: str, reason: str, handle: RequestHandle) -> bytes:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": reason}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        answer = {
            "id": name,
            "object": "chat.completion" if self._chat else "text_completion",
            "created": int(time.time()),
            "model": self._session.model,
            "choices": [choice],
            "usage": usage(handle),
        }
        return msgspec.json.encode(answer)


async def _cancel_on_disconnect(handle: RequestHandle, receive: Receive) -> None:
    """Free what a request holds as soon as its client has left."""
    while (await receive())["type"] != "http.disconnect":
        continue
    handle.cancel()


class _Whole(Response):
    """An answer in one piece; its request is accounted when the last byte is out."""

    media_type = "application/json"

    def __init__(self, content: bytes, ticket: Ticket, headers: list[tuple[bytes, bytes]]) -> None:
        super().__init__(content)
        self.raw_headers.extend(headers)
        self._ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except BaseException as error:
            self._ticket.fail(error)
            raise
        self._ticket.succeed()


def require_model(session: Session, name: str | None) -> None:
    """Refuse any other model than the served one; None asks for no particular one.

    Raises:
        ApiError: 404.
    """
    if name not in {None, session.model}:
        raise ApiError(
            HTTPStatus.NOT_FOUND,
            f"model: {name!r} does not exist, must be {session.model!r}",
            param="model",
            code="model_not_found",
        )


def install(app: FastAPI, session: Session) -> None:
    """Add the routes: plain ones, because the framework's parameter handling costs more than the parsing."""
    for path, kind in (("/v1/completions", CompletionRequest), ("/v1/chat/completions", ChatRequest)):
        app.router.routes.append(Route(path, _function(Endpoint(session, kind)), methods=["POST"]))

    model = {"id": session.model, "object": "model", "created": int(time.time()), "owned_by": "kvpilot"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The served model."""
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        """One model by name."""
        require_model(session, name)
        return model


def _function(endpoint: Endpoint) -> Any:
    """Starlette takes a function for a request handler and any other callable for an ASGI application."""

    async def handle(request: Request) -> Response:
        return await endpoint(request)

    return handle
