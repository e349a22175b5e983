"""Everything that the code of both guides does, as written there, import lines aside."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from kvpilot_engine import ConfigWarning, KVCacheConfig, KVCacheEngine

# Two engines start, and a thousand requests are served.
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
async def test_config_of_both_examples_serves_requests(  # noqa: PLR0917
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
    assert len(caught) == 1, "what has no effect yet is said once"
    for each in warned:
        assert each in str(caught[0].message)
    results = await asyncio.gather(
        *(engines[name].process_request({"text": f"Request {i} of an example"}) for i in range(8))
    )
    assert [result["output_tokens"] for result in results] == [16] * 8


async def test_high_traffic_settings_are_taken_hot(engine: KVCacheEngine) -> None:
    """The guide's list for high traffic: num_workers=32, prefetch_size=16, batch_size=20."""
    report = await engine.apply({"num_workers": 32, "prefetch_size": 16, "batch_size": 20})
    assert report.changed == ["batchSize"], "the others were in the example already"


async def test_throughput_benchmark_runs_a_thousand_at_once(
    snippets: Any, engine: KVCacheEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    await engine.apply({"batch_size": 20})
    scope = snippets.run("throughput benchmark")
    failed = engine.get_stats()["failed_requests"]
    throughput = await scope["benchmark_throughput"](engine)
    assert capsys.readouterr().out == f"Throughput: {throughput:.2f} req/s\n"
    assert throughput > 0
    assert engine.get_stats()["failed_requests"] == failed


@pytest.mark.parametrize("name", ["latency benchmark", "check latency"])
async def test_latency_snippets(
    snippets: Any, engine: KVCacheEngine, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    scope = snippets.run(name, time=time)
    function = scope.get("benchmark_latency") or scope["check_latency"]
    await function(engine, num_requests=20)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["P50", "P95", "P99"]
    p50, p95, p99 = (float(line.split(": ")[1].removesuffix("ms")) for line in lines)
    assert 0 < p50 <= p95 <= p99


async def test_throughput_check(
    snippets: Any, engine: KVCacheEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    scope = snippets.run("check throughput", asyncio=asyncio)
    await scope["check_throughput"](engine, num_requests=200)
    assert float(capsys.readouterr().out.removeprefix("Throughput: ").removesuffix(" req/s\n")) > 0


def test_memory_check(snippets: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    snippets.run("check memory", torch=torch)["check_memory"]()
    assert capsys.readouterr().out.startswith("Memory usage: ")


async def test_cache_check(snippets: Any, engine: KVCacheEngine, capsys: pytest.CaptureFixture[str]) -> None:
    check = snippets.run("check cache performance")["check_cache_performance"]
    check(engine)
    assert "Low hit rate, consider increasing cache size" in capsys.readouterr().out
    shared = "A system prompt that all requests of this hour share, word for word. " * 8
    for i in range(40):
        await engine.process_request({"text": f"{shared}Question {i}", "max_length": 1})
    queried_before = engine.get_stats()["hit_rate"]
    check(engine)
    assert capsys.readouterr().out.startswith(f"Cache hit rate: {queried_before:.2%}")


async def test_parallel_and_sequential_snippet(snippets: Any, engine: KVCacheEngine) -> None:
    requests = [{"text": f"Async {i}", "max_length": 4} for i in range(12)]
    scope = await snippets.run_async(
        "async operations", asyncio=asyncio, process_request=engine.process_request, requests=requests
    )
    assert [result["output_tokens"] for result in scope["results"]] == [4] * 12


async def test_analyzer_snippet(snippets: Any, engine: KVCacheEngine) -> None:
    await engine.process_request({"text": "Something to analyse"})
    scope = snippets.run("analyzer", engine=engine)
    for each in scope["bottlenecks"]:
        assert set(each) == {"type", "severity", "current_value", "recommendation"}
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
    assert 3590 < client.ttl("key") <= 3600
    client.close()


def test_every_block_of_both_guides_was_run(snippets: Any, request: pytest.FixtureRequest) -> None:
    """The last test of this file: a block that no test runs is a failure."""
    here = [item for item in request.session.items if item.path == request.path]
    if len(here) < 14:
        pytest.skip("only some of this file's tests were selected")
    assert len(snippets.names) == 13
    assert snippets.names - snippets.used <= {
        "redis",
        "connection pool",
        "indexes",
    }, "those may be skipped"
