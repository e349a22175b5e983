"""What the Python API has measured: latencies and stages of its requests, beside the core's counters."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvpilot_engine.contract import metrics as names
from kvpilot_engine.contract.metrics import Stage
from kvpilot_engine.memory import memory_of
from kvpilot_engine.protocol import Finished, Sampled

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


@dataclass(frozen=True)
class Ended:
    """A request that ended well."""

    ids: list[int]
    finished: Finished
    latency_s: float
    first_token_s: float | None

    def result(self, text: str, session_id: str | None, priority: int) -> dict[str, Any]:
        """What the caller gets."""
        first = self.first_token_s
        return {
            "text": text,
            "tokens": list(self.ids),
            "finish_reason": self.finished.reason,
            "prompt_tokens": self.finished.prompt_tokens,
            "output_tokens": len(self.ids),
            "cached_tokens": self.finished.cached_tokens,
            "latency_ms": self.latency_s * 1000,
            "first_token_ms": None if first is None else first * 1000,
            "stages_ms": {stage: seconds * 1000 for stage, seconds in self.finished.stages.items()},
            "session_id": session_id,
            "priority": priority,
        }


class Statistics:
    """Accounts of one engine. To be used from one thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began_at = clock()
        self._total = 0
        self._failed = 0
        self._cancelled = 0
        self._ended: deque[tuple[float, Ended]] = deque(maxlen=WINDOW)

    def began(self) -> None:
        """A request arrived."""
        self._total += 1

    def failed(self) -> None:
        """It ended without a result."""
        self._failed += 1

    def cancelled(self) -> None:
        """Its caller wants no result any more: no failure of ours."""
        self._cancelled += 1

    def succeeded(self, ended: Ended) -> None:
        """It ended with one."""
        self._ended.append((self._clock(), ended))

    def report(self, sampled: Sampled, front_bytes: int, limit_bytes: int, on_gpu: bool) -> dict[str, Any]:
        """See ``KVCacheEngine.get_stats``."""
        ended = [each for _, each in self._ended]
        latencies = [each.latency_s * 1000 for each in ended]
        firsts = [each.first_token_s * 1000 for each in ended if each.first_token_s is not None]
        counters, gauges = sampled.counters, sampled.gauges
        queried = total(counters, names.QUERY_TOKENS_TOTAL)
        hit_rate = share(total(counters, names.HIT_TOKENS_TOTAL), queried)
        memory = memory_of(sampled, front_bytes, limit_bytes)
        lifetime = self._clock() - self._began_at
        busy = share(total(counters, names.STEP_BUSY_SECONDS_TOTAL), lifetime)
        return {
            "total_requests": self._total,
            "failed_requests": self._failed,
            "cancelled_requests": self._cancelled,
            "throughput": self._throughput(),
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
            "stages": _stages(ended),
            "engine": {**counters, **gauges},
        }

    def _throughput(self) -> float:
        now = self._clock()
        window = min(THROUGHPUT_WINDOW_S, now - self._began_at)
        recent = sum(at > now - THROUGHPUT_WINDOW_S for at, _ in self._ended)
        return recent / window if window > 0 else 0.0


def total(values: Mapping[str, float], name: str) -> float:
    """A metric's value, summed over its labels."""
    return sum(value for key, value in values.items() if key.partition("{")[0] == name)


def share(part: float, whole: float) -> float:
    """``part / whole``; 0.0 of nothing."""
    return part / whole if whole > 0 else 0.0


def _stages(ended: Sequence[Ended]) -> dict[str, dict[str, float]]:
    whole = sum(sum(each.finished.stages.values()) for each in ended)
    report = {}
    for stage in Stage:
        times = [each.finished.stages.get(stage.value, 0.0) * 1000 for each in ended]
        report[stage.value] = {
            "mean_ms": sum(times) / len(times) if times else 0.0,
            "p95_ms": percentile(times, 0.95),
            "share": share(sum(times) / 1000, whole),
        }
    return report
