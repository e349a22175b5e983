"""Answers as server-sent events, one chunk for the tokens that arrived together."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvpilot_engine import protocol
from kvpilot_engine.client import Generation
from kvpilot_engine.completion import StopStrings, raise_unless_complete
from kvpilot_engine.contract.metrics import Outcome
from kvpilot_engine.errors import EngineError, RequestCancelledError
from kvpilot_engine.server.errors import ApiError, as_api_error
from kvpilot_engine.server.front import Front, Ticket

_encode = msgspec.json.encode

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_DONE = b"data: [DONE]\n\n"


async def cancel_on_disconnect(generation: Generation, receive: Receive) -> None:
    """Free what a request holds as soon as its client is gone."""
    while (await receive())["type"] != "http.disconnect":
        continue
    generation.cancel()


def usage(message: protocol.Generate, generation: Generation, finished: protocol.Finished) -> dict[str, Any]:
    """``usage`` of an answer; what came from the cache is in ``prompt_tokens_details``."""
    prompt, new = len(message.prompt), len(generation.ids)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": finished.cached_tokens},
    }


class Templates:
    """The bytes around the text of a chunk, built once for a request."""

    def __init__(self, chat: bool, request_id: str, model: str, include_usage: bool) -> None:
        kind = "chat.completion.chunk" if chat else "text_completion"
        head = {"id": request_id, "object": kind, "created": int(time.time()), "model": model}
        self._head = b"data: " + _encode(head)[:-1]
        self._include_usage = include_usage
        self._chat = chat
        tail = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        if chat:
            self._open = self._head + b',"choices":[{"index":0,"delta":{"content":'
            self._close = b'},"logprobs":null,"finish_reason":null}]' + tail
            self.start = (
                self._head
                + b',"choices":[{"index":0,"delta":{"role":"assistant","content":""}'
                + b',"logprobs":null,"finish_reason":null}]'
                + tail
            )
        else:
            self._open = self._head + b',"choices":[{"index":0,"text":'
            self._close = b',"logprobs":null,"finish_reason":null}]' + tail
            self.start = b""
        self._tail = tail

    def chunk(self, text: str) -> bytes:
        """The event for some text; nothing for no text."""
        return self._open + _encode(text) + self._close if text else b""

    def end(self, reason: str, usage: dict[str, Any]) -> bytes:
        """The last events: why it ended, the usage if it was asked for, and the end mark."""
        content = b'"delta":{}' if self._chat else b'"text":""'
        last = self._head + b',"choices":[{"index":0,' + content + b',"logprobs":null,"finish_reason":'
        last += _encode(reason) + b"}]" + self._tail
        if self._include_usage:
            last += self._head + b',"choices":[],"usage":' + _encode(usage) + b"}\n\n"
        return last + _DONE


class Stream(Response):
    """A streamed answer. Until its first token an error is still an HTTP status; after it, an event."""

    def __init__(
        self,
        front: Front,
        ticket: Ticket,
        message: protocol.Generate,
        stops: tuple[str, ...],
        templates: Templates,
    ) -> None:
        self._front = front
        self._ticket = ticket
        self._message = message
        self._stops = stops
        self._templates = templates
        self._started = False
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer and settle its account."""
        try:
            generation, timer = self._front.send(self._message)
        except EngineError as error:
            await self._fail(as_api_error(error), scope, receive, send)
            return
        watch = asyncio.ensure_future(cancel_on_disconnect(generation, receive))
        try:
            await self._run(generation, send)
            self._ticket.ok(generation)
        except RequestCancelledError:
            self._ticket.ended(Outcome.CANCELLED)
        except (ApiError, EngineError) as error:
            await self._fail(as_api_error(error), scope, receive, send)
        except BaseException:
            self._ticket.ended(Outcome.ERROR)
            raise
        finally:
            timer.cancel()
            watch.cancel()
            generation.cancel()

    async def _run(self, generation: Generation, send: Send) -> None:
        templates = self._templates
        decoder, stops = self._front.tokenizer.stream_decoder(), StopStrings(self._stops)
        while new := await generation.tokens():
            body = templates.chunk(stops.push(decoder.push(new)))
            if stops.stopped or generation.finished is not None:
                break
            if not self._started:
                body = templates.start + body
                await self._start(send)
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})
        else:
            body = b""
        if stops.stopped:
            generation.stop()
        finished = await generation.result()
        if not stops.stopped:
            raise_unless_complete(finished)
            body += templates.chunk(stops.push(decoder.finish()) + stops.finish())
        await self._finish(generation, body, "stop" if stops.stopped else finished.reason, send)

    async def _start(self, send: Send) -> None:
        self._started = True
        headers = _HEADERS + self._front.farewell
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _finish(self, generation: Generation, body: bytes, reason: str, send: Send) -> None:
        assert generation.finished is not None
        if not self._started:
            body = self._templates.start + body
            await self._start(send)
        body += self._templates.end(reason, usage(self._message, generation, generation.finished))
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _fail(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        self._ticket.ended(error.outcome)
        if self._started:
            event = b"data: " + error.body() + b"\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": False})
        else:
            await error.response()(scope, receive, send)
