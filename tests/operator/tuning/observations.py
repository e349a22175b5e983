"""Observations as they were recorded: a few figures per pod, the rest follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tests.operator.tuning.policies import policy_of

from kvpilot_engine.contract.metrics import EDGES_S, ROW_BUCKETS
from kvpilot_operator.tuning.context import Context
from kvpilot_operator.tuning.decide import assess
from kvpilot_operator.tuning.observation import (
    Counts,
    EngineView,
    Gauges,
    Observation,
    ObservedReplica,
    Promoted,
    Sample,
    SourceProblem,
)
from kvpilot_operator.tuning.policy import Policy

NOW = 10_000.0
GOOD = {"p50": 0.9, "p95": 0.99, "p99": 1.0}
BAD = {"p50": 0.2, "p95": 0.41, "p99": 0.6}
FAST_STAGES = {"prefill": 0.02, "decode": 0.06}
WINDOWS = {"short": 10.0, "long": 60.0}
MIB = 2**20
DOWN = SourceProblem("MetricsUnavailable", "prometheus default: timed out")


def counts(
    seconds: float,
    *,
    rate: float = 20.0,
    done: float = 1.0,
    attained: Mapping[str, float] = GOOD,
    stages: Mapping[str, float] = FAST_STAGES,
    shed: float = 0.0,
    busy: float = 0.3,
    hit: float = 0.8,
    ceiling: float = 0.9,
    evicted: float = 0.0,
    prefetched: tuple[float, float] = (0.0, 0.0),
    codec: float = 0.0,
    step_tokens: float = 20.0,
    errors: float = 0.0,
    too_large: float = 0.0,
    rows: int = 1,
    row_rate: float = 0.0,
) -> Counts:
    """One engine over ``seconds``: rates per s, stages in s per request, ``codec`` s of decoding per request.

    ``attained``: share within 0.1, 0.5 and 1 s of the judged requests; ``done``: completions per arrival;
    ``errors``: share of the ended ones that failed; ``too_large``: those that a quota was too small for, per
    ended one. With a ``row_rate`` all steps have ``rows`` rows, and
    advance so many row-steps per second of stepping; without one the runtime reports no buckets of rows.
    """
    arrivals = rate * seconds
    ended = arrivals * done
    edges = {"p50": 0.1, "p95": 0.5, "p99": 1.0}
    within = {
        edge: ended * (1 + shed) * max((attained[n] for n, e in edges.items() if e <= edge), default=0.0)
        for edge in EDGES_S
    }
    tokens = ended * 100
    steps = max(1.0, tokens * (1 - hit) / step_tokens)
    stepped = row_rate * busy * seconds
    return Counts(
        replica_seconds=seconds,
        arrivals=arrivals,
        outcomes={
            "ok": ended * (1 - errors),
            "shed": ended * shed,
            "error": ended * errors,
            **({"too_large": ended * too_large} if too_large else {}),
        },
        request_within=within,
        first_token_within=within,
        stage_seconds={name: each * ended * (1 - errors) for name, each in stages.items()},
        query_tokens=tokens,
        hit_tokens=tokens * hit,
        ceiling_tokens=tokens * ceiling,
        evicted_pages=evicted * ended,
        prefetch_used=prefetched[0] * ended,
        prefetch_wasted=prefetched[1] * ended,
        decode_seconds=codec * ended,
        busy_seconds=busy * seconds,
        steps=stepped / rows if stepped else steps,
        step_rows=stepped or steps,
        bucket_rows={rows: stepped} if stepped else {},
        bucket_seconds={rows: busy * seconds} if stepped else {},
    )


def replica(
    name: str = "chat-0",
    *,
    config: Mapping[str, Any] | None = None,
    generation: int = 1,
    epoch: int = 0,
    gauges: Gauges | None = None,
    verify: Mapping[str, Any] | None = None,
    seconds: float = 45.0,
    ceilings: Mapping[str, int] | None = None,
    **figures: Any,
) -> ObservedReplica:
    """A ready pod whose windows show ``figures`` (see ``counts``); ``verify`` overrides them there."""
    windows = {window: counts(length, **figures) for window, length in WINDOWS.items()}
    if verify is not None:
        windows["verify"] = counts(seconds, **{**figures, **verify})
    base = Gauges(
        memory_ratio=0.4, cached_bytes=200 * MIB, budget_bytes=256 * MIB, memory_limit_bytes=1000 * MIB
    )
    view = EngineView(name, generation, epoch, dict(config or {}), False, dict(ceilings or {}))
    sample = Sample(windows=windows, gauges=gauges or base, age_s=0.5, coverage_s=60.0)
    return ObservedReplica(f"uid-{name}", name, True, engine=view, sample=sample)


def gauges(**changes: Any) -> Gauges:
    """Gauges of a calm engine, with changes."""
    calm = Gauges(
        memory_ratio=0.4, cached_bytes=200 * MIB, budget_bytes=256 * MIB, memory_limit_bytes=1000 * MIB
    )
    return replace(calm, **changes)


def curve(base: float = 0.016, per_row: float = 0.0008) -> dict[int, float]:
    """Seconds of a decode step by rows: ``base + per_row x rows``."""
    return {rows: base + per_row * rows for rows in ROW_BUCKETS[:6]}


def observe(
    *replicas: ObservedReplica, config: Mapping[str, Any] | None = None, **changes: Any
) -> Observation:
    """Pods that all run ``config``, which is the user's and the promoted one."""
    config = dict(config or {})
    configured = tuple(
        replace(item, engine=replace(item.engine, config={**config, **item.engine.config}))
        if item.engine is not None
        else item
        for item in replicas
    )
    given: dict[str, Any] = {
        "at": NOW,
        "replicas": configured,
        "base": config,
        "promoted": Promoted(1, config),
        "desired_replicas": len(replicas),
        **changes,
    }
    return Observation(**given)


def three(**figures: Any) -> tuple[ObservedReplica, ...]:
    """Three pods alike."""
    return many(3, **figures)


def many(number: int, **figures: Any) -> tuple[ObservedReplica, ...]:
    """So many pods alike."""
    return tuple(replica(f"chat-{index}", **figures) for index in range(number))


def context_of(observation: Observation, policy: Policy | None = None) -> Context:
    """The context that rules get."""
    return assess(observation, policy or policy_of(), NOW)
