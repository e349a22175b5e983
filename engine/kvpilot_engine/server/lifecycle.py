"""Life of a serving process: bind, start the core, drain on a signal, end when the core is gone."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import uvicorn
from starlette.types import ASGIApp

from kvpilot_engine.contract import KVCacheConfig
from kvpilot_engine.errors import CoreUnavailableError, StartError
from kvpilot_engine.frontend.session import Session
from kvpilot_engine.frontend.tokenizer import load_tokenizer
from kvpilot_engine.ipc.client import CoreClient
from kvpilot_engine.ipc.messages import CoreStart
from kvpilot_engine.server.admin import build_admin
from kvpilot_engine.server.app import build_app

EXIT_OK, EXIT_CORE_LOST, EXIT_BAD_START = 0, 1, 2

_LOSS_GRACE_S = 1.0
"""Time for which a process whose core died still answers: open requests get their error, probes fail."""


@dataclass(frozen=True)
class ServeOptions:
    """How an engine is served.

    Attributes:
        port, admin_port: 0 takes a free one; the chosen ones are printed.
        drain_seconds: from the signal to the exit at the latest.
        drain_lag_seconds: how long new connections are still taken after the signal, until the endpoints of
            a Service have changed.
        admin_token: returns the current bearer token; None refuses every admin request.
    """

    model: str
    revision: str
    config: KVCacheConfig
    generation: int
    epoch: int
    host: str
    port: int
    admin_host: str
    admin_port: int
    drain_seconds: float
    drain_lag_seconds: float
    admin_token: Callable[[], str | None]
    access_log: bool


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling: two servers share one process here."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(what: str, host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        StartError: naming the option and the address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol by number: asyncio sets TCP_NODELAY only where it is given, and without that a stream's
    # small writes wait 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise StartError(f"{what}: cannot listen on {host}:{port}: {error.strerror}") from None
    listener.listen(2048)
    return listener


class Service:
    """One engine being served."""

    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        self._session = Session(options.model, options.config, load_tokenizer(options.model))
        self._signalled = asyncio.Event()
        self._forced = asyncio.Event()

    async def run(self) -> int:
        """Serve until a signal or the end of the core; the exit status.

        Raises:
            StartError: a port is taken, or the core cannot start.
        """
        options = self._options
        listener = bind("--port", options.host, options.port)
        admin_listener = bind("--admin-port", options.admin_host, options.admin_port)
        servers = [
            self._server(build_app(self._session), options.access_log),
            self._server(build_admin(self._session, options.admin_token), access_log=False),
        ]
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        serving = [
            asyncio.create_task(server.serve(sockets=[sock]))
            for server, sock in zip(servers, (listener, admin_listener), strict=True)
        ]
        _log(f"listening on port {listener.getsockname()[1]}, admin port {admin_listener.getsockname()[1]}")
        try:
            return await self._live(servers)
        finally:
            for server in servers:
                server.should_exit = True
            await asyncio.gather(*serving)
            await self._session.close(1.0)

    def _server(self, app: ASGIApp, access_log: bool) -> _Server:
        config = uvicorn.Config(
            app,
            lifespan="off",
            access_log=access_log,
            log_level="warning" if not access_log else "info",
            server_header=False,
            timeout_graceful_shutdown=1,
            timeout_keep_alive=75,
            ws="none",
        )
        return _Server(config)

    async def _live(self, servers: list[_Server]) -> int:
        options = self._options
        start = CoreStart.of(
            options.config,
            model=options.model,
            revision=options.revision,
            generation=options.generation,
            epoch=options.epoch,
        )
        starting = asyncio.create_task(CoreClient.start(start))
        signalled = asyncio.create_task(self._signalled.wait())
        await asyncio.wait({starting, signalled}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return EXIT_OK
        client = starting.result()
        self._session.attach(client)
        _log(
            f"ready: {options.model} on {client.described.device}, context {client.described.context_length}"
        )
        gc.collect()
        gc.freeze()  # long-lived objects: exclude them from every later collection
        lost = asyncio.create_task(client.lost_event.wait())
        await asyncio.wait({lost, signalled}, return_when=asyncio.FIRST_COMPLETED)
        if not lost.done():
            await self._drain(servers, client, lost)
        if not lost.done():
            lost.cancel()
            return EXIT_OK
        return await self._report_loss(client)

    async def _report_loss(self, client: CoreClient) -> int:
        _log(f"fatal: {client.loss}")
        await asyncio.sleep(_LOSS_GRACE_S)
        return EXIT_CORE_LOST

    async def _drain(self, servers: list[_Server], client: CoreClient, lost: asyncio.Task[bool]) -> None:
        """Fail readiness, serve for the lag, then refuse new connections and finish what is open."""
        options = self._options
        loop = asyncio.get_running_loop()
        deadline = loop.time() + options.drain_seconds
        self._session.draining = True
        _log(f"draining: {client.open_requests} open requests, at most {options.drain_seconds:g} s")
        forced = asyncio.create_task(self._forced.wait())
        await asyncio.wait(
            {lost, forced}, timeout=options.drain_lag_seconds, return_when=asyncio.FIRST_COMPLETED
        )
        for server in servers:
            server.config.timeout_graceful_shutdown = max(1, round(deadline - loop.time()))
            server.should_exit = True
        while client.open_requests and not lost.done() and not forced.done():
            if loop.time() > deadline - _LOSS_GRACE_S:
                client.expire_all(CoreUnavailableError("the server is shutting down; retry elsewhere"))
                break
            await asyncio.wait({lost, forced}, timeout=0.05, return_when=asyncio.FIRST_COMPLETED)
        if forced.done():
            client.expire_all(CoreUnavailableError("a second signal ended the server at once"))
        forced.cancel()

    def _on_signal(self) -> None:
        """Drain at the first signal, end at once at the second."""
        (self._forced if self._signalled.is_set() else self._signalled).set()


def _log(line: str) -> None:
    print(f"kvpilot-engine: {line}", file=sys.stderr, flush=True)


def serve(options: ServeOptions) -> int:
    """Serve an engine; the exit status of the process."""

    async def run() -> int:
        return await Service(options).run()

    try:
        return asyncio.run(run())
    except (StartError, ValueError) as error:
        _log(f"error: {error}")
        return EXIT_BAD_START
