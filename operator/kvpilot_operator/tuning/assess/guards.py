"""Guards: when measurements cannot be trusted, nothing is decided; no data is never zero.

Messages hold no live figures, so that a hold that goes on does not rewrite the status.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields

from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.observation import Counts, Gauges, Observation, Pod, Sample
from kvpilot_operator.tuning.policy import Policy
from kvpilot_operator.tuning.state import TuningState

SCRAPES_PER_WINDOW = 4
STALE_SCRAPES = 3
COVERAGE = 0.8
"""A pod measured for less than this part of the long window is too young to be judged."""

DAY, SIX_HOURS = 86_400.0, 21_600.0
MOST_BARRED, MOST_REVERSALS = 16, 16

Found = tuple[str, str]
"""A reason and its message."""


def distrust(observation: Observation, policy: Policy) -> Found | None:
    """The first reason why this observation cannot be used, or None."""
    for check in _CHECKS:
        found = check(observation, policy)
        if found is not None:
            return found
    return None


def distrusted_pods(pods: tuple[Pod, ...], policy: Policy) -> Found | None:
    """The first reason why the measurements of these pods cannot be used, or None."""
    for reason, holds, clause in _POD_CHECKS:
        names = [pod.name for pod in pods if holds(pod, policy)]
        if names:
            return reason, f"{', '.join(sorted(names))}: {clause}"
    return None


def _not_rolled_out(observation: Observation, policy: Policy) -> Found | None:
    if observation.promoted is None:
        return reasons.NOT_ROLLED_OUT, "no configuration was written yet"
    return None


def _no_pods(observation: Observation, policy: Policy) -> Found | None:
    return None if observation.ready else (reasons.NO_PODS_READY, "no engine is ready")


def _source(observation: Observation, policy: Policy) -> Found | None:
    problem = observation.metrics_problem
    # A source that scrapes too slowly for these windows answers, and says so by its reason.
    reason, _, told = problem.partition(": ")
    if reason == reasons.SCRAPE_TOO_SLOW:
        return reason, told
    return (reasons.METRICS_UNAVAILABLE, problem) if problem else None


def _scrape(observation: Observation, policy: Policy) -> Found | None:
    pace = policy.pace
    if pace.short < SCRAPES_PER_WINDOW * pace.scrape:
        return reasons.SCRAPE_TOO_SLOW, (
            f"a window of {pace.short:g} s holds fewer than {SCRAPES_PER_WINDOW} scrapes of "
            f"{pace.scrape:g} s; scrape more often or use a slower pace"
        )
    return None


def _pods(observation: Observation, policy: Policy) -> Found | None:
    return distrusted_pods(observation.ready, policy)


_CHECKS: tuple[Callable[[Observation, Policy], Found | None], ...] = (
    _not_rolled_out,
    _no_pods,
    _source,
    _scrape,
    _pods,
)


def _missing(pod: Pod, policy: Policy) -> bool:
    return pod.sample is None or not {"short", "long"} <= set(pod.sample.windows)


def _stale(pod: Pod, policy: Policy) -> bool:
    # Not "age > limit": an age that is not a number is no proof of freshness.
    return pod.sample is not None and not pod.sample.age_s <= STALE_SCRAPES * policy.pace.scrape


def _not_finite(pod: Pod, policy: Policy) -> bool:
    return pod.sample is not None and not _finite(pod.sample)


def _young(pod: Pod, policy: Policy) -> bool:
    return pod.sample is not None and not pod.sample.coverage_s >= COVERAGE * policy.pace.long


def _silent(pod: Pod, policy: Policy) -> bool:
    return pod.engine is None


_POD_CHECKS: tuple[tuple[str, Callable[[Pod, Policy], bool], str], ...] = (
    (reasons.METRICS_MISSING, _missing, "ready, and no metrics of it"),
    (reasons.METRICS_STALE, _stale, f"metrics are older than {STALE_SCRAPES} scrapes"),
    (reasons.METRICS_PARTIAL, _not_finite, "a metric is not a finite number"),
    (reasons.METRICS_PARTIAL, _young, "measured for too short a time"),
    (reasons.ENGINE_UNREACHABLE, _silent, "its admin API does not answer"),
)


def _finite(sample: Sample) -> bool:
    parts: tuple[Counts | Gauges, ...] = (*sample.windows.values(), sample.gauges)
    return all(
        math.isfinite(number)
        for part in parts
        for item in fields(part)
        for number in _numbers(getattr(part, item.name))
    )


def _numbers(item: float | Mapping[object, float]) -> tuple[float, ...]:
    return tuple(item.values()) if isinstance(item, Mapping) else (item,)


def no_traffic(observation: Observation) -> bool:
    """True when no ready engine has arrivals, requests in flight, or a queue."""
    arrivals = sum(observation.counts(window).arrivals for window in ("short", "long"))
    in_engines = sum(
        pod.sample.gauges.waiting + pod.sample.gauges.running
        for pod in observation.ready
        if pod.sample is not None
    )
    return arrivals == 0 and in_engines == 0


def stalled_pods(observation: Observation) -> tuple[str, ...]:
    """Engines with requests inside, arrivals older than the short window, and nothing that ended."""
    return tuple(sorted(pod.name for pod in observation.ready if pod.sample and _stalled(pod.sample)))


def _stalled(sample: Sample) -> bool:
    short, long = sample.windows.get("short", Counts()), sample.windows.get("long", Counts())
    inside = sample.gauges.waiting + sample.gauges.running
    return inside > 0 and long.arrivals > short.arrivals and not sum(long.outcomes.values())


def barred(state: TuningState, knob: str, value: object, now: float) -> bool:
    """True when that value did harm or did not help a short while ago."""
    return any(item.knob == knob and item.value == value and item.until > now for item in state.barred)


def flap_budget_spent(state: TuningState, knob: str, policy: Policy, now: float) -> bool:
    """True when the knob was taken back as often in 6 hours as is allowed."""
    recent = [item for item in state.reversals if item.knob == knob and item.at > now - SIX_HOURS]
    return len(recent) >= policy.reversals_per_knob_6h
