"""The figures of ``KVCacheEngine.get_stats``, from the front's account and a sample of the core."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from kvpilot_engine.contract import metrics as names
from kvpilot_engine.contract.metrics import Outcome, Stage, total
from kvpilot_engine.frontend.account import Account, Completed
from kvpilot_engine.ipc.messages import Sampled
from kvpilot_engine.memory import Memory

WINDOW = 10_000
"""Requests behind the percentiles."""

THROUGHPUT_WINDOW_S = 60.0


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value with at least ``share`` of all at or below it (nearest rank); 0.0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    rank = -int(-share * len(ordered) // 1)  # ceiling
    return ordered[max(0, min(len(ordered), rank) - 1)]


def report(account: Account, sampled: Sampled, memory: Memory, on_gpu: bool) -> dict[str, Any]:
    """See ``KVCacheEngine.get_stats``."""
    latencies = [each.latency_s * 1000 for each in account.recent]
    firsts = [each.first_token_s * 1000 for each in account.recent if each.first_token_s is not None]
    counters, gauges = sampled.counters, sampled.gauges
    queried = total(counters, names.QUERY_TOKENS_TOTAL)
    hit_rate = share(total(counters, names.HIT_TOKENS_TOTAL), queried)
    lifetime_s = time.monotonic() - account.began_at
    busy = share(total(counters, names.STEP_BUSY_SECONDS_TOTAL), lifetime_s)
    good_or_cancelled = {Outcome.OK, Outcome.CANCELLED}
    return {
        "total_requests": account.arrivals,
        "failed_requests": sum(n for kind, n in account.outcomes.items() if kind not in good_or_cancelled),
        "cancelled_requests": account.outcomes[Outcome.CANCELLED],
        "throughput": _throughput(account, lifetime_s),
        "hit_rate": hit_rate,
        "miss_rate": 1.0 - hit_rate if queried else 0.0,
        "hit_rate_ceiling": share(total(counters, names.CEILING_TOKENS_TOTAL), queried),
        "avg_latency": sum(latencies) / len(latencies) if latencies else 0.0,
        "p50_latency": percentile(latencies, 0.50),
        "p95_latency": percentile(latencies, 0.95),
        "p99_latency": percentile(latencies, 0.99),
        "p50_first_token": percentile(firsts, 0.50),
        "memory_usage": memory.ratio,
        "memory_bytes": memory.host_bytes + memory.device_bytes,
        "memory_limit_bytes": memory.host_limit_bytes,
        "gpu_utilization": busy if on_gpu else 0.0,
        "step_utilization": busy,
        "evictions": int(total(counters, names.EVICTED_PAGES_TOTAL)),
        "preemptions": int(total(counters, names.PREEMPTIONS_TOTAL)),
        "waiting": int(total(gauges, names.REQUESTS_WAITING)),
        "running": int(total(gauges, names.REQUESTS_RUNNING)),
        "stages": _stages(account.recent),
        "engine": {**counters, **gauges},
    }


def _throughput(account: Account, lifetime_s: float) -> float:
    """Completions per second over the last minute, or since the start."""
    since = time.monotonic() - THROUGHPUT_WINDOW_S
    recent = sum(each.at > since for each in account.recent)
    return share(recent, min(THROUGHPUT_WINDOW_S, lifetime_s))


def share(part: float, whole: float) -> float:
    """``part / whole``; 0.0 if ``whole`` is 0."""
    return part / whole if whole > 0 else 0.0


def _stages(completed: Iterable[Completed]) -> dict[str, dict[str, float]]:
    spent = {stage: [each.stages.get(stage, 0.0) * 1000 for each in completed] for stage in Stage}
    whole_ms = sum(map(sum, spent.values()))
    return {
        stage.value: {
            "mean_ms": sum(times) / len(times) if times else 0.0,
            "p95_ms": percentile(times, 0.95),
            "share": share(sum(times), whole_ms),
        }
        for stage, times in spent.items()
    }
