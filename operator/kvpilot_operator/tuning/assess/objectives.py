"""Objectives against measurements.

Latency is judged by attainment at published edges, never by quantiles. Requests that wait and can no longer
be within the edge count as judged and late, so a queue is seen when it forms and not when it has been served.
A breach needs both windows. A short window with fewer than ``MIN_JUDGED`` judged requests is replaced by the
long one. An objective is Unknown if the long window holds fewer as well, or if there is no data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from operator import attrgetter

from kvpilot_operator.tuning.decision import Objective
from kvpilot_operator.tuning.observation import NO_COUNTS, Counts, Observation, gauges_of
from kvpilot_operator.tuning.policy import Objectives

MIN_JUDGED = 20
"""A window with fewer judged requests says nothing."""

THROUGHPUT_MARGIN = 0.9
"""Completions are compared with this share of the arrivals: requests in flight at the edges of a window make
the two differ."""

MET_TICKS = 3
"""Ticks in a row that prove that the latency objectives are met again."""


def judge(observation: Observation, wanted: Objectives, trusted: bool) -> tuple[Objective, ...]:
    """Every objective of the resource, in a fixed order."""
    nearest = judged_window(observation)
    short = observation.counts(nearest) if trusted else NO_COUNTS
    long = observation.counts("long") if trusted else NO_COUNTS
    return (
        *(
            _judged(name, required, *_attainment((short, long), wanted, edge, late(observation, edge)))
            for name, (edge, required) in wanted.latency.items()
        ),
        _throughput(observation, wanted, (nearest, "long"), known=enough(long)),
        _judged("errors", wanted.errors, _errors(short), _errors(long)),
        _hit_rate(wanted.hit_rate, short, long),
        _memory(observation, wanted.memory, trusted),
    )


def enough(counts: Counts) -> bool:
    """True if a window holds enough judged requests."""
    return counts.judged >= MIN_JUDGED


def judged_window(observation: Observation) -> str:
    """The window that shows the present: the short one, or the long one where that has too few requests."""
    return "short" if enough(observation.counts("short")) else "long"


def hit_rate(counts: Counts) -> float | None:
    """Prompt tokens served from the cache / prompt tokens looked up; None without them."""
    return _share(counts.hit_tokens, counts.query_tokens)


def ceiling(counts: Counts) -> float | None:
    """The hit rate that an infinite cache would have had; None if it is unknown."""
    return _share(counts.ceiling_tokens, counts.query_tokens)


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if whole and part is not None else None


def rates(observation: Observation, window: str) -> tuple[float, float]:
    """Arrivals/s and completions/s of the whole deployment: each replica over the time it was measured."""
    return arrival_rate(observation, window), _rate(observation, window, attrgetter("completed"))


def arrival_rate(observation: Observation, window: str) -> float:
    """Arrivals/s of the whole deployment."""
    return _rate(observation, window, attrgetter("arrivals"))


def overflow(observation: Observation, window: str) -> float:
    """Arrivals over requests that ended by no fault of the load; 2 if none did.

    What fails for another reason makes no queue longer.
    """
    arrivals = arrival_rate(observation, window)
    left = _rate(observation, window, attrgetter("left"))
    return arrivals / left if left else 1.0 if not arrivals else 2.0


def _rate(observation: Observation, window: str, number: Callable[[Counts], float]) -> float:
    """A count per second, of all replicas."""
    found = 0.0
    for replica in observation.ready:
        counts = replica.sample.windows.get(window) if replica.sample is not None else None
        if counts is not None and counts.replica_seconds > 0:
            found += number(counts) / counts.replica_seconds
    return found


def late(observation: Observation, edge_s: float) -> float:
    """Requests that wait behind more than their replica completes within ``edge_s``.

    This is Little's law on the queue, at the rate of the short window. A replica that completes nothing, or
    is not measured yet, shows no rate.
    """
    found = 0.0
    for replica in observation.ready:
        counts = replica.sample.windows.get("short") if replica.sample is not None else None
        if replica.sample is not None and counts is not None and counts.completed and counts.replica_seconds:
            served = edge_s * counts.completed / counts.replica_seconds
            found += max(0.0, replica.sample.gauges.waiting - served)
    return found


def backlog_gone(waiting: float, engines: int, workers: float) -> bool:
    """True if queues are as short as random arrivals leave them: half of the slots, or one per replica."""
    return waiting <= engines * max(1.0, workers / 2)


def shortfall(objective: Objective) -> float:
    """Distance from the target in the short window, 0 to 1; for a rate relative to the target."""
    measured = objective.measured_short
    if measured is None:
        return 0.0
    unit = objective.target if objective.name == "throughput" else 1.0
    return min(1.0, abs(objective.target - measured) / unit) if unit else 0.0


def latency_met(objectives: Iterable[Objective]) -> bool:
    """True if there are latency objectives and all of them hold on the short window."""
    latency = [item for item in objectives if item.kind.latency]
    return bool(latency) and all(
        item.measured_short is not None and item.meets(item.measured_short) for item in latency
    )


def met_again(ticks: Iterable[bool]) -> int | None:
    """Index of the tick at which the latency objectives are met again; None if that never happens.

    Args:
        ticks: for each tick in order of time, ``latency_met`` with the backlog gone.
    """
    in_row = 0
    for index, met in enumerate(ticks):
        in_row = in_row + 1 if met else 0
        if in_row == MET_TICKS:
            return index
    return None


def _judged(name: str, target: float, short: float | None, long: float | None) -> Objective:
    if short is None or long is None:
        return Objective(name, target, short, long, "Unknown")
    met = Objective(name, target, short, long, "Met")
    if met.meets(short) or met.meets(long):
        return met
    return replace(met, state="Breached", severity="breach")


def _attainment(
    windows: tuple[Counts, Counts], wanted: Objectives, edge: float, waiting: float
) -> Iterator[float | None]:
    for counts in windows:
        share = counts.attainment(wanted.signal, edge) if enough(counts) else None
        yield None if share is None else share * counts.judged / (counts.judged + waiting)


def _errors(counts: Counts) -> float | None:
    return counts.failed / counts.judged if enough(counts) else None


def _throughput(
    observation: Observation, wanted: Objectives, windows: tuple[str, str], *, known: bool
) -> Objective:
    """Breached while completions are below min(offered, target), critically while below the floor.

    The floor counts while at least that much is offered. An idle hour offers nothing and breaches nothing.
    """
    if not known:
        return Objective("throughput", wanted.throughput, None, None, "Unknown")
    both = short, long = [rates(observation, window) for window in windows]
    met = Objective("throughput", wanted.throughput, short[1], long[1], "Met")
    if all(done < wanted.floor <= THROUGHPUT_MARGIN * arrived for arrived, done in both):
        return replace(met, state="Breached", severity="critical")
    if all(done < THROUGHPUT_MARGIN * min(arrived, wanted.throughput) for arrived, done in both):
        return replace(met, state="Breached", severity="breach")
    return met


def _hit_rate(target: float, short: Counts, long: Counts) -> Objective:
    """A target above the ceiling of both windows is infeasible: no breach, no reason to grow the cache."""
    if not (enough(short) and enough(long)):
        return Objective("hitRate", target, None, None, "Unknown")
    judged = _judged("hitRate", target, hit_rate(short), hit_rate(long))
    ceilings = (ceiling(short), ceiling(long))
    if judged.state == "Breached" and all(top is not None and top < target for top in ceilings):
        return replace(judged, state="Infeasible", severity="")
    return judged


def _memory(observation: Observation, target: float, trusted: bool) -> Objective:
    """The worst ready replica; a gauge has one value for both windows."""
    ratios = [item.memory_ratio for item in gauges_of(observation.ready)]
    worst = max(ratios) if ratios and trusted else None
    return _judged("memory", target, worst, worst)
