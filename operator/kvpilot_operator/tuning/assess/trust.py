"""Trust in measurements, replica by replica, and what the trusted ones permit.

Missing data is never taken for zero. More capacity and relief of memory need only replicas that can be
trusted and that show the need; tuning and scale-in need nearly all of them. Messages hold no live figures, so
that a hold that continues does not rewrite the status.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.observation import (
    NO_COUNTS,
    EngineProblem,
    Observation,
    ObservedReplica,
)
from kvpilot_operator.tuning.pace import MAX_SCRAPE_S, MIN_SCRAPES
from kvpilot_operator.tuning.policy import Policy

STALE_SCRAPES = 3
"""Age of metrics in scrapes at most."""

COVERAGE = 0.8
"""A replica that was measured for a smaller share of the long window is too young to be judged."""

YOUNG = "measured for too short a time"
"""Clause of such a replica."""

NEARLY_ALL = 0.9
"""Share of the ready replicas that tuning and scale-in need to trust."""

Found = tuple[str, str]
"""A reason and its message."""


@dataclass(frozen=True)
class Distrusted:
    """A ready replica whose measurements cannot be used: a reason of ``tuning.reasons``, and a clause."""

    name: str
    reason: str
    clause: str


@dataclass(frozen=True)
class Trust:
    """The verdict on an observation.

    Attributes:
        trusted: ready replicas whose measurements can be used. Where all are too young, those that were
            measured for a short window: a new deployment must not wait a long one for capacity.
        distrusted: the ready ones whose measurements cannot be used, or are too young.
        counted: ready replicas whose counters can be added up, young ones included.
        all_new: True if the trusted ones are too young as well.
        nothing: why nothing can be judged at all; None if there is a trusted replica.
        too_few: why neither tuning nor a scale-in is permitted; None if nearly all replicas are trusted.
    """

    trusted: tuple[ObservedReplica, ...]
    distrusted: tuple[Distrusted, ...]
    nothing: Found | None
    too_few: Found | None
    counted: tuple[ObservedReplica, ...] = ()
    all_new: bool = False


def trust(observation: Observation, policy: Policy) -> Trust:
    """Judge each ready replica, and what they permit together."""
    nothing = _unusable(observation, policy)
    if nothing is not None:
        return Trust((), (), nothing, nothing)
    verdicts = {replica.uid: distrusted(replica, policy) for replica in observation.ready}
    trusted = tuple(replica for replica in observation.ready if verdicts[replica.uid] is None)
    others = tuple(found for found in verdicts.values() if found is not None)
    why = _summary(others)
    too_few = why if len(trusted) < NEARLY_ALL * len(observation.ready) else None
    all_new = not trusted and all(item.clause == YOUNG for item in others)
    if all_new:
        trusted = tuple(replica for replica in observation.ready if _begun(replica, policy))
    counted = tuple(r for r in observation.ready if not any(check(r, policy) for check in _UNCOUNTED))
    return Trust(trusted, others, None if trusted else why, too_few, counted, all_new)


def distrusted(replica: ObservedReplica, policy: Policy) -> Distrusted | None:
    """The first reason why the measurements of a replica cannot be used, or None."""
    for reason, holds, clause in _REPLICA_CHECKS:
        if holds(replica, policy):
            return Distrusted(replica.name, reason, clause)
    return None


def _summary(found: tuple[Distrusted, ...]) -> Found | None:
    """The first reason in the order of the checks, and the replicas that it holds for."""
    for reason, _, clause in _REPLICA_CHECKS:
        names = sorted(item.name for item in found if (item.reason, item.clause) == (reason, clause))
        if names:
            return reason, f"{', '.join(names)}: {clause}"
    return None


def _unusable(observation: Observation, policy: Policy) -> Found | None:
    """Why the whole observation cannot be used, or None."""
    pace, problem = policy.pace, observation.metrics_problem
    if observation.promoted is None:
        return reasons.NOT_ROLLED_OUT, "no configuration was written yet"
    if not observation.ready:
        return reasons.NO_REPLICAS_READY, "no replica is ready"
    if problem is not None:
        return problem.reason, problem.message
    if pace.scrape > MAX_SCRAPE_S:
        return reasons.SCRAPE_TOO_SLOW, (
            f"the engines are scraped every {pace.scrape:g} s; at most {MAX_SCRAPE_S:g} s can be judged by"
        )
    if pace.short < MIN_SCRAPES * pace.scrape:  # a pace that was scaled down
        return reasons.SCRAPE_TOO_SLOW, (
            f"the short window of {pace.short:g} s holds fewer than {MIN_SCRAPES} scrapes, one each "
            f"{pace.scrape:g} s"
        )
    return None


def _missing(replica: ObservedReplica, policy: Policy) -> bool:
    return replica.sample is None or not {"short", "long"} <= set(replica.sample.windows)


def _stale(replica: ObservedReplica, policy: Policy) -> bool:
    # Not "age > limit": an age of NaN proves no freshness.
    return replica.sample is not None and not replica.sample.age_s <= STALE_SCRAPES * policy.pace.scrape


def _not_finite(replica: ObservedReplica, policy: Policy) -> bool:
    return replica.sample is not None and not replica.sample.finite


def _young(replica: ObservedReplica, policy: Policy) -> bool:
    return replica.sample is not None and not replica.sample.coverage_s >= COVERAGE * policy.pace.long


def _begun(replica: ObservedReplica, policy: Policy) -> bool:
    return replica.sample is not None and replica.sample.coverage_s >= policy.pace.short


def _engine_problem(problem: EngineProblem | None) -> Callable[[ObservedReplica, Policy], bool]:
    return lambda replica, policy: replica.engine is None and replica.engine_problem == problem


def _no_engine(replica: ObservedReplica, policy: Policy) -> bool:
    return replica.engine is None


_REPLICA_CHECKS: tuple[tuple[str, Callable[[ObservedReplica, Policy], bool], str], ...] = (
    (reasons.METRICS_MISSING, _missing, "ready, and no metrics of it"),
    (reasons.METRICS_STALE, _stale, f"metrics are older than {STALE_SCRAPES} scrapes"),
    (reasons.METRICS_PARTIAL, _not_finite, "a metric is not a finite number"),
    (reasons.METRICS_PARTIAL, _young, YOUNG),
    (reasons.STALLED, lambda replica, policy: is_stalled(replica), "requests arrive and none ends"),
    (reasons.ENGINE_UNREACHABLE, _engine_problem("unauthorized"), "its admin API refuses the token"),
    (reasons.ENGINE_UNREACHABLE, _engine_problem("refused"), "its admin API refuses the request"),
    (reasons.ENGINE_UNREACHABLE, _no_engine, "its admin API does not answer"),
)

_UNCOUNTED = (_missing, _stale, _not_finite)
"""Checks that the counters of a replica must pass to be added up."""


def no_traffic(observation: Observation) -> bool:
    """True if no ready replica has arrivals, requests in flight, or a queue."""
    arrivals = sum(observation.counts(window).arrivals for window in ("short", "long"))
    in_engines = sum(
        replica.sample.gauges.waiting + replica.sample.gauges.running
        for replica in observation.ready
        if replica.sample is not None
    )
    return arrivals == 0 and in_engines == 0


def is_stalled(replica: ObservedReplica) -> bool:
    """True if requests are in flight, arrivals are older than the short window, and none ended."""
    if replica.sample is None:
        return False
    windows, gauges = replica.sample.windows, replica.sample.gauges
    short, long = windows.get("short", NO_COUNTS), windows.get("long", NO_COUNTS)
    return (
        gauges.waiting + gauges.running > 0
        and long.arrivals > short.arrivals
        and not sum(long.outcomes.values())
    )
