"""Sending requests: the open loop, and a count of failures by kind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from aiohttp import web

from kvpilot_operator.load.client import Answer, Client, RequestError
from kvpilot_operator.load.results import RequestResult, Tally, format_summary, percentile
from kvpilot_operator.load.runner import LoadRun
from kvpilot_operator.load.workload import Arrival, LoadError, LoadFeedback, LoadRequest

USAGE = {"prompt_tokens": 10, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 8}}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Even:
    """Requests at equal intervals."""

    count: int
    gap: float
    answers: list[str]
    title: str = "even"
    probes: tuple[LoadRequest, ...] = ()

    @property
    def seconds(self) -> float:
        return self.count * self.gap

    def arrivals(self, seen: LoadFeedback) -> Iterator[Arrival]:
        for index in range(self.count):
            request = LoadRequest("/v1/completions", {"prompt": f"{index}", "max_tokens": 4})
            yield Arrival(index * self.gap, "even", lambda request=request: request, self.answers.append)


@asynccontextmanager
async def server(handler: Handler) -> AsyncIterator[str]:
    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}]})

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/completions", handler)
    async with serving(app) as url:
        yield url


@asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


async def sent(url: str, workload: Even, *, stream: bool = False, timeout_s: float = 60) -> LoadRun:
    async with Client(url, stream=stream, timeout_s=timeout_s) as client:
        await client.find_model()
        run = LoadRun(client, workload)
        await run.run()
    return run


async def test_slow_server_does_not_slow_the_load() -> None:
    in_flight = 0
    every = asyncio.Event()

    async def held(_: web.Request) -> web.Response:
        nonlocal in_flight
        in_flight += 1
        if in_flight == 20:
            every.set()
        await every.wait()  # no answer before all requests are there
        return web.json_response({"choices": [{"text": "abcd"}], "usage": USAGE})

    async with server(held) as url:
        run = await sent(url, Even(20, 0.01, []))
    summary = run.summary()
    assert summary["completed"] == 20
    assert summary["hit_rate"] == 0.8
    assert summary["tokens"]["output"] == 80  # type: ignore[index]


async def test_failures_are_counted_by_kind() -> None:
    async def handler(request: web.Request) -> web.Response:
        number = int((await request.json())["prompt"])
        if number == 4:
            return web.Response(text="<html>")
        status = {0: 200, 1: 429, 2: 400, 3: 503}[number]
        if status == 200:
            return web.json_response({"choices": [{"text": "abcd"}], "usage": USAGE})
        return web.json_response({"error": {"message": f"refused {number}"}}, status=status)

    answers: list[str] = []
    async with server(handler) as url:
        run = await sent(url, Even(5, 0, answers))
    summary = run.summary()
    assert summary["errors"] == {"shed": 1, "refused": 1, "server": 1, "protocol": 1}
    assert summary["error_examples"]["shed"] == "429: refused 1"  # type: ignore[index]
    assert answers == ["abcd"]


async def test_request_without_an_answer_in_time_is_a_timeout() -> None:
    ended = asyncio.Event()

    async def never(_: web.Request) -> web.Response:
        await ended.wait()
        return web.Response()

    async with server(never) as url:
        run = await sent(url, Even(1, 0, []), timeout_s=0.1)
        ended.set()
    summary = run.summary()
    assert summary["errors"] == {"timeout": 1}
    assert "errors      1 timeout (no answer in time): no answer within 0.1 s" in format_summary(summary)


UNDECODABLE = b'{"choices":[{"text":"\xff\xfe"}]}'


@pytest.mark.parametrize(
    ("body", "stream", "message"),
    [
        (UNDECODABLE, False, "not an answer of the OpenAI API"),
        (b"data: " + UNDECODABLE + b"\n\n", True, "not an event of the OpenAI API"),
        (b"data: " + b"x" * 2**20 + b"\n\n", True, "not an event of the OpenAI API"),
    ],
)
async def test_unreadable_answer_is_a_protocol_failure(body: bytes, stream: bool, message: str) -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(body=body)

    async with server(handler) as url:
        run = await sent(url, Even(1, 0, []), stream=stream)
    [result] = run.tally.results
    assert result.kind == "protocol"
    assert result.message.startswith(message)


async def test_unreadable_refusal_keeps_its_kind() -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(status=503, body=b'{"error":{"message":"\xff"}}')

    async with server(handler) as url:
        run = await sent(url, Even(1, 0, []))
    [result] = run.tally.results
    assert (result.kind, result.message) == ("server", '503: {"error":{"message":"\ufffd"}}')


async def test_server_without_a_readable_model_is_an_error() -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(body=b'{"data":[{"id":"\xff"}]}')

    app = web.Application()
    app.router.add_get("/v1/models", handler)
    async with serving(app) as url, Client(url) as client:
        with pytest.raises(RequestError, match="/v1/models lists no model"):
            await client.find_model()


async def test_unexpected_client_error_is_not_counted_as_cut_off() -> None:
    class Broken(Client):
        async def send(self, request: LoadRequest) -> Answer:
            raise RecursionError("too deep")

    async with Broken("http://127.0.0.1:9") as client:
        run = LoadRun(client, Even(1, 0, []))
        await run.run()
    [result] = run.tally.results
    assert (result.kind, result.message) == ("protocol", "RecursionError: too deep")


async def test_stream_is_read_to_its_end_and_its_first_token_timed() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        assert (await request.json())["stream_options"] == {"include_usage": True}
        response = web.StreamResponse()
        await response.prepare(request)
        for text in ("", "ab", "cd"):
            await response.write(b"data: " + json.dumps({"choices": [{"text": text}]}).encode() + b"\n\n")
            await asyncio.sleep(0.05)
        await response.write(b"data: " + json.dumps({"choices": [], "usage": USAGE}).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    answers: list[str] = []
    async with server(handler) as url:
        run = await sent(url, Even(1, 0, answers), stream=True)
    result = run.tally.results[0]
    assert answers == ["abcd"]
    assert (result.kind, result.cached_tokens, result.output_tokens) == ("ok", 8, 4)
    assert result.first_token is not None
    assert 0.04 < result.first_token < result.seconds


async def test_stop_cuts_off_and_counts_requests_in_flight() -> None:
    started = asyncio.Event()

    async def never(_: web.Request) -> web.Response:
        started.set()
        await asyncio.Event().wait()
        return web.Response()

    async with server(never) as url, Client(url) as client:
        run = LoadRun(client, Even(100_000, 0.01, []))
        task = asyncio.create_task(run.run())
        await asyncio.wait_for(started.wait(), 60)
        run.stop()
        await asyncio.wait_for(task, 60)
    assert run.tally.in_flight == 0
    assert {r.kind for r in run.tally.results} == {"cancelled"}


async def test_winding_down_waits_for_requests_in_flight() -> None:
    started, release = asyncio.Event(), asyncio.Event()

    async def held(_: web.Request) -> web.Response:
        started.set()
        await release.wait()
        return web.json_response({"choices": [{"text": "abcd"}], "usage": USAGE})

    async with server(held) as url, Client(url) as client:
        run = LoadRun(client, Even(100_000, 0.01, []))
        task = asyncio.create_task(run.run())
        await asyncio.wait_for(started.wait(), 60)
        run.wind_down()
        release.set()
        await asyncio.wait_for(task, 60)
    assert 0 < run.tally.offered < 100_000
    assert {r.kind for r in run.tally.results} == {"ok"}


async def test_unreachable_server_is_named() -> None:
    async with Client("http://127.0.0.1:9") as client:
        with pytest.raises(RequestError, match=r"cannot reach http://127.0.0.1:9/v1/models"):
            await client.find_model()
    with pytest.raises(LoadError, match=r"URL: must be http:// or https:// with a host.*, got 'localhost'"):
        Client("localhost")


def test_percentiles_are_nearest_rank() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.95, 0.99)] == [50, 95, 99]
    assert percentile([], 0.5) is None
    assert percentile([7.0], 0.99) == 7


def test_offered_and_completed_rates_have_separate_durations() -> None:
    calm = [RequestResult("calm", at, 0, 1, output_tokens=6) for at in (1, 3)]
    rise = [
        RequestResult("rise", at, 0, seconds, output_tokens=6) for at, seconds in ((5, 3), (6, 14), (7, 1))
    ]
    summary = Tally(6, [rise[0], *calm, rise[2], rise[1]]).summary(10)
    spans = ("offered_seconds", "seconds", "offered_per_s", "completed_per_s", "output_tokens_per_s")
    assert [summary[name] for name in spans] == [10, 20, 0.6, 0.25, 1.5]
    assert list(summary["phases"]) == ["calm", "rise"]
    assert [summary["phases"]["calm"][name] for name in spans] == [5, 5, 0.4, 0.4, 2.4]
    assert [summary["phases"]["rise"][name] for name in spans] == [5, 15, 0.6, 0.2, 1.2]
    assert summary["phases"]["calm"]["latency_s"]["p50"] == 1
    assert summary["phases"]["rise"]["latency_s"]["p50"] == 3
    assert format_summary(summary)[0] == (
        "requests    6 offered in 10 s (0.60/s), 5 completed in 20 s (0.25/s)"
    )
    assert Tally().summary(0)["offered_per_s"] == 0


async def test_offered_rate_covers_the_schedule_or_the_time_until_the_stop() -> None:
    release = asyncio.Event()

    async def held(_: web.Request) -> web.Response:
        await release.wait()
        return web.json_response({"choices": [{"text": "abcd"}], "usage": USAGE})

    async with server(held) as url, Client(url) as client:
        whole, stopped = LoadRun(client, Even(5, 0.01, [])), LoadRun(client, Even(100_000, 0.01, []))
        tasks = [asyncio.create_task(run.run()) for run in (whole, stopped)]
        while whole.tally.offered < 5:  # noqa: ASYNC110 - a plain fact of another task
            await asyncio.sleep(0.01)
        stopped.wind_down()
        at = 0.0
        while stopped.offered_seconds != at:  # until it stops to grow
            at = stopped.offered_seconds
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        release.set()
        await asyncio.gather(*tasks)
    assert whole.offered_seconds == 0.05
    assert whole.seconds > 0.3
    assert whole.summary()["offered_per_s"] == 100
    assert 0 < stopped.offered_seconds < stopped.seconds - 0.25
