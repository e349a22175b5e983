"""The rate at which replicas advance rows: what proves or refutes a change of capacity.

A latency in a queue is the sum of everything that came before it: near saturation two equal engines differ by
chance for minutes. Row-steps per second of stepping have no memory, and at a given number of rows they do not
depend on the load: a replica shows what it can do as soon as it has worked with that many rows for a moment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from kvpilot_operator.tuning.assess.capacity import prefill_s
from kvpilot_operator.tuning.observation import Counts
from kvpilot_operator.tuning.state import Effect, KnobChange, StepRate

SIZE_VARIANCE = 0.5
"""Variance of ln(rate) times ended requests, since requests differ: 0 to 0.03 for chat, 0.3 on the Mooncake
trace, 0.5 with log-normal sizes (sd 0.8) that a session shares."""

MACHINES_DIFFER, SPEED_WANDERS = 0.15, 0.05
"""Standard deviations of the log ratio of two equal engines: of their machines, and of one within minutes."""

TIMES_DIFFER = 0.1
"""Standard deviation of the log ratio of the same engines now and before: they wander, and so does what they
are asked, beyond the prompt tokens that they compute."""

MIN_SECONDS, MIN_REQUESTS = 1.0, 4.0
"""A bucket of rows shows a rate after so many seconds and so many requests' worth of row-steps."""

CHUNK = "maxStepTokens"
"""Knob that changes the row-steps of a request: a prompt in larger chunks takes fewer and longer ones."""

ADMITTING = frozenset({"numWorkers", "batchSize", "maxTokens"})
"""Knobs that limit how many rows there can be."""


def step_rate(
    counts: Counts, values: Sequence[KnobChange], curve: Mapping[int, float] | None = None
) -> StepRate:
    """The best rate that a window shows, over the buckets of rows; zeros without one.

    Args:
        values: the change that is judged. If it alters the row-steps of a request, the rate is requests per
            second of stepping, else row-steps per second.
        curve: seconds of a decode step by its rows. What steps take beyond it is prefill.
    """
    ended = counts.ended
    if ended <= 0 or counts.step_rows <= 0:
        return StepRate()
    row_steps = counts.step_rows / ended
    per_request = any(item.knob == CHUNK for item in values)
    # The sizes of requests are in the rate a second time then, so they count half.
    unit, part = (row_steps, 0.5) if per_request else (1.0, 1.0)
    shown = [
        StepRate(rows / seconds / unit, part * rows / row_steps, bucket)
        for bucket, rows in counts.bucket_rows.items()
        if (seconds := counts.bucket_seconds.get(bucket, 0.0)) >= MIN_SECONDS
        and rows / row_steps >= MIN_REQUESTS
    ]
    if not shown:
        return StepRate()
    return replace(
        max(shown, key=lambda item: item.rate),
        rows=max(item.rows for item in shown),
        computed=None if counts.computed is None else unit * max(0.0, counts.computed) / counts.step_rows,
        prefill_s=unit * prefill_s(counts, curve) / counts.step_rows if curve else 0.0,
    )


def as_loaded(now: StepRate, before: StepRate, values: Sequence[KnobChange]) -> bool:
    """True if ``now`` was seen with as many rows as ``before``, less what the change takes away of them.

    A rate with fewer rows is lower by the load alone, so it shows no harm.
    """
    numbers = (int, float)
    left = [
        item.after / item.before
        for item in values
        if item.knob in ADMITTING
        and isinstance(item.before, numbers)
        and isinstance(item.after, numbers)
        and item.before
    ]
    return now.rows >= before.rows * min([1.0, *left])


def difference(one: StepRate, other: StepRate) -> Effect | None:
    """ln(one / other) with the variance of sampling alone; None while one of them shows nothing."""
    if min(one.rate, other.rate) <= 0:
        return None
    return Effect(math.log(one.rate / other.rate), SIZE_VARIANCE * (1 / one.requests + 1 / other.requests))


def of_equal_prompts(one: StepRate, other: StepRate) -> Effect | None:
    """``difference`` as it would be if both computed equally many prompt tokens per row-step.

    What the caches of the arms hold differs, by chance and by the queue: a prompt that waits is often one
    that is being computed. A row-step takes 1 / rate, and a computed prompt token b seconds of it, as both
    show together; half of what their tokens differ by is taken off the one and added to the other. The more
    that moves, the less is known: half of it counts as a standard deviation.
    """
    found = difference(one, other)
    if found is None or one.computed is None or other.computed is None:
        return found
    tokens = one.computed + other.computed
    if tokens <= 0:
        return found
    token_s = (one.prefill_s + other.prefill_s) / tokens
    moved_s = token_s * (one.computed - other.computed) / 2
    first, second = 1 / one.rate, 1 / other.rate
    equal = math.log(max(second + moved_s, second / 2) / max(first - moved_s, first / 2))
    return Effect(equal, found.variance + ((equal - found.log_ratio) / 2) ** 2)


def of_other_times(now: Effect) -> Effect:
    """The effect of a change on the same engines, where ``now`` compares them with their own past."""
    return Effect(now.log_ratio, now.variance + TIMES_DIFFER**2)


def corrected(now: Effect, before: Effect | None) -> Effect:
    """The effect of the change alone: ``now`` without what the machines differed by before it.

    The difference of the machines has a prior N(0, MACHINES_DIFFER^2); ``before`` measures it, so it is
    subtracted as far as it is known, and what stays unknown is added to the variance.
    """
    prior = MACHINES_DIFFER**2
    wander = SPEED_WANDERS**2
    if before is None:
        return Effect(now.log_ratio, now.variance + prior + wander)
    noise = before.variance + wander
    weight = prior / (prior + noise)
    return Effect(
        now.log_ratio - weight * before.log_ratio, now.variance + prior * noise / (prior + noise) + wander
    )
