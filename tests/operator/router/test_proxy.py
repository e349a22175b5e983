"""The router: round-robin over ready replicas, streams forwarded in chunks, failures as JSON."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from kvpilot_operator.router.proxy import Backend, PortError, Router


class Replica:
    """A server that returns its name, streams, and records disconnected clients."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.left = asyncio.Event()
        self.waits = asyncio.Event()
        self.release = asyncio.Event()
        self.bodies: list[bytes] = []

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Backend]:
        server = web.Server(self.handle, handler_cancellation=True)
        runner = web.ServerRunner(server, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield Backend(self.name, f"http://127.0.0.1:{runner.addresses[0][1]}")
        finally:
            await runner.cleanup()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/wait":
            self.waits.set()
            await self.release.wait()
        if request.path == "/cut":
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await response.write(b"data: half")
            assert request.transport is not None
            request.transport.abort()
            return response
        if request.path == "/stream":
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            try:
                await response.write(b"data: one\n\n")
                await self.release.wait()
                await response.write(b"data: two\n\n")
            except asyncio.CancelledError:
                self.left.set()
                raise
            return response
        self.bodies.append(await request.content.read())
        return web.Response(text=f"{self.name} {request.raw_path}", headers={"X-Replica": self.name})


@asynccontextmanager
async def fleet(
    *names: str,
) -> AsyncIterator[tuple[Router, list[Replica], list[Backend], aiohttp.ClientSession]]:
    async with AsyncExitStack() as stack:
        replicas = [Replica(name) for name in names]
        backends = [await stack.enter_async_context(replica.serving()) for replica in replicas]
        router = Router("127.0.0.1", 0)
        await router.start()
        stack.push_async_callback(router.close)
        router.use(backends)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        yield router, replicas, backends, session


async def _get(session: aiohttp.ClientSession, url: str) -> int:
    async with session.get(url) as answer:
        await answer.read()
        return answer.status


async def test_requests_alternate_and_a_drained_replica_gets_no_new_ones() -> None:
    async with fleet("a", "b") as (router, replicas, backends, session):
        waiting = asyncio.create_task(_get(session, f"{router.url}/wait"))
        await asyncio.wait_for(replicas[1].waits.wait(), 60)
        seen = []
        for _ in range(4):
            async with session.get(f"{router.url}/x") as answer:
                seen.append(answer.headers["X-Replica"])
        assert sorted(seen) == ["a", "a", "b", "b"]
        assert seen[0] != seen[1]
        router.use(backends[:1])
        for _ in range(3):
            async with session.get(f"{router.url}/x") as answer:
                assert answer.headers["X-Replica"] == "a"
        router.use([])
        for replica in replicas:
            replica.release.set()
        assert await waiting == 200  # requests in flight are finished


async def test_method_path_body_and_status_are_forwarded_unchanged() -> None:
    async with fleet("a") as (router, replicas, _, session):
        body = b"x" * 3_000_000
        async with session.post(f"{router.url}/v1/a%2Fb?c=%20d", data=body) as answer:
            assert await answer.text() == "a /v1/a%2Fb?c=%20d"
        assert replicas[0].bodies == [body]


async def test_no_ready_replica_is_a_503_in_json() -> None:
    async with fleet() as (router, _, _, session), session.get(f"{router.url}/v1/models") as answer:
        assert answer.status == 503
        assert answer.headers["Retry-After"] == "1"
        assert (await answer.json())["error"]["message"] == "no replica is ready yet"


async def test_dead_replica_is_skipped() -> None:
    async with fleet("a") as (router, _, backends, session):
        router.use([Backend("dead", "http://127.0.0.1:9"), *backends])
        for _ in range(4):
            async with session.get(f"{router.url}/x") as answer:
                assert answer.headers["X-Replica"] == "a"
        router.use([Backend("dead", "http://127.0.0.1:9")])
        async with session.get(f"{router.url}/x") as answer:
            assert answer.status == 502
            assert (await answer.json())["error"]["message"] == "no replica answered, tried dead"


async def test_stream_arrives_in_chunks() -> None:
    async with (
        fleet("a") as (router, replicas, _, session),
        session.get(f"{router.url}/stream") as answer,
    ):
        assert answer.headers["Content-Type"] == "text/event-stream"
        assert await asyncio.wait_for(answer.content.readany(), 60) == b"data: one\n\n"
        replicas[0].release.set()
        assert await answer.read() == b"data: two\n\n"


async def test_client_disconnect_reaches_the_replica() -> None:
    async with fleet("a") as (router, replicas, _, session):
        async with session.get(f"{router.url}/stream") as answer:
            await answer.content.readany()
            answer.close()
        await asyncio.wait_for(replicas[0].left.wait(), 60)


async def test_broken_stream_is_an_error_for_the_client() -> None:
    async with fleet("a") as (router, _, _, session):
        with pytest.raises(aiohttp.ClientError):
            async with session.get(f"{router.url}/cut") as answer:
                await answer.read()


async def test_port_in_use_is_named() -> None:
    async with fleet() as (router, _, _, _):
        port = int(router.url.rpartition(":")[2])
        with pytest.raises(PortError, match=f"--port: cannot listen on 127.0.0.1:{port}: "):
            await Router("127.0.0.1", port).start()


async def test_dead_replica_fails_no_concurrent_request() -> None:
    async with fleet("a") as (router, _, backends, session):
        router.use([Backend("dead", "http://127.0.0.1:1"), *backends])
        assert await asyncio.gather(*(_get(session, f"{router.url}/x") for _ in range(50))) == [200] * 50
