"""Why an objective is breached: the stage at fault, and whether the device is saturated."""

from __future__ import annotations

from kvpilot_engine.contract.metrics import Stage
from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.decision import Diagnosis, Objective, StageShare
from kvpilot_operator.tuning.objectives import judged_window, shortfall
from kvpilot_operator.tuning.observation import Counts, Observation, Signal

WAITS: tuple[Stage, ...] = (Stage.ADMISSION_WAIT, Stage.TIER_LOAD, Stage.BATCH_WAIT, Stage.PREEMPTED)
"""Stages in which a request does not advance: all of their time is in excess of the work itself."""

WAIT_SHARE = 0.1
"""A wait of this share of the request time is at fault before any work is."""

SLOTS_IDLE = 0.7
"""Requests that wait while less than this share of the worker slots is held wait for pages, not for slots."""

SATURATED_BUSY, SATURATED_GAIN = 0.9, 0.1
"""Stepping 90% of wall time, and one more sequence would raise tokens/s by less than 10%."""

_REASON = {
    Stage.ADMISSION_WAIT: (reasons.QUEUE_AT_ADMISSION, "waiting for admission"),
    Stage.TIER_LOAD: (reasons.TIER_LOAD_SLOW, "loading from slower tiers"),
    Stage.BATCH_WAIT: (reasons.QUEUE_AT_BATCH, "waiting for a place in the batch"),
    Stage.PREFILL: (reasons.PREFILL_HEAVY, "prefill"),
    Stage.DECODE: (reasons.DECODE_HEAVY, "decode"),
    Stage.PREEMPTED: (reasons.PREEMPTING, "preempted requests"),
}


def diagnose(
    observation: Observation, objectives: tuple[Objective, ...], signal: Signal, *, idle: bool
) -> Diagnosis:
    """The worst breached objective and the stage at fault.

    Memory comes first, since an engine that is killed loses everything; then what requests feel; then the
    cache. ``idle``: there is no traffic.
    """
    stages = stage_shares(observation.counts(judged_window(observation)), signal)
    hot = saturated(observation)
    breached = {item.name: item for item in objectives if item.state == "Breached"}
    if not breached:
        reason, message = _calm(objectives, idle)
        return Diagnosis("", "", reason, message, stages, hot)
    if "memory" in breached:
        ratio, limit = breached["memory"].measured_short or 0.0, breached["memory"].target
        message = f"memory is at {ratio:.0%} of its limit, {limit:.0%} is allowed"
        return Diagnosis("memory", "", reasons.MEMORY_OVER_LIMIT, message, stages, hot)
    felt = [item for name, item in breached.items() if name != "hitRate"]
    if felt:
        worst = max(felt, key=shortfall)
        return _felt(worst.name, stages, hot)
    rate, target = breached["hitRate"].measured_short or 0.0, breached["hitRate"].target
    message = f"{rate:.0%} of prompt tokens come from the cache, {target:.0%} is asked for"
    return Diagnosis("hitRate", "", reasons.HIT_RATE_LOW, message, stages, hot)


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


def saturated(observation: Observation) -> bool:
    """True when the devices step all the time and more rows gain little, in both windows.

    Busy alone is not saturated: on contended CPUs a step with few rows takes all the time there is, and a
    step with many rows would take hardly more.
    """
    gains = [pod.sample.gauges.marginal_gain for pod in observation.ready if pod.sample is not None]
    if not gains or sum(gains) / len(gains) >= SATURATED_GAIN:
        return False
    return all(busy_share(observation.counts(window)) >= SATURATED_BUSY for window in ("short", "long"))


def busy_share(counts: Counts) -> float:
    """Share of wall time spent in steps."""
    return counts.busy_seconds / counts.pod_seconds if counts.pod_seconds else 0.0


def occupancy(counts: Counts) -> float:
    """Worker slots in use, a mean per engine: Little's law over the stages that hold one."""
    held = sum(seconds for stage, seconds in counts.stage_seconds.items() if stage != Stage.ADMISSION_WAIT)
    return held / counts.pod_seconds if counts.pod_seconds else 0.0


def pages_short(observation: Observation, workers: int) -> bool:
    """True when long queues stand before free worker slots: free pages are what they wait for.

    Slots are taken at step boundaries, so one or two that are free at the moment of a scrape prove nothing.
    """
    gauges = [pod.sample.gauges for pod in observation.ready if pod.sample is not None]
    running = [gauge.running for gauge in gauges if gauge.waiting >= workers]
    return bool(running) and sum(running) / len(running) < min(SLOTS_IDLE * workers, workers - 1.5)


def _felt(objective: str, stages: tuple[StageShare, ...], hot: bool) -> Diagnosis:
    if not stages:
        return Diagnosis(objective, "", reasons.NOT_ENOUGH_DATA, "no request has ended yet", stages, hot)
    waits = [item for item in stages if item.stage in WAITS]
    worst = max(waits, key=lambda item: item.share)
    if worst.share < WAIT_SHARE:
        worst = max(stages, key=lambda item: item.share)
    reason, clause = _REASON[Stage(worst.stage)]
    device = ", and the device is saturated" if hot else ""
    message = f"{objective} is breached: {clause} is {worst.share:.0%} of request time{device}"
    return Diagnosis(
        objective, worst.stage, reasons.DEVICE_SATURATED if hot else reason, message, stages, hot
    )


def _calm(objectives: tuple[Objective, ...], idle: bool) -> tuple[str, str]:
    if idle:
        return reasons.NO_TRAFFIC, "there is no traffic"
    if any(item.state == "Met" for item in objectives if item.name != "memory"):
        return reasons.ALL_MET, "every objective that can be judged is met"
    return reasons.NOT_ENOUGH_DATA, "too few requests to judge"
