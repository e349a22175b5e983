"""Time of steps, and the gain of one more sequence."""

from __future__ import annotations

from bisect import bisect_left

from kvpilot_engine.contract.metrics import ROW_BUCKETS
from kvpilot_engine.contract.step_curve import completed, marginal_gain, time_of

_CURVE_WEIGHT = 0.05
"""Weight of one step in its bucket of the curve."""

_FRESH_S = 30.0
"""A bucket counts as measured until this much busy time after its last step."""

_MIX_WEIGHT = 0.005
"""Weight of one step in the mean rows and the mean prefill time: some 200 steps, a few seconds."""


class StepMeter:
    """Measured time of decode steps over rows, and what prefill adds to them.

    **Curve.** ``t(r)`` is the time of a step with r rows that all decode: a weighted mean per bucket of rows,
    linear between buckets, and constant beyond the largest one: without a measurement more rows cost
    nothing, so that a missing measurement never reads as saturation. A bucket without a step in the last 30
    busy seconds takes its start-up measurement, scaled by the change of the nearest measured bucket since
    start-up, so that a machine that became slower shows no false step between the two.

    **Gain.** A mean step has r rows and spends ``e`` seconds on prefill. Prefill is proportional to the
    number of sequences, so a step with x rows of the same mix takes ``T(x) = t(x) + e x / r`` and yields
    ``x / T(x)`` tokens/s. One more row raises that by ``((r + 1) / T(r + 1)) / (r / T(r)) - 1``. Without
    prefill this is the gain of the curve alone. Where prefill dominates, T grows with the rows and the gain
    approaches 0: the device is saturated with few rows. r and e are weighted means over recent steps.

    **By bucket.** ``bucket_rows`` and ``bucket_s`` sum rows and seconds of all steps, prefill included, by
    bucket of rows. Their ratio is the rate at which the engine advances that many rows. It does not depend on
    how many requests wait, so that two engines can be compared by it under any load.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.busy_s = 0.0
        self.rows_sum = 0
        self.bucket_rows = dict.fromkeys(ROW_BUCKETS, 0)
        self.bucket_s = dict.fromkeys(ROW_BUCKETS, 0.0)
        self._start: dict[int, float] = {}
        self._live: dict[int, float] = {}
        self._seen: dict[int, float] = {}  # busy seconds at the last step of each live bucket
        self._rows = 1.0
        self._prefill_s = 0.0

    def calibrate(self, rows: int, seconds: float) -> None:
        """Record a start-up measurement of a decode step."""
        self._start[rows] = seconds

    @property
    def curve(self) -> dict[int, float]:
        """Time of a decode step by bucket of rows, s."""
        live = {b: s for b, s in self._live.items() if self.busy_s - self._seen[b] <= _FRESH_S}
        if not live:
            return dict(sorted((self._start or self._live).items()))
        return completed(live, self._start)

    def record(self, rows: int, prefill_rows: int, seconds: float) -> None:
        """Record one step.

        Args:
            rows: sequences in it.
            prefill_rows: those of them in prefill.
            seconds: duration, from its schedule to its last output.
        """
        self.steps += 1
        self.busy_s += seconds
        self.rows_sum += rows
        bucket = ROW_BUCKETS[min(bisect_left(ROW_BUCKETS, rows), len(ROW_BUCKETS) - 1)]
        self.bucket_rows[bucket] += rows
        self.bucket_s[bucket] += seconds
        prefill_s = 0.0
        if prefill_rows:
            decodes = rows - prefill_rows
            prefill_s = max(0.0, seconds - (time_of(self.curve, decodes) if decodes else 0.0))
        else:
            before = self._live.get(bucket, seconds)
            self._live[bucket] = before + _CURVE_WEIGHT * (seconds - before)
            self._seen[bucket] = self.busy_s
        self._rows += _MIX_WEIGHT * (rows - self._rows)
        self._prefill_s += _MIX_WEIGHT * (prefill_s - self._prefill_s)

    def marginal_gain(self) -> float:
        """Relative gain of tokens/s from one more row, as defined above; 1 before any measurement."""
        rows, curve = self._rows, self.curve
        return marginal_gain(curve, rows, self._prefill_s)
