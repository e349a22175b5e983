"""Arithmetic of the step curve: what ``STEP_CURVE_SECONDS`` and ``STEP_MARGINAL_GAIN`` mean.

A curve maps rows, in ascending order, to the seconds of a decode step with so many.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping


def completed(live: Mapping[int, float], started: Mapping[int, float]) -> dict[int, float]:
    """The live curve; other buckets take the start-up value, in proportion to the nearest live one."""
    found = dict(live)
    near = [bucket for bucket in live if bucket in started]
    for bucket, seconds in started.items():
        if bucket not in live:
            other = min(near, key=lambda known: abs(math.log2(known / bucket)), default=None)
            found[bucket] = seconds if other is None else seconds * live[other] / started[other]
    return dict(sorted(found.items()))


def marginal_gain(curve: Mapping[int, float], rows: float, prefill_s: float) -> float:
    """Relative gain of tokens/s by one more row of the same mix; 1 without a curve.

    Args:
        rows: rows of a mean step, which spends ``prefill_s`` on prefill.
    """
    now = time_of(curve, rows) + prefill_s
    more = time_of(curve, rows + 1) + prefill_s * (rows + 1) / rows
    if now <= 0.0 or more <= 0.0:
        return 1.0
    return (rows + 1) / more / (rows / now) - 1.0


def time_of(curve: Mapping[int, float], rows: float) -> float:
    """``t(rows)`` on a curve in ascending order of rows, s; 0 if the curve is empty."""
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
