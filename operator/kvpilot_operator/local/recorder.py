"""What was seen, look by look: the material of the table, the report, the figures and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvpilot_engine.contract import CATALOGUE, KVCacheConfig
from kvpilot_engine.contract.config import QUIET
from kvpilot_operator.loop import Look
from kvpilot_operator.tuning.decision import Objective, Record
from kvpilot_operator.tuning.objectives import ceiling, enough, hit_rate, rates
from kvpilot_operator.tuning.observation import Counts
from kvpilot_operator.tuning.policy import Objectives

MOST_POINTS = 5000
"""That are kept: almost three hours of every look at the fast pace, and several for each pixel of a chart."""

KNOBS: tuple[str, ...] = tuple(knob.resource_name for knob in CATALOGUE)


@dataclass(frozen=True)
class EngineState:
    """One replica at one look."""

    uid: str
    name: str
    ready: bool
    restarts: int
    generation: int | None
    knobs: Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """One look.

    Attributes:
        at: s since the epoch.
        quantiles: p50, p95, p99 of the judged latency over the short window, s, interpolated between edges:
            for people to look at, nothing is decided on them. Absent where too little was judged.
        stages: seconds by stage per judged request, short window.
        knobs: the last known good configuration's knobs, defaults filled in.
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
    engines: tuple[EngineState, ...]
    holds: tuple[str, ...]


class Recorder:
    """Telemetry of the loop that remembers. ``on_point`` and ``on_record`` are told at once.

    Attributes:
        points: of every ``looks_per_point``-th look and of the newest one, oldest first. Where they would be
            more than ``MOST_POINTS``, every second one is dropped, and so is every second look from then on.
    """

    def __init__(
        self,
        load_phase: Callable[[], str],
        on_point: Callable[[Point], None],
        on_record: Callable[[Record], None],
    ) -> None:
        self.points: list[Point] = []
        self.looks_per_point = 1
        self._looks = 0
        self.records: list[Record] = []
        self.objectives: Objectives | None = None
        self._load_phase = load_phase
        self._on_point = on_point
        self._on_record = on_record

    def step(self, name: str, seconds: float) -> None:
        """One step of a pass took that long; nothing is kept of it here."""

    def looked(self, look: Look) -> None:
        """A resource was looked at."""
        self.objectives = look.policy.objectives
        point = point_of(look, self._load_phase())
        self._keep(point)
        for record in look.decision.records:
            self.records.append(record)
            self._on_record(record)
        self._on_point(point)

    def _keep(self, point: Point) -> None:
        if (self._looks - 1) % self.looks_per_point:  # the look before was kept as the newest only
            self.points.pop()
        self.points.append(point)
        self._looks += 1
        if len(self.points) > MOST_POINTS:
            del self.points[1::2]
            self.looks_per_point *= 2


def point_of(look: Look, load_phase: str) -> Point:
    """What one look saw."""
    observation = look.observation
    counts = observation.counts("short")
    arrivals, completed = rates(observation, "short") if counts.pod_seconds else (0.0, 0.0)
    gauges = [pod.sample.gauges for pod in observation.ready if pod.sample is not None]
    promoted = observation.promoted
    state = look.decision.state
    return Point(
        at=observation.at,
        tuning=state.phase.value,
        load_phase=load_phase,
        objectives=look.decision.objectives,
        diagnosis=look.decision.diagnosis.message if look.decision.diagnosis is not None else "",
        quantiles=quantiles_of(counts, look.policy.objectives) if enough(counts) else {},
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
        engines=tuple(
            EngineState(
                uid=pod.uid,
                name=pod.name,
                ready=pod.ready,
                restarts=pod.restarts,
                generation=pod.engine.generation if pod.engine is not None else None,
                knobs=knobs_of(pod.engine.config) if pod.engine is not None else {},
            )
            for pod in observation.pods
            if not pod.terminating
        ),
        holds=tuple(hold.reason for hold in state.holds),
    )


def knobs_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """All knobs of a configuration, camelCase, defaults filled in."""
    config = KVCacheConfig.model_validate(dict(given), context=QUIET)
    values = config.model_dump(by_alias=True, mode="json")
    return {name: values[name] for name in KNOBS}


def quantiles_of(counts: Counts, objectives: Objectives) -> dict[str, float]:
    """p50, p95 and p99 by linear interpolation between the published edges, s.

    Requests that failed, and those beyond the last edge, count as at that edge.
    """
    within = counts.request_within if objectives.signal == "request" else counts.first_token_within
    found = {}
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
