"""Answers as server-sent events, one chunk for the tokens that arrived together.

The body of a chunk is put together from pre-built bytes: CPU time that the front spends on a token is taken
from the model when both share few cores.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvpilot_engine.errors import EngineError
from kvpilot_engine.frontend.completion import Answer
from kvpilot_engine.frontend.session import Ticket
from kvpilot_engine.ipc.client import RequestHandle
from kvpilot_engine.server.errors import as_api_error

_encode = msgspec.json.encode

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_DONE = b"data: [DONE]\n\n"


def usage(handle: RequestHandle) -> dict[str, Any]:
    """``usage`` of an answer that has finished; ``prompt_tokens_details`` says what came from the cache."""
    assert handle.finished is not None
    prompt, new = handle.finished.prompt_tokens, len(handle.ids)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": handle.finished.cached_tokens},
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
        """The event for ``text``; empty for an empty text."""
        return self._open + _encode(text) + self._close if text else b""

    def end(self, reason: str, usage: dict[str, Any]) -> bytes:
        """The last events: the finish reason, the usage if it was asked for, and the end mark."""
        content = b'"delta":{}' if self._chat else b'"text":""'
        last = self._head + b',"choices":[{"index":0,' + content + b',"logprobs":null,"finish_reason":'
        last += _encode(reason) + b"}]" + self._tail
        if self._include_usage:
            last += self._head + b',"choices":[],"usage":' + _encode(usage) + b"}\n\n"
        return last + _DONE


class Stream(Response):
    """A streamed answer. Before its first token an error is an HTTP status; after it, an event.

    Args:
        headers: additional ones, raw.
    """

    def __init__(
        self,
        ticket: Ticket,
        handle: RequestHandle,
        answer: Answer,
        templates: Templates,
        headers: list[tuple[bytes, bytes]],
    ) -> None:
        self._ticket = ticket
        self._handle = handle
        self._answer = answer
        self._templates = templates
        self._head = _HEADERS + headers
        self._started = False
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer and account the request."""
        try:
            await self._send_events(send)
            self._ticket.succeed()
        except EngineError as error:
            self._ticket.fail(error)
            failure = as_api_error(error)
            if self._started:
                event = b"data: " + failure.body() + b"\n\n"
                await send({"type": "http.response.body", "body": event, "more_body": False})
            else:
                await failure.response()(scope, receive, send)
        except BaseException as error:
            self._ticket.fail(error)
            raise

    async def _send_events(self, send: Send) -> None:
        templates, answer, body = self._templates, self._answer, b""
        async for text in answer.pieces():
            body += templates.chunk(text)
            if answer.ending:  # the rest follows at once: one write for all of it
                continue
            body = await self._start(send) + body
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})
                body = b""
        body = await self._start(send) + body + templates.end(answer.reason, usage(self._handle))
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _start(self, send: Send) -> bytes:
        """Send the head once; the events that precede the first text."""
        if self._started:
            return b""
        self._started = True
        await send({"type": "http.response.start", "status": 200, "headers": self._head})
        return self._templates.start
