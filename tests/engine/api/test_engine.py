"""KVCacheEngine: requests, batches, errors, changes, statistics and shutdown."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from tests.waiting import eventually

from kvpilot_engine import KVCacheConfig, KVCacheEngine
from kvpilot_engine.contract import ConfigWarning
from kvpilot_engine.errors import (
    ChangeRefusedError,
    CoreUnavailableError,
    InvalidRequestError,
    RequestTimeoutError,
    StartError,
)
from kvpilot_engine.model.loading import ModelError, load_model

pytestmark = pytest.mark.timeout(300)  # the first test of a session waits until an engine has started

# Still running whenever its test ends it, and fits into the cache of the shared engine.
LONG = {"text": "Slow", "max_length": 16_000}
ROOMY = KVCacheConfig(dtype="float32", max_tokens=65_536)


async def when(engine: KVCacheEngine, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first statistics of which this is true."""

    def reached() -> dict[str, Any] | None:
        stats = engine.get_stats()
        return stats if condition(stats) else None

    return dict(await asyncio.to_thread(eventually, reached, why=lambda: str(engine.get_stats())))


def answering(stats: dict[str, Any]) -> bool:
    """Whether the first token of an engine has come."""
    return float(stats["engine"]["kvpilot_output_tokens_total"][""]) > 0


async def test_result_reports_tokens_latency_and_stages(engine: KVCacheEngine) -> None:
    request = {
        "text": "What is a page? " * 10,
        "priority": 1,
        "session_id": "s",
        "max_length": 8,
        "temperature": 0,
    }
    first = await engine.process_request(request)
    again = await engine.process_request(request)
    assert (first["prompt_tokens"], first["output_tokens"], len(first["tokens"])) == (160, 8, 8)
    assert (first["finish_reason"], first["session_id"], first["priority"]) == ("length", "s", 1)
    assert first["text"] == again["text"]
    assert (first["cached_tokens"], again["cached_tokens"]) == (0, 144)
    assert 0 < first["first_token_ms"] < first["latency_ms"]


async def test_stages_add_up_to_the_latency(engine: KVCacheEngine) -> None:
    """But for the way between front and core, which on a crowded machine takes long for some."""
    results = [await engine.process_request({"text": f"Stages {i}", "max_length": 8}) for i in range(10)]
    parts = [sum(result["stages_ms"].values()) / result["latency_ms"] for result in results]
    assert 0.5 < max(parts) <= 1


async def test_default_is_sixteen_new_tokens_greedy(engine: KVCacheEngine) -> None:
    results = await asyncio.gather(*(engine.process_request({"text": "Defaults"}) for _ in range(3)))
    assert [result["output_tokens"] for result in results] == [16, 16, 16]
    assert len({result["text"] for result in results}) == 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "text: required"),
        ({"text": ""}, "text: must not be empty, got ''"),
        ({"text": 5}, "text: should be a valid string, got 5"),
        ({"text": "a" * 100_001}, "text: string should have at most 100000 characters"),
        ({"text": "a" * 40_000}, "text: 40000 tokens do not fit; this model's context is 32768 tokens"),
        ({"text": "a" * 20_000}, "the cache holds 16384 (the engine's max_tokens)"),
        ({"text": "a", "max_length": 0}, "max_length: should be greater than or equal to 1, got 0"),
        ({"text": "a", "max_length": 10**6}, "max_length: 1000000 new tokens after a prompt of 1 exceed"),
        ({"text": "a", "priority": "high"}, "priority: should be a valid integer, got 'high'"),
        ({"text": "a", "seed": 2**63}, "seed: should be less than 9223372036854775808, got 92233"),
        ({"text": "a", "temperature": -1}, "temperature: should be greater than or equal to 0, got -1"),
        ({"text": "a", "maxlength": 3}, "maxlength: unknown key, must be one of temperature, top_p, seed"),
        ({"text": "\ud800"}, "text"),
        ("just text", "request: must be a mapping, got str"),
    ],
)  # fmt: skip
async def test_invalid_request_is_refused_by_field(
    engine: KVCacheEngine, request_: Any, message: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await engine.process_request(request_)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_engine_outlives_event_loops(engine: KVCacheEngine) -> None:
    async def ask(text: str) -> str:
        return str((await engine.process_request({"text": text}))["text"])

    assert len({asyncio.run(ask("The same")) for _ in range(3)}) == 1


async def test_thousand_concurrent_requests_all_finish(engine: KVCacheEngine) -> None:
    """The core admits 48; the others wait in the admission queue."""
    requests = [{"text": f"Request {i}", "max_length": 4} for i in range(1000)]
    results = await asyncio.gather(*map(engine.process_request, requests))
    assert [result["output_tokens"] for result in results] == [4] * 1000
    stats = engine.get_stats()
    assert (stats["waiting_for_queue"], stats["active_requests"]) == (0, 0)


async def test_cancelled_request_frees_its_pages(engine: KVCacheEngine) -> None:
    before = engine.get_stats()
    tasks = [
        asyncio.create_task(engine.process_request({"text": f"Cancelled {i}", "max_length": 5000}))
        for i in range(60)
    ]
    await when(engine, lambda stats: stats["active_requests"] == 60 and stats["running"] > 0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    stats = await when(engine, lambda stats: stats["active_requests"] == stats["running"] == 0)
    assert stats["cancelled_requests"] == before["cancelled_requests"] + 60
    assert stats["failed_requests"] == before["failed_requests"], "the caller's doing is no failure"
    assert (await engine.process_request({"text": "Still here"}))["output_tokens"] == 16


async def test_requests_of_higher_priority_run_first(engine: KVCacheEngine) -> None:
    engine.update_config(num_workers=1, max_queue=1)
    order: list[str] = []

    async def ask(name: str, priority: int) -> None:
        await engine.process_request({"text": name, "priority": priority, "max_length": 4})
        order.append(name)

    holding = asyncio.create_task(engine.process_request(LONG))
    ordinary = [asyncio.create_task(ask(f"ordinary {i}", 0)) for i in range(8)]
    await when(engine, lambda stats: stats["active_requests"] == 9)
    urgent = asyncio.create_task(ask("urgent", 7))
    await when(engine, lambda stats: stats["active_requests"] == 10)
    holding.cancel()
    await asyncio.gather(urgent, *ordinary)
    engine.update_config(num_workers=16, max_queue=32)
    assert order.index("urgent") <= 1, order  # the core may hold one ordinary request already


async def test_request_beyond_its_time_limit_raises(engine: KVCacheEngine) -> None:
    engine.update_config(request_timeout_s=0.2)
    with pytest.raises(RequestTimeoutError, match=r"0\.2"):
        await engine.process_request(LONG)
    engine.update_config(request_timeout_s=60)


async def test_batch_keeps_the_order_and_serves_equal_requests_once(engine: KVCacheEngine) -> None:
    before = engine.get_stats()["total_requests"]
    requests = [{"text": text, "priority": i} for i, text in enumerate(["a", "b", "c"])]
    requests += [{"text": "a", "priority": 0}]
    results = await engine.process_batch(requests, batch_size=2, deduplicate=True, prioritise=True)
    assert [result["priority"] for result in results] == [0, 1, 2, 0]
    assert results[0] == results[3]
    assert engine.get_stats()["total_requests"] == before + 3
    assert len(await engine.process_batch(requests, prioritize=True)) == 4
    assert engine.get_stats()["total_requests"] == before + 7
    assert await engine.process_batch([]) == []


async def test_batch_with_an_invalid_request_sends_nothing(engine: KVCacheEngine) -> None:
    before = engine.get_stats()["total_requests"]
    with pytest.raises(InvalidRequestError, match=r"requests\.1: max_length: should be greater"):
        await engine.process_batch([{"text": "fine"}, {"text": "wrong", "max_length": 0}])
    wrong: Any
    for wrong in (0, True, "a"):
        with pytest.raises(InvalidRequestError, match=f"batch_size: must be .* at least 1, got {wrong!r}"):
            await engine.process_batch([{"text": "fine"}], batch_size=wrong)
    assert engine.get_stats()["total_requests"] == before


async def test_batch_can_return_errors_in_place(engine: KVCacheEngine) -> None:
    long = {"text": "a", "max_length": 20_000}
    results = await engine.process_batch([{"text": "fine"}, long], return_exceptions=True)
    assert results[0]["output_tokens"] == 16
    assert isinstance(results[1], InvalidRequestError)


async def test_stats_follow_requests(engine: KVCacheEngine) -> None:
    await engine.process_request({"text": "Measured " * 20})
    stats = engine.get_stats()
    assert 0 < stats["p50_latency"] <= stats["p95_latency"] <= stats["p99_latency"]
    assert 0 < stats["hit_rate"] <= stats["hit_rate_ceiling"] < 1
    assert stats["hit_rate"] + stats["miss_rate"] == pytest.approx(1.0)
    assert 0 < stats["memory_usage"] < 1
    assert stats["memory_bytes"] / stats["memory_limit_bytes"] == pytest.approx(stats["memory_usage"])
    assert stats["gpu_utilization"] == 0.0
    assert stats["engine"]["kvpilot_output_tokens_total"][""] > 0
    assert sum(stage["share"] for stage in stats["stages"].values()) == pytest.approx(1.0)


async def test_hot_change_keeps_the_cache(engine: KVCacheEngine) -> None:
    text = "Kept across a change " * 8
    await engine.process_request({"text": text})
    report = await engine.apply({"prefetchSize": 9, "max_step_tokens": 256})
    assert report.changed == ["maxStepTokens", "prefetchSize"]
    assert engine.config.prefetch_size == 9
    assert (await engine.process_request({"text": text}))["cached_tokens"] == (len(text) - 1) // 16 * 16


async def test_hot_change_without_effect_warns_once(engine: KVCacheEngine) -> None:
    with pytest.warns(ConfigWarning, match="^enable_gc: has no effect yet") as caught:
        engine.update_config(enable_gc=False, prefetch_size=9)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(ConfigWarning, match="^cache_strategy: has no effect yet: adaptive runs as lru$"):
        await engine.apply({"cacheStrategy": "adaptive"})
    engine.update_config(enable_gc=True, cache_strategy="lru")


async def test_hot_change_accepts_the_values_of_the_constructor(engine: KVCacheEngine) -> None:
    report = engine.update_config(dtype=torch.float32, num_workers=np.int64(15))
    assert report.changed == ["numWorkers"]
    assert engine.config.num_workers == 15
    engine.update_config(num_workers=16)


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"dtype": torch.float16}, "cold", "dtype: needs a restart"),
        ({"dtype": "float16"}, "cold", "dtype: needs a restart"),
        ({"num_workers": 0}, "invalid", "num_workers: Input should be greater than or equal to 1, got 0"),
        ({"bogus": 1}, "invalid", "bogus"),
    ],
)
def test_refused_change_changes_nothing_and_names_the_field(
    engine: KVCacheEngine, changes: dict[str, Any], code: str, message: str
) -> None:
    before = engine.config
    with pytest.raises(ChangeRefusedError, match=message) as caught:
        engine.update_config(**changes)
    assert caught.value.code == code
    assert engine.config == before


def test_validation_and_health_status(engine: KVCacheEngine) -> None:
    assert engine.validate_configuration() == {"valid": True, "errors": [], "warnings": []}
    wrong = engine.validate_configuration({"num_workers": 900})
    assert not wrong["valid"]
    assert wrong["errors"] == ["num_workers: Input should be less than or equal to 128, got 900"]
    doubtful = engine.validate_configuration({"prefetch_size": 99})
    assert doubtful["warnings"] == ["prefetch_size: 99 blocks ahead; 64 or less is usual"]
    assert engine.get_health_status()["status"] == "healthy"


def test_model_that_contradicts_the_configuration_is_refused() -> None:
    with pytest.raises(StartError, match="num_heads"):
        KVCacheEngine(KVCacheConfig(dtype="float32", num_heads=3), inproc=True)


def test_truncated_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "model.safetensors").write_bytes((1000).to_bytes(8, "little") + b"{")
    with pytest.raises(ModelError, match=r"model\.safetensors is broken"):
        load_model(str(tmp_path), KVCacheConfig(dtype="float32"))


async def test_in_process_engine_shut_down_under_load_ends_every_request() -> None:
    config = KVCacheConfig(dtype="float32", num_workers=2, batch_size=2, max_queue=2)
    engine = KVCacheEngine(config, inproc=True)
    tasks = [
        asyncio.create_task(engine.process_request({"text": f"{i}", "max_length": 100})) for i in range(12)
    ]
    await when(engine, answering)
    engine.shutdown(60.0)
    engine.shutdown()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    for end in ends:
        assert isinstance(end, CoreUnavailableError) or end["output_tokens"] == 100
    assert any(isinstance(end, dict) for end in ends), "what was running must finish"
    with pytest.raises(CoreUnavailableError, match="the engine was shut down"):
        await engine.process_request({"text": "Too late"})
    assert engine.get_health_status()["status"] == "unhealthy"


async def test_requests_beyond_the_shutdown_timeout_get_an_error() -> None:
    engine = KVCacheEngine(ROOMY, inproc=True)
    tasks = [asyncio.create_task(engine.process_request(LONG)) for _ in range(3)]
    await when(engine, answering)
    await asyncio.to_thread(engine.shutdown, 0.2)
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(end) for end in ends} == {CoreUnavailableError}


async def test_engine_dropped_by_the_end_of_its_last_request_ends_itself() -> None:
    engine = KVCacheEngine(ROOMY, inproc=True)
    thread = engine._runtime.thread
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(engine.process_request(LONG), 0.2)
    del engine
    gc.collect()
    await asyncio.to_thread(thread.join, 60)
    assert not thread.is_alive()


@pytest.mark.slow
async def test_killed_core_ends_every_request_with_one_error() -> None:
    engine = KVCacheEngine(ROOMY.updated({"num_workers": 4, "max_queue": 1}))
    tasks = [asyncio.create_task(engine.process_request(LONG)) for _ in range(8)]
    await when(engine, lambda stats: stats["active_requests"] == 8 and answering(stats))
    psutil.Process(engine.core_pid).kill()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(end) for end in ends} == {CoreUnavailableError}
    assert {str(end) for end in ends} == {"the engine's core process ended unexpectedly (signal 9)"}
    assert "signal 9" in engine.get_health_status()["reason"]
    engine.shutdown()
