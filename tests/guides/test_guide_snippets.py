"""Runs the code of both guides as written, except for import lines."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import psutil
import pytest

from kvpilot_engine import ConfigWarning, KVCacheConfig, KVCacheEngine

# Starts two engines and serves a thousand requests.
pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]


@pytest.mark.parametrize(
    ("name", "fields", "warned"),
    [
        (
            "high performance",
            {"max_tokens": 16384, "use_compression": False, "dtype": "float16", "num_workers": 32},
            ["cache_strategy: has no effect yet: adaptive runs as lru"],
        ),
        (
            "memory",
            {"max_tokens": 4096, "compression_ratio": 0.2, "quantization_bits": 4, "max_memory_mb": 2048},
            ["use_quantization: has no effect yet", "quantization_bits: has no effect yet"],
        ),
    ],
)
async def test_configurations_of_both_examples_serve_requests(  # noqa: PLR0917
    snippets: Any,
    configs: dict[str, KVCacheConfig],
    engines: dict[str, KVCacheEngine],
    name: str,
    fields: dict[str, Any],
    warned: list[str],
) -> None:
    config = configs[name]
    assert {field: getattr(config, field) for field in fields} == fields
    with pytest.warns(ConfigWarning) as caught:
        KVCacheConfig(**{field: getattr(config, field) for field in config.model_fields_set})
    assert len(caught) == 1, "a field without effect warns once"
    for each in warned:
        assert each in str(caught[0].message)
    results = await asyncio.gather(
        *(engines[name].process_request({"text": f"Request {i} of an example"}) for i in range(8))
    )
    assert [result["output_tokens"] for result in results] == [16] * 8


async def test_high_traffic_settings_apply_hot(engine: KVCacheEngine) -> None:
    """The guide's list for high traffic: num_workers=32, prefetch_size=16, batch_size=20."""
    report = await engine.apply({"num_workers": 32, "prefetch_size": 16, "batch_size": 20})
    assert report.changed == ["batchSize"], "the example already has the others"


async def test_throughput_benchmark_runs_a_thousand_at_once(
    snippets: Any, engine: KVCacheEngine, capsys: pytest.CaptureFixture[str], clock: None
) -> None:
    await engine.apply({"batch_size": 20})
    scope = snippets.run("throughput benchmark")
    before = engine.get_stats()
    assert await scope["benchmark_throughput"](engine) == 1000 / 4
    assert capsys.readouterr().out == "Throughput: 250.00 req/s\n"
    after = engine.get_stats()
    assert after["total_requests"] - before["total_requests"] == 1000
    assert after["failed_requests"] == before["failed_requests"]


@pytest.mark.parametrize("name", ["latency benchmark", "check latency"])
async def test_latency_snippets(
    snippets: Any, engine: KVCacheEngine, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    scope = snippets.run(name, time=time)
    function = scope.get("benchmark_latency") or scope["check_latency"]
    began = time.perf_counter()
    await function(engine, num_requests=20)
    total_ms = 1000 * (time.perf_counter() - began)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["P50", "P95", "P99"]
    p50, p95, p99 = (float(line.split(": ")[1].removesuffix("ms")) for line in lines)
    assert 0 < p50 <= p95 <= p99 <= total_ms
    assert 10 * p50 <= total_ms, "of 20 sequential requests, half take at least p50 each"


async def test_throughput_check(
    snippets: Any, engine: KVCacheEngine, capsys: pytest.CaptureFixture[str], clock: None
) -> None:
    scope = snippets.run("check throughput", asyncio=asyncio)
    before = engine.get_stats()["total_requests"]
    await scope["check_throughput"](engine, num_requests=200)
    assert capsys.readouterr().out == "Throughput: 50.00 req/s\n"
    assert engine.get_stats()["total_requests"] == before + 200


def test_memory_check(snippets: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    snippets.run("check memory", torch=torch)["check_memory"]()
    printed = float(
        capsys.readouterr().out.splitlines()[0].removeprefix("Memory usage: ").removesuffix(" MB")
    )
    assert printed == pytest.approx(psutil.Process().memory_info().rss / 2**20, rel=0.1)


async def test_cache_check(snippets: Any, engine: KVCacheEngine, capsys: pytest.CaptureFixture[str]) -> None:
    check = snippets.run("check cache performance")["check_cache_performance"]
    check(engine)
    assert "Low hit rate, consider increasing cache size" in capsys.readouterr().out
    shared = "A system prompt that all requests of this hour share, word for word. " * 8
    for i in range(40):
        await engine.process_request({"text": f"{shared}Question {i}", "max_length": 1})
    check(engine)
    printed = capsys.readouterr().out.splitlines()[0]
    assert float(printed.removeprefix("Cache hit rate: ").removesuffix("%")) > 50


async def test_parallel_and_sequential_snippet(snippets: Any, engine: KVCacheEngine) -> None:
    requests = [{"text": f"Async {i}", "max_length": 4} for i in range(12)]
    scope = await snippets.run_async(
        "async operations", asyncio=asyncio, process_request=engine.process_request, requests=requests
    )
    assert [result["output_tokens"] for result in scope["results"]] == [4] * 12


async def test_analyzer_snippet(snippets: Any, engines: dict[str, KVCacheEngine]) -> None:
    engine = engines["memory"]  # no test sends it shared prefixes, so its hit rate is a bottleneck
    await engine.process_request({"text": "Something to analyse"})
    scope = snippets.run("analyzer", engine=engine)
    assert "low_hit_rate" in {each["type"] for each in scope["bottlenecks"]}
    for each in scope["bottlenecks"]:
        assert set(each) == {"type", "severity", "current_value", "recommendation"}
    assert scope["recommendations"]
    for each in scope["recommendations"]:
        assert set(each) == {"priority", "action", "description", "expected_impact"}
    assert scope["report"]["summary"]["total_requests"] > 0
    assert f"{scope['report']['summary']['total_requests']} requests" in scope["report"]["text"]


TABLES = (
    "CREATE TABLE cache_table (id serial PRIMARY KEY, session_id text, created_at timestamptz)",
    "CREATE TABLE documents (id serial PRIMARY KEY, business_area text)",
)


def test_connection_pool_and_indexes_against_a_real_postgresql(snippets: Any, postgres_url: str) -> None:
    from sqlalchemy import inspect, text

    database = snippets.run("connection pool", DATABASE_URL=postgres_url)["engine"]
    with database.begin() as connection:
        for statement in (*TABLES, *filter(str.strip, snippets.text("indexes").split(";"))):
            connection.execute(text(statement))
    inspector = inspect(database)
    indexed = {
        index["name"] for table in ("cache_table", "documents") for index in inspector.get_indexes(table)
    }
    assert indexed == {"idx_session_id", "idx_created_at", "idx_business_area"}
    assert (database.pool.size(), database.pool._max_overflow, database.pool._recycle) == (20, 40, 3600)
    database.dispose()


def test_redis_snippet_against_a_real_redis(snippets: Any, redis_server: Any) -> None:
    client = snippets.run("redis")["redis_client"]
    assert client.get("key") == "value"
    assert 3000 < client.ttl("key") <= 3600
    client.close()


def test_every_block_of_both_guides_was_run(snippets: Any, request: pytest.FixtureRequest) -> None:
    """Last test of this file: fails if no test ran one of the blocks."""
    here = [item for item in request.session.items if item.path == request.path]
    if len(here) < 14:
        pytest.skip("only some of this file's tests were selected")
    assert len(snippets.names) == 13
    assert snippets.names - snippets.used <= {
        "redis",
        "connection pool",
        "indexes",
    }, "those may be skipped"
