"""What one engine can complete with other sizes: its measured curve of step time, and Little's law.

With r rows a step takes ``T(r) = t(r) + e r / r0``: t is the engine's own curve of decode steps, e the
prefill seconds of a mean step now, r0 the rows of that step. A request needs n row-steps, so it is in work
for ``n T(r)`` s, and the engine completes ``X(r) = r / (n T(r))`` requests/s.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass

from kvpilot_engine.contract.step_curve import time_of
from kvpilot_operator.tuning.assess.objectives import arrival_rate, judged_window
from kvpilot_operator.tuning.observation import Counts, Observation
from kvpilot_operator.tuning.policy import Objectives

USE = 0.8
"""Engines are sized to be in use for this share."""

MIN_RETURN = 0.15
"""Twice the rows must bring at least this much more throughput; the last count that does is the knee."""

WORK_SHARE = 0.5
"""Work alone may take this share of a tail limit; what is left is for waiting."""

TAIL = 0.9
"""An objective that asks for at least this attainment is a tail limit."""

SPREAD = 2.0
"""Slots beyond the mean number in work, in standard deviations of a Poisson number (square-root staffing)."""

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Values of counts that are tried: powers of two and 1.5 times those; finer steps measure alike."""


@dataclass(frozen=True)
class Capacity:
    """A mean engine as it was measured.

    Attributes:
        row_steps: row-steps of one request.
        rows: rows of a mean step.
        prefill_s: seconds of prefill in a mean step.
        curve: seconds of a decode step by its rows.
    """

    row_steps: float
    rows: float
    prefill_s: float
    curve: Mapping[int, float]

    def step_s(self, rows: float) -> float:
        """Duration of a step with that many rows of the present mix, s."""
        return _time_of(self.curve, rows) + self.prefill_s * rows / self.rows

    def work_s(self, rows: float) -> float:
        """Time in work of one request among ``rows``, s."""
        return self.row_steps * self.step_s(rows)

    @property
    def prompt_s(self) -> float:
        """What a step with the whole prompt of one request takes beyond a mean one, s."""
        return self.prefill_s * max(0.0, self.row_steps - 1) / self.rows

    def first_token_s(self, rows: float) -> float:
        """Time in work of one request among ``rows`` up to its first token, s: the step with its prompt."""
        return self.step_s(rows) + self.prompt_s

    def rate(self, rows: float) -> float:
        """Requests/s that one engine completes with ``rows`` in work."""
        return rows / self.work_s(rows)

    def knee(self, max_work_s: float, max_rows: float) -> int:
        """The most rows that still pay: throughput grows enough, and work fits its share of the limits."""
        best = 1
        for rows in COUNTS[1:]:
            growth = self.rate(rows) / self.rate(best) - 1
            enough = growth >= MIN_RETURN * math.log2(rows / best)
            if rows > max_rows or self.work_s(rows) > max_work_s or not enough:
                break
            best = rows
        return best

    def flat(self) -> bool:
        """True if twice the rows of a mean step would bring too little more."""
        return self.rate(2 * self.rows) < (1 + MIN_RETURN) * self.rate(self.rows)

    def rows_for(self, rate: float, max_rows: int) -> int:
        """The fewest rows that complete ``rate`` requests/s at ``USE``, at most ``max_rows``."""
        return next((r for r in COUNTS if r <= max_rows and USE * self.rate(r) >= rate), max_rows)


@dataclass(frozen=True)
class Slots:
    """Worker slots that the demand needs.

    Attributes:
        count: slots, at least one more than now where the bounds allow it.
        in_work: mean number of requests in work.
        ratio: capacity with them over the present one.
    """

    count: int
    in_work: float
    ratio: float


def measured(observation: Observation) -> Capacity | None:
    """The capacity of a mean ready engine; None without a curve or without work in the judged window."""
    counts = observation.counts(judged_window(observation))
    ended = counts.ended
    curves = [
        replica.sample.gauges.curve
        for replica in observation.ready
        if replica.sample is not None and replica.sample.gauges.curve
    ]
    if not curves or ended <= 0 or counts.steps <= 0 or counts.step_rows <= 0:
        return None
    common = sorted(set(curves[0]).intersection(*curves[1:]))
    curve = {rows: sum(item[rows] for item in curves) / len(curves) for rows in common}
    if not curve or min(curve.values()) <= 0:
        return None
    rows = max(1.0, counts.step_rows / counts.steps)
    return Capacity(counts.step_rows / ended, rows, prefill_s(counts, curve) / counts.steps, curve)


def prefill_s(counts: Counts, curve: Mapping[int, float]) -> float:
    """Seconds of prefill: what steps took beyond decode steps with as many rows in the mean."""
    rows = max(1.0, counts.step_rows / max(1.0, counts.steps))
    return max(0.0, counts.busy_seconds - counts.steps * _time_of(curve, rows))


def max_work_s(objectives: Objectives, capacity: Capacity | None, beyond: Container[str] = ()) -> float:
    """How long the work of a whole request may take, s, by the limits that fewer rows can keep.

    Work may take its share of every tail limit and all of the median's; all of a tail limit too where its
    share is too little for a request that is served alone. What even that one misses limits nothing. A limit
    on the first token limits the steps, and the whole request is so many of them.

    Args:
        beyond: names of limits that are known to be out of reach.
    """
    first = objectives.signal == "firstToken"
    if first and capacity is None:
        return math.inf
    least = 0.0 if capacity is None else capacity.work_s(1)
    found = math.inf
    for name, (edge, required) in objectives.latency.items():
        for allowed in (edge * WORK_SHARE, edge) if required >= TAIL else (edge,):
            work = capacity.row_steps * (allowed - capacity.prompt_s) if first and capacity else allowed
            if work >= least and name not in beyond:
                found = min(found, work)
                break
    return found


def demand(observation: Observation, waiting: float, long_s: float) -> float:
    """Requests/s that one engine has to complete.

    The busier window, its rise carried on for half a long window, and the backlog worked off in that time.
    """
    short, long = (arrival_rate(observation, window) for window in ("short", "long"))
    rise = max(0.0, short - long)
    return (max(short, long) + rise + waiting / (long_s / 2)) / max(1, len(observation.ready))


def slots_for(capacity: Capacity, wanted: float, now: int, most: float, work_s: float) -> Slots:
    """Worker slots for a demand of ``wanted`` requests/s: never beyond the knee, with room for bursts."""
    knee = capacity.knee(work_s, most)
    rows = capacity.rows_for(wanted, knee)
    in_work = wanted * capacity.work_s(rows)
    after = count_for(max(rows, in_work + SPREAD * math.sqrt(in_work), now + 1))
    after = int(min(after, most, max(knee, now)))
    return Slots(after, in_work, capacity.rate(max(1, after)) / capacity.rate(max(1, min(now, after))))


def count_for(wanted: float) -> int:
    """The first value of ``COUNTS`` that is at least ``wanted``, else the last."""
    return next((value for value in COUNTS if value >= wanted), COUNTS[-1])


def _time_of(curve: Mapping[int, float], rows: float) -> float:
    """The curve at ``rows``: linear between its points, and on beyond them.

    It goes on with the slope of its last two points, or of the whole curve where that is steeper: points are
    measured at different times, and one of a faster moment would promise that more rows cost nothing.
    """
    known = list(curve)
    if rows <= known[-1] or len(known) == 1:
        return time_of(curve, rows)
    high = known[-1]
    slope = max((curve[high] - curve[low]) / (high - low) for low in (known[0], known[-2]))
    return curve[high] + max(0.0, slope) * (rows - high)
