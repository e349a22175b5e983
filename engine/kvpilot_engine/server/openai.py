"""``/v1/completions``, ``/v1/chat/completions`` and ``/v1/models``, as OpenAI's own client expects them.

The body of a chunk is put together from pre-built bytes: with two cores for everything, what the front
spends on a token is taken from the model.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive

from kvpilot_engine import protocol
from kvpilot_engine.client import CoreClient, Generation
from kvpilot_engine.completion import DEFAULT_NEW_TOKENS, StopStrings, check_length, raise_unless_complete
from kvpilot_engine.contract.metrics import Outcome
from kvpilot_engine.errors import EngineError, InvalidRequestError
from kvpilot_engine.server.errors import CLIENT_CLOSED, ApiError, as_api_error
from kvpilot_engine.server.front import Front, Ticket
from kvpilot_engine.server.schemas import ChatRequest, CompletionRequest, parse
from kvpilot_engine.server.stream import Stream, Templates, cancel_on_disconnect, usage
from kvpilot_engine.tokenizer import TokenizerError

MAX_BODY_BYTES = 8 * 1024 * 1024
SESSION_HEADER = "x-session-id"

_encode = msgspec.json.encode


@dataclass(frozen=True)
class Ask:
    """A validated request, tokenized."""

    body: CompletionRequest | ChatRequest
    prompt: list[int]
    prompt_field: str
    max_new_tokens: int | None
    session_id: str | None


async def read_body(request: Request) -> bytes:
    """The whole body.

    Raises:
        ApiError: 413 beyond MAX_BODY_BYTES, whether announced or not.
    """
    announced = request.headers.get("content-length", "0")
    size, parts = int(announced) if announced.isdecimal() else 0, []
    if size <= MAX_BODY_BYTES:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > MAX_BODY_BYTES:
                break
            parts.append(part)
    if size > MAX_BODY_BYTES:
        raise ApiError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"body: at most {MAX_BODY_BYTES} bytes are allowed",
            headers={"Connection": "close"},
        )
    return b"".join(parts)


class Endpoint:
    """One generating endpoint."""

    def __init__(self, front: Front, kind: type[CompletionRequest] | type[ChatRequest]) -> None:
        self._front = front
        self._kind = kind
        self._chat = kind is ChatRequest
        self._prefix = "chatcmpl-" if self._chat else "cmpl-"

    async def __call__(self, request: Request) -> Response:
        """Answer in one piece, or hand over to a stream."""
        front = self._front
        ticket = Ticket(front)
        try:
            body = parse(self._kind, await read_body(request))
            ask = self._tokenize(body, request.headers.get(SESSION_HEADER))
            client = front.admit()
            message = self._message(ask, client)
            if body.stream:
                templates = Templates(self._chat, self._prefix + message.id, front.model, body.include_usage)
                return Stream(front, ticket, message, body.stop, templates)
            return await self._whole(ticket, ask, message, request.receive)
        except ClientDisconnect:
            ticket.ended(Outcome.CANCELLED)
            return Response(status_code=CLIENT_CLOSED)
        except (ApiError, EngineError) as error:
            failure = as_api_error(error)
            ticket.ended(failure.outcome)
            return failure.response()
        except BaseException:
            ticket.ended(Outcome.ERROR)
            raise

    def _tokenize(self, body: CompletionRequest | ChatRequest, session_header: str | None) -> Ask:
        front = self._front
        front.core()
        if body.model is not None and body.model != front.model:
            raise ApiError(
                HTTPStatus.NOT_FOUND,
                f"model: {body.model!r} does not exist, must be {front.model!r}",
                param="model",
                code="model_not_found",
            )
        try:
            prompt, field, limit_field, new_tokens = self._prompt(body)
        except TokenizerError as error:
            raise InvalidRequestError(str(error), "messages" if self._chat else "prompt") from None
        check_length(field, len(prompt), limit_field, new_tokens or 1, front.context_length)
        return Ask(body, prompt, field, new_tokens, body.session_id or session_header)

    def _prompt(self, body: CompletionRequest | ChatRequest) -> tuple[list[int], str, str, int | None]:
        """Token ids, their field, the field that limits the answer, and its value."""
        tokenizer = self._front.tokenizer
        if isinstance(body, ChatRequest):
            turns = [message.model_dump(exclude_none=True) for message in body.messages]
            limit_field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
            limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
            return tokenizer.apply_chat_template(turns), "messages", limit_field, limit
        if isinstance(body.prompt, str):
            prompt = tokenizer.encode(body.prompt)
        else:
            prompt = body.prompt
            if not all(0 <= token < tokenizer.vocab_size for token in prompt):
                raise InvalidRequestError(
                    f"prompt: token ids must lie between 0 and {tokenizer.vocab_size - 1}", "prompt"
                )
        limit = DEFAULT_NEW_TOKENS if body.max_tokens is None else body.max_tokens
        return prompt, "prompt", "max_tokens", limit

    def _message(self, ask: Ask, client: CoreClient) -> protocol.Generate:
        body = ask.body
        return protocol.Generate(
            id=client.next_id() + secrets.token_hex(8),
            prompt=ask.prompt,
            max_new_tokens=ask.max_new_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed,
            priority=body.priority,
            session_id=ask.session_id,
            exact_only=body.exact_only,
            timeout_s=self._front.config.request_timeout_s,
            stop_ids=list(self._front.tokenizer.eos_ids),
        )

    async def _whole(
        self, ticket: Ticket, ask: Ask, message: protocol.Generate, receive: Receive
    ) -> Response:
        generation, timer = self._front.send(message)
        watch = asyncio.ensure_future(cancel_on_disconnect(generation, receive))
        try:
            text, finished, stopped = await self._collect(generation, ask.body.stop)
        finally:
            timer.cancel()
            watch.cancel()
        if not stopped:  # a stop string ends a request by aborting it: then `cancelled` is a good end
            raise_unless_complete(finished)
        reason = "stop" if stopped else finished.reason
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": reason}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        answer = {
            "id": self._prefix + message.id,
            "object": "chat.completion" if self._chat else "text_completion",
            "created": int(time.time()),
            "model": self._front.model,
            "choices": [choice],
            "usage": usage(message, generation, finished),
        }
        response = _Counted(_encode(answer), ticket, generation)
        response.raw_headers.extend(self._front.farewell)
        return response

    async def _collect(
        self, generation: Generation, stops: tuple[str, ...]
    ) -> tuple[str, protocol.Finished, bool]:
        """The text, the last message, and whether a stop string ended it."""
        tokenizer = self._front.tokenizer
        if not stops:
            finished = await generation.result()
            return tokenizer.decode(generation.ids), finished, False
        decoder, matcher, text = tokenizer.stream_decoder(), StopStrings(stops), ""
        while new := await generation.tokens():
            text += matcher.push(decoder.push(new))
            if matcher.stopped:
                generation.stop()
                return text, await generation.result(), True
        text += matcher.push(decoder.finish())
        return text + matcher.finish(), await generation.result(), matcher.stopped


class _Counted(Response):
    """A whole answer whose account is settled when its last byte is out."""

    media_type = "application/json"

    def __init__(self, content: bytes, ticket: Ticket, generation: Generation) -> None:
        super().__init__(content)
        self._ticket = ticket
        self._generation = generation

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await super().__call__(scope, receive, send)
        self._ticket.ok(self._generation)


def install(app: FastAPI, front: Front) -> None:
    """Add the routes. Plain ones: the framework's parameter machinery would cost more than the parsing."""
    for path, kind in (("/v1/completions", CompletionRequest), ("/v1/chat/completions", ChatRequest)):
        app.router.routes.append(Route(path, _function(Endpoint(front, kind)), methods=["POST"]))

    model = {"id": front.model, "object": "model", "created": front.created, "owned_by": "kvpilot"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The served model."""
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        """One model by name."""
        if name != front.model:
            raise ApiError(
                HTTPStatus.NOT_FOUND,
                f"model: {name!r} does not exist, must be {front.model!r}",
                param="model",
                code="model_not_found",
            )
        return model


def _function(endpoint: Endpoint) -> Any:
    """Starlette takes a function for a request handler and any other callable for an ASGI application."""

    async def handle(request: Request) -> Response:
        return await endpoint(request)

    return handle
