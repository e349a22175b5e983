"""HTTP proxy that distributes requests round-robin to the ready replicas, like a Kubernetes Service."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "host", "content-length"}
)
"""Headers that are not forwarded: hop-by-hop (RFC 9110, 7.6.1), and those that aiohttp writes itself."""

MAX_BODY_BYTES = 64 * 1024 * 1024


class PortError(Exception):
    """The router cannot listen on its port; the message names the option, the address and the reason."""


@dataclass(frozen=True)
class Backend:
    """One ready replica: ``url`` is ``http://host:port``."""

    name: str
    url: str


class Router:
    """Forwards requests. A removed replica gets no new requests and finishes those that it has."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._backends: tuple[Backend, ...] = ()
        self._turn = 0
        self._session: aiohttp.ClientSession | None = None
        self._runner: web.ServerRunner | None = None

    @property
    def url(self) -> str:
        """``http://host:port``; the actual port after `start`."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}"

    def use(self, backends: Sequence[Backend]) -> None:
        """Distribute new requests to these replicas from now on."""
        self._backends = tuple(backends)

    async def start(self) -> None:
        """Start to listen.

        Raises:
            PortError: the port is in use or not permitted.
        """
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
            timeout=aiohttp.ClientTimeout(total=None, connect=5),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        # If the client disconnects, cancelling the handler closes the connection to the engine, which then
        # frees the request's worker slot and pages.
        server = web.Server(
            self._handle,
            request_factory=_request,
            handler_cancellation=True,
            auto_decompress=False,
            access_log=None,
        )
        self._runner = web.ServerRunner(server, shutdown_timeout=1.0)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port, backlog=2048).start()
        except OSError as error:
            await self.close()
            raise PortError(
                f"--port: cannot listen on {self._host}:{self._port}: {error.strerror or error}"
            ) from None
        self._port = self._runner.addresses[0][1]

    async def close(self) -> None:
        """Stop listening; requests in flight are aborted."""
        if self._runner is not None:
            await self._runner.cleanup()
        if self._session is not None:
            await self._session.close()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            body = await request.read() if request.can_read_body else None
        except web.HTTPRequestEntityTooLarge:
            return _failure(413, f"the body must be at most {MAX_BODY_BYTES} bytes")
        headers = [
            (name, value) for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP
        ]
        tried: set[str] = set()
        # The range is fixed now, because concurrent requests advance the turn.
        self._turn += 1
        # Two rounds, because the first attempt may use a stale connection.
        for turn in range(self._turn, self._turn + 2 * len(self._backends)):
            if not self._backends:
                break
            backend = self._backends[turn % len(self._backends)]
            tried.add(backend.name)
            try:
                return await self._pass(request, backend, body, headers)
            except (aiohttp.ClientConnectorError, aiohttp.ServerDisconnectedError, ConnectionResetError):
                # No answer has arrived and requests have no side effects: try another replica.
                continue
            except (aiohttp.ClientError, TimeoutError) as error:
                return _failure(502, f"replica {backend.name} failed: {error or type(error).__name__}")
        if tried:
            return _failure(502, f"no replica answered, tried {', '.join(sorted(tried))}")
        return _failure(503, "no replica is ready yet", {"Retry-After": "1"})

    async def _pass(
        self, request: web.BaseRequest, backend: Backend, body: bytes | None, headers: list[tuple[str, str]]
    ) -> web.StreamResponse:
        assert self._session is not None
        async with self._session.request(
            request.method,
            URL(backend.url + request.raw_path, encoded=True),
            data=body,
            headers=headers,
            allow_redirects=False,
        ) as answer:
            kept = [
                (name, value) for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP
            ]
            if "Content-Length" in answer.headers:
                content = await answer.read()
                whole = web.Response(status=answer.status, body=content)
                _set_headers(whole, kept)
                return whole
            stream = web.StreamResponse(status=answer.status)
            _set_headers(stream, kept)
            await stream.prepare(request)
            await _copy(answer, stream)
            return stream


def _request(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
    """A request with a body of up to `MAX_BODY_BYTES`; long prompts exceed aiohttp's default of 1 MiB."""
    return web.BaseRequest(
        message, payload, protocol, writer, task, asyncio.get_running_loop(), client_max_size=MAX_BODY_BYTES
    )


async def _copy(answer: aiohttp.ClientResponse, stream: web.StreamResponse) -> None:
    """Forward chunks as they arrive; abort the client's connection too if the replica's stream breaks."""
    try:
        async for part in answer.content.iter_any():
            await stream.write(part)
    except (aiohttp.ClientError, TimeoutError) as error:
        raise asyncio.CancelledError from error
    await stream.write_eof()


def _set_headers(response: web.StreamResponse, headers: Sequence[tuple[str, str]]) -> None:
    for name in {name for name, _ in headers}:
        response.headers.popall(name, None)
    for name, value in headers:
        response.headers.add(name, value)


def _failure(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    """An error in the format of the OpenAI API."""
    body = {"error": {"message": message, "type": "server_error", "param": None, "code": None}}
    return web.json_response(body, status=status, headers=headers)
