"""What steps cost, and what one more sequence would bring."""

from __future__ import annotations

from bisect import bisect_left

from kvpilot_engine.contract.metrics import ROW_BUCKETS

_CURVE_WEIGHT = 0.05
"""Weight of one step in its bucket of the curve."""

_MIX_WEIGHT = 0.005
"""Weight of one step in the mean rows and the mean prefill time: some 200 steps, a few seconds."""


class StepMeter:
    """Measured time of decode steps over rows, and what prefill adds to them.

    **Curve.** ``t(r)`` is the time of a step with r rows that all decode: a weighted mean per bucket of rows,
    linear between measured buckets, flat beyond the largest measured one (more rows at no cost, until
    that is measured: never saturated for want of a measurement).

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
        self.curve: dict[int, float] = {}
        self._rows = 1.0
        self._prefill_s = 0.0

    def calibrate(self, rows: int, seconds: float) -> None:
        """Take a start-up measurement of a decode step as the first point of a bucket."""
        self.curve[rows] = seconds

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
            prefill_s = max(0.0, seconds - (self.time(decodes) if decodes else 0.0))
        else:
            bucket = ROW_BUCKETS[min(bisect_left(ROW_BUCKETS, rows), len(ROW_BUCKETS) - 1)]
            before = self.curve.get(bucket, seconds)
            self.curve[bucket] = before + _CURVE_WEIGHT * (seconds - before)
        self._rows += _MIX_WEIGHT * (rows - self._rows)
        self._prefill_s += _MIX_WEIGHT * (prefill_s - self._prefill_s)

    def marginal_gain(self) -> float:
        """Relative gain of tokens/s from one more row, as defined above; 1 before anything was measured."""
        rows = self._rows
        now = self.time(rows) + self._prefill_s
        more = self.time(rows + 1) + self._prefill_s * (rows + 1) / rows
        if now <= 0.0 or more <= 0.0:
            return 1.0
        return (rows + 1) / more / (rows / now) - 1.0

    def time(self, rows: float) -> float:
        """``t(rows)``, s; 0 before anything was measured."""
        known = sorted(self.curve)
        if not known:
            return 0.0
        at = bisect_left(known, rows)
        if at == len(known):
            return self.curve[known[-1]]
        if at == 0:
            return self.curve[known[0]]
        low, high = known[at - 1], known[at]
        share = (rows - low) / (high - low)
        return self.curve[low] * (1 - share) + self.curve[high] * share
