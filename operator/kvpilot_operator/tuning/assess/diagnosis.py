"""Why an objective is breached: the stage at fault, and whether the device is saturated."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter

from kvpilot_engine.contract.knobs import SATURATED_BUSY, SATURATED_GAIN
from kvpilot_engine.contract.metrics import Stage
from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.assess.capacity import Capacity
from kvpilot_operator.tuning.assess.objectives import backlog_gone, judged_window, shortfall
from kvpilot_operator.tuning.decision import Diagnosis, Objective, StageShare
from kvpilot_operator.tuning.observation import Counts, Observation, Signal, gauges_of

WAITS: tuple[Stage, ...] = (Stage.ADMISSION_WAIT, Stage.TIER_LOAD, Stage.BATCH_WAIT, Stage.PREEMPTED)
"""Stages in which a request makes no progress."""

WAIT_SHARE = 0.1
"""From this share of the request time on, a wait is at fault before any stage of work."""

SLOTS_IDLE = 0.7
"""Requests that wait while a smaller share of the worker slots is in use wait for pages, not for slots."""

_REASON = {
    Stage.ADMISSION_WAIT: (reasons.QUEUE_AT_ADMISSION, "waiting for admission"),
    Stage.TIER_LOAD: (reasons.TIER_LOAD_SLOW, "loading from slower tiers"),
    Stage.BATCH_WAIT: (reasons.QUEUE_AT_BATCH, "waiting for a place in the batch"),
    Stage.PREFILL: (reasons.PREFILL_HEAVY, "prefill"),
    Stage.DECODE: (reasons.DECODE_HEAVY, "decode"),
    Stage.PREEMPTED: (reasons.PREEMPTING, "preempted requests"),
}


def diagnose(
    observation: Observation,
    objectives: tuple[Objective, ...],
    signal: Signal,
    capacity: Capacity | None,
    *,
    idle: bool,
) -> Diagnosis:
    """The worst breached objective and the stage at fault.

    Memory comes first, since an engine that is killed for it loses its cache and its requests; then what
    requests feel; then the hit rate. ``idle``: there is no traffic.
    """
    stages = stage_shares(_with_queue(observation), signal)
    full = saturated(observation, capacity)
    breached = {item.name: item for item in objectives if item.state == "Breached"}
    if not breached:
        reason, message = _calm(objectives, idle)
        return Diagnosis("", "", reason, message, stages, full)
    if "memory" in breached:
        ratio, limit = breached["memory"].measured_short or 0.0, breached["memory"].target
        message = f"memory is at {ratio:.0%} of its limit, {limit:.0%} is allowed"
        return Diagnosis("memory", "", reasons.MEMORY_OVER_LIMIT, message, stages, full)
    felt = [item for item in breached.values() if item.kind.felt]
    if felt:
        worst = max(felt, key=shortfall)
        return _stage_at_fault(worst.name, stages, full)
    rate, target = breached["hitRate"].measured_short or 0.0, breached["hitRate"].target
    message = f"{rate:.0%} of prompt tokens come from the cache, {target:.0%} is asked for"
    return Diagnosis("hitRate", "", reasons.HIT_RATE_LOW, message, stages, full)


def stage_shares(counts: Counts, signal: Signal = "request") -> tuple[StageShare, ...]:
    """Seconds per judged request in each stage, in the order of a request's life, and shares of their sum.

    Decode comes after the first token, so it is none of that signal's time.
    """
    kept = [stage for stage in Stage if not (signal == "firstToken" and stage is Stage.DECODE)]
    total = sum(counts.stage_seconds.get(stage, 0.0) for stage in kept)
    if total <= 0 or counts.judged <= 0:
        return ()
    return tuple(
        StageShare(
            stage.value,
            counts.stage_seconds.get(stage, 0.0) / counts.judged,
            counts.stage_seconds.get(stage, 0.0) / total,
        )
        for stage in kept
    )


def share(diagnosis: Diagnosis, stage: Stage) -> float:
    """Share of the request time in a stage."""
    return next((item.share for item in diagnosis.stages if item.stage == stage), 0.0)


def saturated(observation: Observation, capacity: Capacity | None) -> bool:
    """True if the devices step nearly all the time and more rows gain little, in both windows.

    Stepping time alone proves nothing: on contended CPUs a step with few rows takes hardly less time than one
    with many rows. Nor does the gain of one more row, where there are many: of r rows it is at most 1 / r.
    Where a runtime exports no such gain, the curve is enough.
    """
    if capacity is not None and not capacity.flat():
        return False
    reported = [item.marginal_gain for item in gauges_of(observation.ready)]
    gains = [gain for gain in reported if gain is not None]
    if sum(gains) / len(gains) >= SATURATED_GAIN if gains else capacity is None:
        return False
    return all(busy_share(observation.counts(window)) >= SATURATED_BUSY for window in ("short", "long"))


def busy_share(counts: Counts) -> float:
    """Share of wall time spent in steps."""
    return counts.busy_seconds / counts.replica_seconds if counts.replica_seconds else 0.0


def occupancy(counts: Counts) -> float:
    """Mean number of worker slots in use per replica: Little's law over the stages that hold one."""
    held = sum(seconds for stage, seconds in counts.stage_seconds.items() if stage != Stage.ADMISSION_WAIT)
    return held / counts.replica_seconds if counts.replica_seconds else 0.0


def waits_for_pages(observation: Observation, workers: int) -> bool:
    """True if long queues wait while worker slots are free: the requests wait for pages.

    Slots are taken at step boundaries, so one or two that are free at the moment of a scrape prove nothing;
    and requests of one length end together, so that many are free for a moment: the window must show it.
    """
    queued = [r for r in observation.ready if r.sample is not None and r.sample.gauges.waiting >= workers]
    if not queued:
        return False
    free = min(SLOTS_IDLE * workers, workers - 1.5)
    running = sum(r.sample.gauges.running for r in queued if r.sample is not None) / len(queued)
    return running < free and occupancy(observation.counts("short", frozenset(r.uid for r in queued))) < free


def _with_queue(observation: Observation) -> Counts:
    """The judged window, with admission wait at least as long as the present queues make it.

    Requests that ended tell nothing yet of a queue that has just formed. If it had been as long for the whole
    window, so many seconds would have been waited (Little's law). A short queue may be chance.
    """
    counts = observation.counts(judged_window(observation))
    samples = gauges_of(observation.ready)
    waiting, running = (sum(map(attrgetter(name), samples)) for name in ("waiting", "running"))
    if backlog_gone(waiting, len(samples), running / max(1, len(samples))):
        return counts
    queued = waiting * counts.replica_seconds / len(samples)
    waits = max(counts.stage_seconds.get(Stage.ADMISSION_WAIT, 0.0), queued)
    return replace(counts, stage_seconds={**counts.stage_seconds, Stage.ADMISSION_WAIT: waits})


def _stage_at_fault(objective: str, stages: tuple[StageShare, ...], full: bool) -> Diagnosis:
    if not stages:
        return Diagnosis(objective, "", reasons.NOT_ENOUGH_DATA, "no request has ended yet", stages, full)
    waits = [item for item in stages if item.stage in WAITS]
    worst = max(waits, key=lambda item: item.share)
    if worst.share < WAIT_SHARE:
        worst = max(stages, key=lambda item: item.share)
    reason, clause = _REASON[Stage(worst.stage)]
    device = ", and the device is saturated" if full else ""
    message = f"{objective} is breached: {clause} is {worst.share:.0%} of request time{device}"
    return Diagnosis(
        objective, worst.stage, reasons.DEVICE_SATURATED if full else reason, message, stages, full
    )


def _calm(objectives: tuple[Objective, ...], idle: bool) -> tuple[str, str]:
    if idle:
        return reasons.NO_TRAFFIC, "there is no traffic"
    if any(item.state == "Met" for item in objectives if item.name != "memory"):
        return reasons.ALL_MET, "every objective that can be judged is met"
    return reasons.NOT_ENOUGH_DATA, "too few requests to judge"
