"""Predictors of gains. Each docstring states the assumption; the canary tests it."""

from __future__ import annotations

import math

from kvpilot_engine.contract.knobs import GROWTH
from kvpilot_engine.contract.metrics import Stage
from kvpilot_operator.tuning.assess.capacity import count_for
from kvpilot_operator.tuning.observation import Counts

MIN_GAIN = 0.05
"""A proposal must promise at least this much."""

MIN_RATIO = 1.2
"""Capacity that a change of it must promise: engines differ by themselves, and less can hardly be proven."""

HEADROOM = 2.0
"""Concurrency beyond the mean need: arrivals come in bursts, a backlog has to drain, and rows that share a
step slow each other down. A slot too many costs nothing; one too few costs another experiment."""

MAX_STEP = 4
"""Factor of one change of a count at most. It is at least GROWTH, since the load may still be rising."""


def needed_concurrency(counts: Counts, arrivals: float) -> float:
    """Requests in work at once per engine, by Little's law: L = lambda x S.

    Args:
        counts: of a window; S is the time per successful request in the stages of work (tier load, prefill,
            decode, preempted). Neither wait counts: both vanish once workers and batch suffice.
        arrivals: requests/s that come to one engine.
    """
    completed = counts.completed
    if completed <= 0:
        return 0.0
    waits = (Stage.ADMISSION_WAIT, Stage.BATCH_WAIT)
    work = sum(seconds for stage, seconds in counts.stage_seconds.items() if stage not in waits)
    return arrivals * work / completed


def grown(now: int, needed: float, maximum: float) -> int:
    """The next value of a count that has to grow: by need, two- to fourfold, within its bound."""
    wanted = max(needed * HEADROOM, now * GROWTH)
    return int(min(count_for(wanted), now * MAX_STEP, maximum))


def queue_gain(share: float, now: int, after: int, needed: float) -> float:
    """Predicted relative fall of request time when a queue's servers grow from ``now`` to ``after``.

    Little's law: the wait vanishes in proportion to the missing servers that are added. With enough servers
    on average the wait comes from bursts, and falls at least as 1 - now / after.
    """
    relief = (
        1.0 if after >= needed > now else (after - now) / (needed - now) if needed > now else 1 - now / after
    )
    return share * min(1.0, max(relief, 1 - now / after))


def ladder_gain(share: float, before: float, after: float) -> float:
    """Predicted relative fall of request time when the cost of a stage scales as ``before / after``."""
    return share * (1 - before / after) if after > before > 0 else share * 0.5 if after > before else 0.0


def miss_gain(rate: float, ceiling: float, before: float, after: float) -> float:
    """Predicted relative fall of missed tokens when a cache grows.

    Curve: the distance to an infinite cache shrinks as 1 / size, so hits(after) = ceiling - (ceiling -
    rate) x before / after.
    """
    missed = 1.0 - rate
    return (ceiling - rate) * (1 - before / after) / missed if missed > 0 and after > 0 else 0.0


def round_to(value: float, unit: int, *, up: bool = False) -> int:
    """``value`` in whole units, at least one; rounded down, or up."""
    return max(1, math.ceil(value / unit) if up else math.floor(value / unit)) * unit
