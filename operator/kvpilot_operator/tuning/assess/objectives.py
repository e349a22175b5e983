"""Objectives against measurements.

Latency is judged by attainment at published edges, never by quantiles. A breach needs both windows. A short
window with fewer than ``FEW`` judged requests says nothing and is widened to the long one; fewer than that in
the long window are Unknown, and so is everything without data.
"""

from __future__ import annotations

from kvpilot_operator.tuning.decision import Objective
from kvpilot_operator.tuning.observation import Counts, Observation
from kvpilot_operator.tuning.policy import Objectives

FEW = 20
"""Judged requests below which a window says nothing."""

THROUGHPUT_MARGIN = 0.9
"""Requests in flight at the edges of a window make completions differ from arrivals; a tenth counts."""


def judge(observation: Observation, wanted: Objectives, trusted: bool) -> tuple[Objective, ...]:
    """Every objective of the resource, in a fixed order."""
    nearest = judged_window(observation)
    short = observation.counts(nearest) if trusted else Counts()
    long = observation.counts("long") if trusted else Counts()
    return (
        *(
            _judged(name, required, *(_attainment(c, wanted, edge) for c in (short, long)), below=True)
            for name, (edge, required) in wanted.latency.items()
        ),
        _throughput(observation, wanted, (nearest, "long"), known=enough(long)),
        _judged("errors", wanted.errors, _errors(short), _errors(long), below=False),
        _hit_rate(wanted.hit_rate, short, long),
        _memory(observation, wanted.memory, trusted),
    )


def enough(counts: Counts) -> bool:
    """True when a window says something about requests."""
    return counts.judged >= FEW


def judged_window(observation: Observation) -> str:
    """The window that says how it is now: the short one, or the long one where that has too few requests."""
    return "short" if enough(observation.counts("short")) else "long"


def hit_rate(counts: Counts) -> float | None:
    """Prompt tokens served from the cache / prompt tokens looked up."""
    return counts.hit_tokens / counts.query_tokens if counts.query_tokens else None


def ceiling(counts: Counts) -> float | None:
    """The hit rate that an infinite cache would have had."""
    return counts.ceiling_tokens / counts.query_tokens if counts.query_tokens else None


def rates(observation: Observation, window: str) -> tuple[float, float]:
    """Arrivals/s and completions/s of the whole deployment: each pod over the time it was measured."""
    arrivals = completed = 0.0
    for pod in observation.ready:
        counts = pod.sample.windows.get(window) if pod.sample is not None else None
        if counts is not None and counts.pod_seconds > 0:
            arrivals += counts.arrivals / counts.pod_seconds
            completed += counts.completed / counts.pod_seconds
    return arrivals, completed


def backlog_gone(waiting: float, engines: int, workers: int) -> bool:
    """True when queues are what random arrivals leave: half of the worker slots, or one per engine."""
    return waiting <= engines * max(1.0, workers / 2)


def shortfall(objective: Objective) -> float:
    """How far a breached objective is missed in the short window, 0 to 1; a rate relative to its target."""
    measured = objective.measured_short
    if measured is None:
        return 0.0
    unit = objective.target if objective.name == "throughput" else 1.0
    return min(1.0, abs(objective.target - measured) / unit) if unit else 0.0


def _judged(name: str, target: float, short: float | None, long: float | None, *, below: bool) -> Objective:
    if short is None or long is None:
        return Objective(name, target, short, long, "Unknown")
    missed = (short < target and long < target) if below else (short > target and long > target)
    return Objective(name, target, short, long, "Breached" if missed else "Met")


def _attainment(counts: Counts, wanted: Objectives, edge: float) -> float | None:
    return counts.attainment(wanted.signal, edge) if enough(counts) else None


def _errors(counts: Counts) -> float | None:
    return counts.failed / counts.judged if enough(counts) else None


def _throughput(
    observation: Observation, wanted: Objectives, windows: tuple[str, str], *, known: bool
) -> Objective:
    """Breached when completions fall behind min(offered, target) by more than the margin.

    The floor has no margin: while at least that much is offered, at least that much must be completed. An
    idle hour offers nothing, so it breaches nothing.
    """
    if not known:
        return Objective("throughput", wanted.throughput, None, None, "Unknown")
    (now, behind), (late, before) = (_behind(observation, wanted, window) for window in windows)
    return Objective("throughput", wanted.throughput, now, late, "Breached" if behind and before else "Met")


def _behind(observation: Observation, wanted: Objectives, window: str) -> tuple[float, bool]:
    """Completions/s, and whether they fall behind."""
    offered, completed = rates(observation, window)
    behind = completed < THROUGHPUT_MARGIN * min(offered, wanted.throughput)
    return completed, behind or completed < wanted.floor <= offered * THROUGHPUT_MARGIN


def _hit_rate(target: float, short: Counts, long: Counts) -> Objective:
    """A target above the ceiling of both windows is out of reach: no reason to grow, and no breach."""
    if not (enough(short) and enough(long)):
        return Objective("hitRate", target, None, None, "Unknown")
    judged = _judged("hitRate", target, hit_rate(short), hit_rate(long), below=True)
    ceilings = (ceiling(short), ceiling(long))
    if judged.state == "Breached" and all(top is not None and top < target for top in ceilings):
        return Objective("hitRate", target, judged.measured_short, judged.measured_long, "Infeasible")
    return judged


def _memory(observation: Observation, target: float, trusted: bool) -> Objective:
    """The worst ready engine; a gauge has one value for both windows."""
    ratios = [pod.sample.gauges.memory_ratio for pod in observation.ready if pod.sample is not None]
    worst = max(ratios) if ratios and trusted else None
    return _judged("memory", target, worst, worst, below=False)
