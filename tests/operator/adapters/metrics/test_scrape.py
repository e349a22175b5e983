"""Scraping: real pages of the engine's own registry, resets, young engines, silence."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tests.waiting import until

from kvpilot_operator.adapters.metrics.scrape import History, PageReader, ScrapeMetrics, Target
from kvpilot_operator.adapters.metrics.series import SeriesKey
from kvpilot_operator.status.snapshot import Key

KEY = Key("default", "chat")
ARRIVALS: SeriesKey = ("kvpilot_arrivals_total", ())


def test_a_page_reads_as_the_library_reads_it() -> None:
    registry = CollectorRegistry()
    hits = Counter("kvpilot_prefix_hit_tokens_total", "x", ["tier"], registry=registry)
    hits.labels("pool").inc(5)
    hits.labels("host").inc(7e9)
    Gauge("kvpilot_requests_waiting", "x", registry=registry).set(3)
    Gauge("somebody_else", "x", ["path"], registry=registry).labels('a "b" {c} d').set(1)
    text = generate_latest(registry).decode()
    reader = PageReader()
    expected = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name in {"kvpilot_prefix_hit_tokens_total", "kvpilot_requests_waiting"}
    }
    assert reader.read(text) == expected
    hits.labels("pool").inc()
    again = reader.read(generate_latest(registry).decode())
    assert again["kvpilot_prefix_hit_tokens_total", (("tier", "pool"),)] == 6


def test_a_line_that_is_no_series_is_skipped() -> None:
    assert PageReader().read("kvpilot_arrivals_total one\nkvpilot_arrivals_total{ 1\n\ngarbage") == {}


def test_increase_survives_a_reset() -> None:
    history = History()
    for at, value in enumerate([10, 20, 30, 4, 6]):
        history.add(float(at), {ARRIVALS: float(value)})
    assert history.increase(10)[0] == {ARRIVALS: 26.0}
    assert history.increase(2) == ({ARRIVALS: 6.0}, 2)
    assert history.increase(1) == ({ARRIVALS: 2.0}, 1)


def test_a_young_engine_says_what_it_covers() -> None:
    history = History()
    history.add(100.0, {ARRIVALS: 5.0})
    history.add(101.1, {ARRIVALS: 8.0})
    assert history.increase(60) == ({ARRIVALS: 3.0}, pytest.approx(1.1))


def test_a_series_that_appears_later_began_at_zero() -> None:
    history = History()
    history.add(0.0, {})
    history.add(1.0, {ARRIVALS: 8.0})
    assert history.increase(60)[0] == {ARRIVALS: 8.0}


def test_old_scrapes_are_dropped_and_the_newest_windows_stay_right() -> None:
    history = History()
    for at in range(5000):
        history.add(float(at), {ARRIVALS: float(at)})
    assert len(history.times) < 3700
    assert history.increase(3600)[0] == {ARRIVALS: 3600.0}
    assert history.increase(10)[0] == {ARRIVALS: 10.0}


@asynccontextmanager
async def served(page: Callable[[web.Request], Awaitable[web.Response]]) -> AsyncIterator[str]:
    """The URL of one metrics page."""
    app = web.Application()
    app.router.add_get("/metrics", page)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/metrics"
    finally:
        await runner.cleanup()


async def test_an_engine_that_falls_silent_ages_and_one_that_never_spoke_is_absent() -> None:
    seen = 0
    silent = False

    async def page(_: web.Request) -> web.Response:
        nonlocal seen
        if silent:
            return web.Response(status=503)
        seen += 1
        return web.Response(text=PAGE.replace("ARRIVED", str(seen)))

    targets = [Target("b", "http://127.0.0.1:9/metrics")]
    now = 1000.0
    metrics = ScrapeMetrics(lambda: {KEY: targets}, 0.02, clock=lambda: now)
    async with served(page) as url:
        targets.append(Target("a", url))
        await metrics.start()
        try:
            await until(lambda: seen > 3)
            silent = True
            now = 1030.0
            found = (await metrics.samples({KEY: {"short": 10, "long": 60}}))[KEY]
            assert set(found) == {"a"}
            assert found["a"].age_s == 30
            assert found["a"].windows["short"].arrivals >= 2
            targets.clear()
            assert (await metrics.samples({KEY: {"short": 10}}))[KEY] == {}
        finally:
            await metrics.close()


async def test_another_interval_holds_at_once() -> None:
    seen = 0

    async def page(_: web.Request) -> web.Response:
        nonlocal seen
        seen += 1
        return web.Response(text=PAGE)

    async with served(page) as url:
        metrics = ScrapeMetrics(lambda: {KEY: [Target("a", url)]}, 3600)
        await metrics.start()
        try:
            await until(lambda: seen == 1)
            metrics.scrape_every(0.02)
            await until(lambda: seen > 3)
        finally:
            await metrics.close()


def _page() -> str:
    from kvpilot_engine.contract.metrics import EDGES_S
    from kvpilot_operator.adapters.metrics.series import COUNTERS, GAUGES

    lines = []
    for name in (*COUNTERS, *GAUGES):
        if name.endswith("_bucket"):
            lines += [f'{name}{{le="{edge}"}} 1.0' for edge in (*EDGES_S, "+Inf")]
        else:
            lines.append(f"{name} {'ARRIVED' if name == ARRIVALS[0] else '1.0'}")
    return "\n".join(lines) + "\n"


PAGE = _page()
