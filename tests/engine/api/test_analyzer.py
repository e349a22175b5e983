"""PerformanceAnalyzer: on recorded figures, case by case, and on a real engine."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvpilot_engine import KVCacheConfig, KVCacheEngine, PerformanceAnalyzer
from kvpilot_engine.api.analyzer import Targets
from kvpilot_engine.contract import metrics as names
from kvpilot_engine.contract.metrics import Stage, total

pytestmark = pytest.mark.timeout(300)  # the first test of a session waits until an engine has started


class Recorded:
    """An engine with recorded figures."""

    def __init__(self, stage: str = "decode", **figures: Any) -> None:
        self.config = KVCacheConfig(num_workers=4, batch_size=2, prefetch_size=4, max_tokens=4096)
        stages = {each.value: {"mean_ms": 1.0, "p95_ms": 2.0, "share": 0.02} for each in Stage}
        stages[stage] = {"mean_ms": 90.0, "p95_ms": 400.0, "share": 0.9}
        engine = {
            "kvpilot_prefix_query_tokens_total": {"": 1000.0}, "kvpilot_step_marginal_gain": {"": 0.5},
            "kvpilot_steps_total": {"": 100.0}, "kvpilot_step_rows_total": {"": 180.0},
            "kvpilot_cache_bytes": {"pool": 900 * 2.0**20}, **figures.pop("engine", {}),
        }  # fmt: skip
        self._stats: dict[str, Any] = {
            "total_requests": 100, "failed_requests": 0, "cancelled_requests": 0,
            "throughput": 80.0, "avg_latency": 95.0,
            "p50_latency": 50.0, "p95_latency": 100.0, "p99_latency": 200.0, "hit_rate": 0.8,
            "hit_rate_ceiling": 0.9, "evictions": 0, "preemptions": 0, "memory_usage": 0.3,
            "memory_bytes": 2**30, "memory_limit_bytes": 2**31, "waiting": 0, "step_utilization": 0.5,
            "stages": stages, "engine": engine, **figures,
        }  # fmt: skip

    def get_stats(self) -> dict[str, Any]:
        return self._stats


SLOW = {"p95_latency": 1200.0}
SATURATED = {"step_utilization": 0.97, "engine": {"kvpilot_step_marginal_gain": {"": 0.03}}}


@pytest.mark.parametrize(
    ("recorded", "kind", "severity", "action", "figures"),
    [
        (
            Recorded("admission_wait", **SLOW),
            "latency_admission_wait",
            "critical",
            "num_workers=8",
            ["1200 ms", "90%"],
        ),
        (Recorded("batch_wait", **SLOW), "latency_batch_wait", "critical", "batch_size=4", ["from 2 to 4"]),
        (Recorded("tier_load", **SLOW), "latency_tier_load", "critical", "prefetch_size=8", ["from 4 to 8"]),
        (
            Recorded("prefill", p50_latency=110.0),
            "latency_prefill",
            "medium",
            "max_step_tokens=1024",
            ["110 ms", "80%"],
        ),
        (Recorded("decode", p50_latency=150.0), "latency_decode", "high", "max_length", ["1.8 sequences"]),
        (
            Recorded("preempted", preemptions=9, **SLOW),
            "latency_preempted",
            "critical",
            "max_tokens=6144",
            ["9 sequences"],
        ),
        (
            Recorded("batch_wait", **SLOW, **SATURATED),
            "latency_batch_wait",
            "critical",
            "replicas+1",
            ["97%", "3%"],
        ),
        (
            Recorded(hit_rate=0.5, evictions=7),
            "low_hit_rate",
            "high",
            "max_tokens=6144",
            ["50.0%", "90.0%", "7 pages"],
        ),
        (
            Recorded(hit_rate=0.1, hit_rate_ceiling=0.2, evictions=7),
            "low_hit_rate",
            "medium",
            "share_prefixes",
            ["20.0%"],
        ),
        (Recorded(hit_rate=0.5), "low_hit_rate", "medium", "none", ["Nothing was evicted"]),
        (
            Recorded(memory_usage=0.9),
            "high_memory",
            "medium",
            "max_memory_mb=695",
            ["90%", "900 MiB of 1024 MiB"],
        ),
        (Recorded(failed_requests=5), "errors", "critical", "read_errors", ["5 of 100", "5.0%"]),
        (
            Recorded(throughput=20.0, waiting=9),
            "low_throughput",
            "critical",
            "batch_size",
            ["20.0 requests/s", "9 wait"],
        ),
    ],
)
def test_bottleneck_and_remedy_state_their_figures(
    recorded: Recorded, kind: str, severity: str, action: str, figures: list[str]
) -> None:
    analyzer = PerformanceAnalyzer(recorded)
    (bottleneck,) = analyzer.identify_bottlenecks()
    (advice,) = analyzer.get_optimization_recommendations()
    assert (bottleneck["type"], bottleneck["severity"]) == (kind, severity)
    assert set(bottleneck) == {"type", "severity", "current_value", "recommendation"}
    assert set(advice) == {"priority", "action", "description", "expected_impact"}
    assert advice["action"] == action
    for figure in figures:
        assert figure in bottleneck["recommendation"]
        assert figure in analyzer.generate_performance_report()["text"]


@pytest.mark.parametrize(
    ("stage", "config", "action"),
    [
        ("admission_wait", {"num_workers": 128}, "replicas+1"),
        ("preempted", {"max_tokens": 65536}, "replicas+1"),
        ("preempted", {"max_tokens": 60000}, "max_tokens=65536"),
        ("tier_load", {"enable_prefetch": False}, "enable_prefetch=True"),
    ],
)
def test_no_remedy_goes_beyond_a_bound_or_has_no_effect(
    stage: str, config: dict[str, Any], action: str
) -> None:
    recorded = Recorded(stage, **SLOW)
    recorded.config = recorded.config.updated(config)
    (advice,) = PerformanceAnalyzer(recorded).get_optimization_recommendations()
    assert advice["action"] == action


def test_cache_at_its_minimum_is_not_advised_to_shrink() -> None:
    recorded = Recorded(memory_usage=0.9, engine={"kvpilot_cache_bytes": {"pool": 90 * 2.0**20}})
    (advice,) = PerformanceAnalyzer(recorded).get_optimization_recommendations()
    assert advice["action"] == "memory_limit"


def test_engine_that_meets_its_targets_or_is_idle_has_no_bottleneck() -> None:
    assert PerformanceAnalyzer(Recorded()).identify_bottlenecks() == []
    assert "Every target is met." in PerformanceAnalyzer(Recorded()).generate_performance_report()["text"]
    idle = PerformanceAnalyzer(Recorded(total_requests=0, hit_rate=0.0))
    assert idle.get_optimization_recommendations() == []
    assert idle.generate_performance_report()["text"].startswith("Nothing was measured yet")
    assert PerformanceAnalyzer(Recorded(throughput=1.0)).identify_bottlenecks() == [], "idle is no breach"


def test_bottlenecks_are_sorted_by_severity() -> None:
    recorded = Recorded("batch_wait", p95_latency=600.0, failed_requests=50)
    kinds = [each["type"] for each in PerformanceAnalyzer(recorded).identify_bottlenecks()]
    assert kinds == ["errors", "latency_batch_wait"]


async def test_following_the_advice_shortens_the_wait_of_a_real_engine(engine: KVCacheEngine) -> None:
    """One worker slot, forty requests: the analyzer names num_workers, and its advice shortens the wait.

    By the steps that the last of them waits: the seconds of a step depend on what else the machine does.
    """
    engine.update_config(num_workers=1)

    async def burst() -> float:
        before = total(engine.get_stats()["engine"], names.STEPS_TOTAL)
        requests = [{"text": f"Burst {i} of forty", "max_length": 8} for i in range(40)]
        await asyncio.gather(*map(engine.process_request, requests))
        return total(engine.get_stats()["engine"], names.STEPS_TOTAL) - before

    narrow = await burst()
    assert narrow == 40 * 8
    analyzer = PerformanceAnalyzer(engine, Targets(p50_ms=1.0, hit_rate=0.0))
    advice = analyzer.get_optimization_recommendations()[0]
    assert advice["action"] == "num_workers=2", advice
    engine.update_config(num_workers=16)
    assert await burst() < narrow / 2
