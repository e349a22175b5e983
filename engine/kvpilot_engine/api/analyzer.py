"""PerformanceAnalyzer: the bottlenecks of an engine by its own measurements, each with figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from kvpilot_engine.api.stats import share
from kvpilot_engine.contract import KVCacheConfig, knob
from kvpilot_engine.contract import metrics as names
from kvpilot_engine.contract.knobs import GROWTH, QUOTA_GROWTH, SATURATED_BUSY, SATURATED_GAIN
from kvpilot_engine.contract.metrics import Stage, total
from kvpilot_engine.contract.wording import counted

_RELIEF = {
    Stage.ADMISSION_WAIT: "num_workers",
    Stage.BATCH_WAIT: "batch_size",
    Stage.TIER_LOAD: "prefetch_size",
    Stage.PREFILL: "max_step_tokens",
}
"""The knob whose increase by GROWTH relieves a stage."""


@dataclass(frozen=True)
class Targets:
    """What is good enough; the defaults are those of the production profile.

    Attributes:
        p50_ms, p95_ms, p99_ms: latency of a whole request.
        throughput: requests/s, judged only while requests wait.
        hit_rate, memory, errors: shares between 0 and 1.
    """

    p50_ms: float = 100.0
    p95_ms: float = 500.0
    p99_ms: float = 1000.0
    throughput: float = 50.0
    hit_rate: float = 0.70
    memory: float = 0.80
    errors: float = 0.01


class Measured(Protocol):
    """An engine that can be analysed."""

    @property
    def config(self) -> KVCacheConfig:
        """The configuration in force."""

    def get_stats(self) -> dict[str, Any]:
        """See ``KVCacheEngine.get_stats``."""


@dataclass(frozen=True)
class Finding:
    """One bottleneck and its remedy.

    Attributes:
        kind: latency_<stage>, low_hit_rate, high_memory, errors or low_throughput.
        excess: measured over target, or target over measured where more is better; the target is met up to 1.
        action: machine-readable remedy, such as ``num_workers=8``.
        evidence, remedy, impact: sentences with the figures.
    """

    kind: str
    excess: float
    value: float
    action: str
    evidence: str
    remedy: str
    impact: str

    @property
    def severity(self) -> str:
        """critical from 2 times the target, high from 1.2 times, else medium."""
        if self.excess >= 2.0:
            return "critical"
        return "high" if self.excess >= 1.2 else "medium"


class PerformanceAnalyzer:
    """Names the bottlenecks of an engine and what to do about each.

    Args:
        engine: a KVCacheEngine.
        targets: what is good enough; the production profile by default.
    """

    def __init__(self, engine: Measured, targets: Targets | None = None) -> None:
        self._engine = engine
        self._targets = targets or Targets()

    def identify_bottlenecks(self) -> list[dict[str, Any]]:
        """Figures that miss their targets, worst first; empty before the first request has ended.

        Each entry has ``type``, ``severity``, ``current_value`` and ``recommendation``.
        """
        return [
            {
                "type": each.kind,
                "severity": each.severity,
                "current_value": each.value,
                "recommendation": f"{each.evidence} {each.remedy}",
            }
            for each in self._findings(self._engine.get_stats())
        ]

    def get_optimization_recommendations(self) -> list[dict[str, Any]]:
        """Changes to make, most urgent first.

        Each entry has ``priority``, ``action``, ``description`` and ``expected_impact``.
        """
        return [
            {
                "priority": each.severity,
                "action": each.action,
                "description": each.remedy,
                "expected_impact": each.impact,
            }
            for each in self._findings(self._engine.get_stats())
        ]

    def generate_performance_report(self) -> dict[str, Any]:
        """``summary`` (figures), ``stages``, ``targets``, ``bottlenecks``, ``recommendations``, ``text``."""
        stats = self._engine.get_stats()
        findings = self._findings(stats)
        keys = (
            "total_requests", "failed_requests", "throughput", "p50_latency", "p95_latency", "p99_latency",
            "hit_rate", "hit_rate_ceiling", "memory_usage", "evictions", "preemptions", "step_utilization",
        )  # fmt: skip
        return {
            "summary": {key: stats[key] for key in keys},
            "stages": stats["stages"],
            "targets": vars(self._targets).copy(),
            "bottlenecks": [
                {"type": f.kind, "severity": f.severity, "current_value": f.value, "recommendation": f.remedy}
                for f in findings
            ],
            "recommendations": [{"action": f.action, "expected_impact": f.impact} for f in findings],
            "text": _text(stats, findings),
        }

    def _findings(self, stats: Mapping[str, Any]) -> list[Finding]:
        if stats["total_requests"] == 0:
            return []
        config, targets = self._engine.config, self._targets
        found = (
            _latency(stats, config, targets),
            _hit_rate(stats, config, targets),
            _memory(stats, config, targets),
            _errors(stats, targets),
            _throughput(stats, targets),
        )
        return sorted((each for each in found if each is not None), key=lambda each: -each.excess)


def _latency(stats: Mapping[str, Any], config: KVCacheConfig, targets: Targets) -> Finding | None:
    """The worst missed percentile, charged to the stage that takes most of the time."""
    judged = [
        (stats[f"{name}_latency"] / limit, name, stats[f"{name}_latency"], limit)
        for name, limit in (("p50", targets.p50_ms), ("p95", targets.p95_ms), ("p99", targets.p99_ms))
    ]
    excess, name, value, limit = max(judged)
    if excess <= 1.0:
        return None
    stage, spent = max(stats["stages"].items(), key=lambda item: item[1]["share"])
    evidence = (
        f"{name} is {value:.0f} ms (target {limit:.0f} ms); {stage} takes {spent['share']:.0%} of the time "
        f"of a request, {spent['mean_ms']:.1f} ms on average."
    )
    action, remedy = _stage_remedy(Stage(stage), stats, config)
    impact = f"at most {spent['mean_ms']:.1f} ms of {stats['avg_latency']:.1f} ms average latency"
    return Finding(f"latency_{stage}", excess, value, action, evidence, remedy, impact)


def _stage_remedy(stage: Stage, stats: Mapping[str, Any], config: KVCacheConfig) -> tuple[str, str]:
    if _saturated(stats) and stage is not Stage.TIER_LOAD:
        return "replicas+1", (
            f"The engine is saturated (busy {stats['step_utilization']:.0%}, one more sequence would add "
            f"{total(stats['engine'], names.STEP_MARGINAL_GAIN):.0%} tokens/s): add a replica."
        )
    if stage is Stage.TIER_LOAD and not config.enable_prefetch:
        return "enable_prefetch=True", "Turn enable_prefetch on, so that blocks are fetched ahead."
    if stage in _RELIEF:
        name = _RELIEF[stage]
        action, remedy = _raise(name, getattr(config, name), GROWTH)
        if stage is Stage.PREFILL:
            remedy += (
                f" {stats['hit_rate']:.0%} of prompt tokens come from the cache: longer prefixes help too."
            )
        return action, remedy
    if stage is Stage.PREEMPTED:
        action, remedy = _raise("max_tokens", config.max_tokens, QUOTA_GROWTH)
        lost = f"{counted(stats['preemptions'], 'sequence', 'lost its', 'lost their')} pages."
        return action, f"{lost} {remedy} Or admit fewer with num_workers."
    rows = share(total(stats["engine"], names.STEP_ROWS_TOTAL), total(stats["engine"], names.STEPS_TOTAL))
    return "max_length", (
        f"Steps hold {rows:.1f} sequences on average, so decoding is bound by the model itself: ask for "
        "fewer new tokens, or use a faster device."
    )


def _raise(name: str, now: int, factor: float) -> tuple[str, str]:
    """Action and remedy that raise a knob, within the bounds of the catalogue."""
    highest = int(knob(name).maximum or now)
    if now >= highest:
        return "replicas+1", f"{name} is at its upper bound ({now}): add a replica."
    more = min(highest, max(1, int(now * factor)))
    return f"{name}={more}", f"Raise {name} from {now} to {more}."


def _saturated(stats: Mapping[str, Any]) -> bool:
    gain = total(stats["engine"], names.STEP_MARGINAL_GAIN)
    return bool(stats["step_utilization"] >= SATURATED_BUSY and gain < SATURATED_GAIN)


def _hit_rate(stats: Mapping[str, Any], config: KVCacheConfig, targets: Targets) -> Finding | None:
    rate, ceiling = stats["hit_rate"], stats["hit_rate_ceiling"]
    if rate >= targets.hit_rate or not total(stats["engine"], names.QUERY_TOKENS_TOTAL):
        return None
    excess = targets.hit_rate / rate if rate else targets.hit_rate / 0.01
    evidence = f"Hit rate is {rate:.1%} (target {targets.hit_rate:.0%}); an infinite cache had {ceiling:.1%}."
    if ceiling < targets.hit_rate:
        remedy = "No cache size reaches the target with these prompts: share longer prefixes."
        return Finding(
            "low_hit_rate", 1.0, rate, "share_prefixes", evidence, remedy, f"none above {ceiling:.1%}"
        )
    if stats["evictions"] == 0:
        remedy = "Nothing was evicted, so a larger cache gains nothing: the misses are first occurrences."
        return Finding("low_hit_rate", 1.0, rate, "none", evidence, remedy, "none")
    action, remedy = _raise("max_tokens", config.max_tokens, QUOTA_GROWTH)
    impact = f"hit rate between {rate:.1%} and {ceiling:.1%}"
    remedy = f"{counted(stats['evictions'], 'page', 'was', 'were')} evicted. {remedy}"
    return Finding("low_hit_rate", excess, rate, action, evidence, remedy, impact)


def _memory(stats: Mapping[str, Any], config: KVCacheConfig, targets: Targets) -> Finding | None:
    used = stats["memory_usage"]
    if used <= targets.memory:
        return None
    cached = total(stats["engine"], names.CACHE_BYTES)
    evidence = (
        f"Memory is at {used:.0%} of its limit (target {targets.memory:.0%}), the cache holds "
        f"{cached / 2**20:.0f} MiB of {stats['memory_bytes'] / 2**20:.0f} MiB."
    )
    over = (used - targets.memory) * stats["memory_limit_bytes"]
    budget = int((cached - over) / 2**20)
    if budget < (knob("max_memory_mb").minimum or 0):
        action = "memory_limit"
        remedy = "A smaller cache is not enough: give the engine more memory."
    else:
        action = f"max_memory_mb={budget}"
        remedy = f"Set max_memory_mb to {budget}, or lower compression_ratio ({config.compression_ratio})."
    impact = f"{over / 2**20:.0f} MiB less"
    return Finding("high_memory", used / targets.memory, used, action, evidence, remedy, impact)


def _errors(stats: Mapping[str, Any], targets: Targets) -> Finding | None:
    judged = stats["total_requests"] - stats["cancelled_requests"]
    rate = stats["failed_requests"] / max(judged, 1)
    if rate <= targets.errors:
        return None
    evidence = (
        f"{stats['failed_requests']} of {counted(stats['total_requests'], 'request')} failed ({rate:.1%}, "
        f"target {targets.errors:.0%})."
    )
    remedy = "Read the exceptions: each names its reason; for timeouts, reduce the latency first."
    return Finding(
        "errors", rate / targets.errors, rate, "read_errors", evidence, remedy, f"{rate:.1%} fewer errors"
    )


def _throughput(stats: Mapping[str, Any], targets: Targets) -> Finding | None:
    """Judged only while requests wait: an idle engine misses nothing."""
    rate, waiting = stats["throughput"], stats["waiting"]
    if not waiting or not rate or rate >= targets.throughput:
        return None
    evidence = f"{rate:.1f} requests/s (target {targets.throughput:.0f}) while {waiting} wait."
    busy = stats["step_utilization"]
    if _saturated(stats):
        action, remedy = (
            "replicas+1",
            f"The engine is busy {busy:.0%} of the time and saturated: add a replica.",
        )
    else:
        action = "batch_size"
        remedy = f"The engine is busy {busy:.0%} of the time: raise batch_size and num_workers."
    return Finding(
        "low_throughput", targets.throughput / rate, rate, action, evidence, remedy, "shorter queue"
    )


def _text(stats: Mapping[str, Any], findings: list[Finding]) -> str:
    lines = [
        f"{counted(stats['total_requests'], 'request')}, {stats['failed_requests']} failed, "
        f"{stats['throughput']:.1f}/s over the last minute",
        f"latency p50 {stats['p50_latency']:.1f} ms, p95 {stats['p95_latency']:.1f} ms, "
        f"p99 {stats['p99_latency']:.1f} ms",
        f"hit rate {stats['hit_rate']:.1%} of at most {stats['hit_rate_ceiling']:.1%}; "
        f"{counted(stats['evictions'], 'page')} evicted; memory {stats['memory_usage']:.1%} of its limit",
        "stages: "
        + ", ".join(
            f"{name} {each['mean_ms']:.1f} ms" for name, each in stats["stages"].items() if each["share"]
        ),
    ]
    if not stats["total_requests"]:
        return "Nothing was measured yet: no request has ended."
    if not findings:
        lines.append("Every target is met.")
    lines += [f"[{each.severity}] {each.evidence} {each.remedy}" for each in findings]
    return "\n".join(lines)
