"""Rules about compute: workers, batch and step tokens."""

from __future__ import annotations

from kvpilot_engine.contract.knobs import GROWTH
from kvpilot_engine.contract.metrics import Stage
from kvpilot_engine.contract.wording import counted
from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.assess.capacity import (
    COUNTS,
    USE,
    Slots,
    demand,
    slots_for,
)
from kvpilot_operator.tuning.assess.diagnosis import share, waits_for_pages
from kvpilot_operator.tuning.assess.objectives import arrival_rate, judged_window
from kvpilot_operator.tuning.configuration import value
from kvpilot_operator.tuning.context import Context, Found, Proposal
from kvpilot_operator.tuning.experiment.evidence import SECONDS, WORK
from kvpilot_operator.tuning.observation import Counts
from kvpilot_operator.tuning.rules.bounds import Room, room
from kvpilot_operator.tuning.rules.prediction import grown, ladder_gain, needed_concurrency, queue_gain

STEP_FULL = 0.8
"""Steps that carry this share of ``maxStepTokens`` on average are limited by it."""


def counts_of(context: Context) -> Counts:
    """The short window, or the long one where that has too few requests."""
    return context.measured.counts(judged_window(context.measured))


def needed_per_engine(context: Context) -> float:
    """Requests in work at once that the arrivals need per replica, in the busier one of both windows."""
    arrivals = max(arrival_rate(context.measured, window) for window in ("short", "long"))
    return needed_concurrency(counts_of(context), arrivals / len(context.ready))


def at_fault(context: Context, *stages: Stage) -> bool:
    """True if an objective that requests feel is breached because of one of these stages."""
    return context.diagnosis.stage in stages


def workers_up(context: Context) -> Found:
    """Admission wait is at fault and worker slots are short: size the workers by Little's law.

    The batch grows with them where it would be smaller, since the wait would only move there.
    """
    if not at_fault(context, Stage.ADMISSION_WAIT):
        return reasons.NOT_AT_FAULT, "admission wait is not at fault"
    if context.diagnosis.saturated:
        return reasons.DEVICE_SATURATED, "more requests at once would only share a saturated device"
    workers, batch = room(context, "numWorkers"), room(context, "batchSize")
    if waits_for_pages(context.measured, workers.now):
        return (
            reasons.WAITING_FOR_PAGES,
            f"requests wait while fewer than {counted(workers.now, 'slot')} are in use",
        )
    most = workers.maximum if _can_grow(batch) else min(workers.maximum, max(batch.now, 1))
    after, needed, ratio = _sized(context, workers.now, most, needed_per_engine(context))
    if after <= workers.now:
        return reasons.AT_BOUND, f"numWorkers is {workers.now}, and more would wait for the batch"
    values = [workers.to(after)]
    if batch.now < after and _can_grow(batch):
        values.append(batch.to(int(min(after, batch.maximum))))
    wait = share(context.diagnosis, Stage.ADMISSION_WAIT) + _batch_share(context, batch, after)
    return Proposal(
        "workers-up",
        tuple(values),
        context.diagnosis.objective,
        queue_gain(min(1.0, wait), workers.now, after, needed),
        f"admission wait was {share(context.diagnosis, Stage.ADMISSION_WAIT):.0%} of request time; "
        f"{needed:.1f} requests in work at once are needed per replica",
        ratio=ratio,
    )


def workers_down(context: Context) -> Found:
    """Work takes too long since too many requests share the device: admit fewer, if they are enough."""
    if not at_fault(context, Stage.PREFILL, Stage.DECODE):
        return reasons.NOT_AT_FAULT, "neither prefill nor decode is at fault"
    workers, capacity = room(context, "numWorkers"), context.capacity
    if capacity is None:
        return reasons.NOT_EFFECTIVE, "the engines report no curve of step time"
    most = max(1, min(workers.now, value(context.config, "batchSize")))  # rows that bursts may show
    limit = context.max_work_s
    now = min(workers.now, capacity.rows)
    if capacity.work_s(now) <= limit:
        return reasons.NOT_AT_FAULT, "work stays within its share of the latency limits"
    wanted = demand(context.measured, context.waiting, context.policy.pace.long)
    enough = [
        n for n in COUNTS if n < now and capacity.work_s(n) <= limit and USE * capacity.rate(n) >= wanted
    ]
    after = int(max(enough, default=0))
    if after < max(1, workers.minimum):
        return reasons.NOT_EFFECTIVE, "fewer requests at once would not complete what arrives"
    return Proposal(
        "workers-down",
        (workers.to(after),),
        context.diagnosis.objective,
        1 - capacity.work_s(after) / capacity.work_s(now),
        f"work took {capacity.work_s(now):.2f} s with {counted(round(now), 'request')} at once; {after} "
        f"{'completes' if after == 1 else 'complete'} the load",
        ratio=capacity.rate(after) / capacity.rate(most),
        measure=SECONDS,  # not the work alone: what is not admitted waits instead
    )


def batch_up(context: Context) -> Found:
    """Batch wait is at fault and rows are short."""
    if not at_fault(context, Stage.BATCH_WAIT):
        return reasons.NOT_AT_FAULT, "batch wait is not at fault"
    if context.diagnosis.saturated:
        return reasons.DEVICE_SATURATED, "more rows would gain under 10%"
    batch, workers = room(context, "batchSize"), room(context, "numWorkers")
    if batch.now >= workers.now:
        return (
            reasons.NOT_EFFECTIVE,
            f"batchSize {batch.now} has a row for each of {counted(workers.now, 'worker')}",
        )
    most = int(min(batch.maximum, workers.now))
    needed = max(min(needed_per_engine(context), workers.now), batch.now + 1)
    after, needed, ratio = _sized(context, batch.now, most, needed)
    if after <= batch.now:
        return reasons.AT_BOUND, f"batchSize is {batch.now}"
    wait = share(context.diagnosis, Stage.BATCH_WAIT)
    return Proposal(
        "batch-up",
        (batch.to(after),),
        context.diagnosis.objective,
        queue_gain(wait, batch.now, after, needed),
        f"batch wait was {wait:.0%} of request time with {counted(batch.now, 'row')} "
        f"for {counted(workers.now, 'worker')}",
        ratio=ratio,
    )


def step_tokens_up(context: Context) -> Found:
    """Prefill or batch wait is at fault and steps are full of prompt tokens: allow more per step."""
    if not at_fault(context, Stage.PREFILL, Stage.BATCH_WAIT):
        return reasons.NOT_AT_FAULT, "neither prefill nor batch wait is at fault"
    tokens, counts = room(context, "maxStepTokens"), counts_of(context)
    carried = (counts.computed or 0.0) + (counts.output_tokens or 0.0)
    per_step = carried / counts.steps if counts.steps else 0.0
    if per_step < STEP_FULL * tokens.now:
        return reasons.NOT_EFFECTIVE, f"steps do not fill {tokens.now} tokens"
    after = int(min(tokens.now * GROWTH, tokens.maximum))
    if after <= tokens.now:
        return reasons.AT_BOUND, f"maxStepTokens is {tokens.now}"
    wait = share(context.diagnosis, Stage(context.diagnosis.stage))
    return Proposal(
        "step-tokens-up",
        (tokens.to(after),),
        context.diagnosis.objective,
        ladder_gain(wait, tokens.now, after),
        f"steps carried {per_step:.0f} of {tokens.now} tokens, and {context.diagnosis.stage_text} was "
        f"{wait:.0%} of request time",
        measure=WORK,
    )


def sized_slots(context: Context, now: int, most: float) -> Slots | None:
    """Slots for the demand on the engines' own curve; None without a measurement."""
    capacity = context.capacity
    if capacity is None:
        return None
    wanted = demand(context.measured, context.waiting, context.policy.pace.long)
    return slots_for(capacity, wanted, now, most, context.max_work_s)


def _sized(context: Context, now: int, most: float, needed: float) -> tuple[int, float, float]:
    """The next value of a count, the requests in work that it is for, and the ratio of capacities.

    Without a curve the count grows step by step, and the growth of the slots is all that can be promised.
    """
    slots = sized_slots(context, now, most)
    if slots is not None:
        return slots.count, slots.in_work, slots.ratio
    after = grown(now, needed, most)
    return after, needed, after / max(1, now)


def _can_grow(knob: Room) -> bool:
    return knob.tunable and knob.now < knob.maximum


def _batch_share(context: Context, batch: Room, after: int) -> float:
    """Share of batch wait that vanishes too if the batch grows with the workers."""
    return share(context.diagnosis, Stage.BATCH_WAIT) if batch.now < after and _can_grow(batch) else 0.0
