"""What steps cost, and what one more sequence would bring."""

from __future__ import annotations

import math
from bisect import bisect_left

from kvpilot_engine.contract.metrics import ROW_BUCKETS

_CURVE_WEIGHT = 0.05
"""Weight of one step in its bucket of the curve."""

_FRESH_S = 30.0
"""A bucket counts as measured for this much busy time after its last step."""

_MIX_WEIGHT = 0.005
"""Weight of one step in the mean rows and the mean prefill time: some 200 steps, a few seconds."""


class StepMeter:
    """Measured time of decode steps over rows, and what prefill adds to them.

    **Curve.** ``t(r)`` is the time of a step with r rows that all decode: a weighted mean per bucket of rows,
    linear between buckets, flat beyond the largest one (more rows at no cost, until that is measured: never
    saturated for want of a measurement). A bucket without a step in the last 30 busy seconds takes its
    start-up measurement, times what the nearest measured bucket has become against its own: the machine
    may have become slower since, and that must not look like a step between the two.

    **Gain.** In a mix, r rows also cause prefill: ``e`` seconds of a mean step are spent on it. Sequences
    bring prefill in proportion to their number, so ``T(x) = t(x) + e x / r`` is the time of a step with
    x rows of the same mix, and ``x / T(x)`` its tokens/s. One more row raises that by
    ``((r + 1) / T(r + 1)) / (r / T(r)) - 1``. Without prefill this is the curve's own gain. Where prefill
    dominates, T grows with the rows and the gain goes to 0: the device is full although rows are few.
    r and e are weighted means over recent steps.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.busy_s = 0.0
        self.rows_sum = 0
        self._start: dict[int, float] = {}
        self._live: dict[int, float] = {}
        self._seen: dict[int, float] = {}  # busy seconds at the last step of each live bucket
        self._rows = 1.0
        self._prefill_s = 0.0

    def calibrate(self, rows: int, seconds: float) -> None:
        """Take a start-up measurement of a decode step."""
        self._start[rows] = seconds

    @property
    def curve(self) -> dict[int, float]:
        """Time of a decode step by bucket of rows, s."""
        live = {b: s for b, s in self._live.items() if self.busy_s - self._seen[b] <= _FRESH_S}
        if not live:
            return dict(sorted((self._start or self._live).items()))
        found = dict(live)
        for bucket, seconds in self._start.items():
            if bucket in live:
                continue
            near = [other for other in live if other in self._start]
            other = min(near, key=lambda b: abs(math.log2(b / bucket)), default=None)
            found[bucket] = seconds if other is None else seconds * live[other] / self._start[other]
        return dict(sorted(found.items()))

    def record(self, rows: int, prefill_rows: int, seconds: float) -> None:
        """Count one step.

        Args:
            rows: sequences in it.
            prefill_rows: those of them that did not decode.
            seconds: from its schedule to its last output.
        """
        self.steps += 1
        self.busy_s += seconds
        self.rows_sum += rows
        prefill_s = 0.0
        if prefill_rows:
            decodes = rows - prefill_rows
            prefill_s = max(0.0, seconds - (time_of(self.curve, decodes) if decodes else 0.0))
        else:
            bucket = ROW_BUCKETS[min(bisect_left(ROW_BUCKETS, rows), len(ROW_BUCKETS) - 1)]
            before = self._live.get(bucket, seconds)
            self._live[bucket] = before + _CURVE_WEIGHT * (seconds - before)
            self._seen[bucket] = self.busy_s
        self._rows += _MIX_WEIGHT * (rows - self._rows)
        self._prefill_s += _MIX_WEIGHT * (prefill_s - self._prefill_s)

    def marginal_gain(self) -> float:
        """Relative gain of tokens/s from one more row, as defined above; 1 before anything was measured."""
        rows, curve = self._rows, self.curve
        now = time_of(curve, rows) + self._prefill_s
        more = time_of(curve, rows + 1) + self._prefill_s * (rows + 1) / rows
        if now <= 0.0 or more <= 0.0:
            return 1.0
        return (rows + 1) / more / (rows / now) - 1.0


def time_of(curve: dict[int, float], rows: float) -> float:
    """``t(rows)`` on a curve in ascending order, s; 0 when it is empty."""
    known = list(curve)
    if not known:
        return 0.0
    at = bisect_left(known, rows)
    if at == len(known):
        return curve[known[-1]]
    if at == 0:
        return curve[known[0]]
    low, high = known[at - 1], known[at]
    share = (rows - low) / (high - low)
    return curve[low] * (1 - share) + curve[high] * share
