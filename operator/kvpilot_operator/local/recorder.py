"""Records each reconcile: the data of the display, the report, the figures and the check."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvpilot_engine.contract import KVCacheConfig
from kvpilot_engine.contract.config import QUIET
from kvpilot_operator.reconcile.reconciler import Reconciliation
from kvpilot_operator.tuning.assess.objectives import ceiling, enough, hit_rate, rates
from kvpilot_operator.tuning.configuration import KNOBS
from kvpilot_operator.tuning.decision import Objective, Record
from kvpilot_operator.tuning.observation import Counts, gauges_of
from kvpilot_operator.tuning.policy import Objectives

MAX_POINTS = 5000
"""Points kept: almost three hours of every reconcile at the fast pace, several for each pixel of a chart."""


@dataclass(frozen=True)
class ReplicaPoint:
    """One replica at one reconcile."""

    uid: str
    name: str
    ready: bool
    restarts: int
    generation: int | None
    knobs: Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """Figures of one reconcile.

    Attributes:
        at: s since the epoch.
        quantiles: p50, p95, p99 of the judged latency over the short window, s, interpolated between edges;
            for display only, no decision uses them. Absent if too few requests were judged.
        stages: seconds by stage per judged request over the short window.
        arrivals, completed: requests/s over the short window.
        hit_rate, ceiling, memory: shares from 0 to 1; None if unknown.
        knobs: knobs of the promoted configuration, with defaults.
    """

    at: float
    tuning: str
    load_phase: str
    objectives: tuple[Objective, ...]
    diagnosis: str
    quantiles: Mapping[str, float]
    stages: Mapping[str, float]
    arrivals: float
    completed: float
    hit_rate: float | None
    ceiling: float | None
    memory: float | None
    waiting: float
    running: float
    generation: int
    knobs: Mapping[str, Any]
    replicas: tuple[ReplicaPoint, ...]
    holds: tuple[str, ...]


class Recorder:
    """Telemetry that keeps points and records in memory, and passes each new one to its listener.

    Attributes:
        points: of every ``reconciles_per_point``-th reconcile and of the newest, oldest first. Above
            ``MAX_POINTS`` every second one is dropped, and ``reconciles_per_point`` doubles.
    """

    def __init__(
        self,
        load_phase: Callable[[], str],
        on_point: Callable[[Point], None],
        on_record: Callable[[Record], None],
    ) -> None:
        self.points: list[Point] = []
        self.reconciles_per_point = 1
        self._reconciles = 0
        self.records: list[Record] = []
        self.objectives: Objectives | None = None
        self._load_phase = load_phase
        self._on_point = on_point
        self._on_record = on_record

    def step(self, name: str, seconds: float) -> None:
        """Ignore the duration of a step."""

    def reconciled(self, result: Reconciliation) -> None:
        """Keep the point and the records of a reconcile."""
        self.objectives = result.policy.objectives
        point = point_of(result, self._load_phase())
        self._keep(point)
        for record in result.decision.records:
            self.records.append(record)
            self._on_record(record)
        self._on_point(point)

    def _keep(self, point: Point) -> None:
        if (self._reconciles - 1) % self.reconciles_per_point:  # the last point was kept only as the newest
            self.points.pop()
        self.points.append(point)
        self._reconciles += 1
        if len(self.points) > MAX_POINTS:
            del self.points[1::2]
            self.reconciles_per_point *= 2


def point_of(result: Reconciliation, load_phase: str) -> Point:
    """The figures of one reconcile."""
    observation = result.observation
    counts = observation.counts("short")
    arrivals, completed = rates(observation, "short") if counts.replica_seconds else (0.0, 0.0)
    gauges = gauges_of(observation.ready)
    promoted = observation.promoted
    state = result.decision.state
    return Point(
        at=observation.at,
        tuning=state.phase.value,
        load_phase=load_phase,
        objectives=result.decision.objectives,
        diagnosis=result.decision.diagnosis.message if result.decision.diagnosis is not None else "",
        quantiles=quantiles_of(counts, result.policy.objectives) if enough(counts) else {},
        stages={stage: total / counts.judged for stage, total in counts.stage_seconds.items()}
        if counts.judged
        else {},
        arrivals=arrivals,
        completed=completed,
        hit_rate=hit_rate(counts),
        ceiling=ceiling(counts),
        memory=max((g.memory_ratio for g in gauges), default=None),
        waiting=sum(g.waiting for g in gauges),
        running=sum(g.running for g in gauges),
        generation=promoted.generation if promoted is not None else 0,
        knobs=knobs_of(promoted.config) if promoted is not None else {},
        replicas=tuple(
            ReplicaPoint(
                uid=replica.uid,
                name=replica.name,
                ready=replica.ready,
                restarts=replica.restarts,
                generation=replica.engine.generation if replica.engine is not None else None,
                knobs=knobs_of(replica.engine.config) if replica.engine is not None else {},
            )
            for replica in observation.replicas
            if not replica.terminating
        ),
        holds=tuple(hold.reason for hold in state.holds),
    )


def knobs_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """All knobs of a configuration in camelCase, with defaults."""
    config = KVCacheConfig.model_validate(dict(given), context=QUIET)
    values = config.model_dump(by_alias=True, mode="json")
    return {name: values[name] for name in KNOBS}


def quantiles_of(counts: Counts, objectives: Objectives) -> dict[str, float]:
    """p50, p95 and p99 by linear interpolation between the published edges, s; none without a histogram.

    Failed requests, and those beyond the last edge, count at the last edge.
    """
    within, found = counts.within(objectives.signal), dict[str, float]()
    if within is None:
        return found
    for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        rank = share * counts.judged
        below, low = 0.0, 0.0
        for edge, total in sorted(within.items()):
            if total >= rank:
                found[name] = low + (edge - low) * (rank - below) / (total - below)
                break
            below, low = total, edge
        else:
            found[name] = max(within, default=0.0)
    return found
