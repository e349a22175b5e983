"""The curve of step time, and the gain of one more row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvpilot_engine.contract import metrics as names
from kvpilot_engine.core.step_meter import StepMeter


def settled(curve: dict[int, float], rows: int, prefill_rows: int, seconds: float) -> StepMeter:
    """A meter after many steps of one kind."""
    meter = StepMeter()
    for bucket, time in curve.items():
        meter.calibrate(bucket, time)
    for _ in range(2000):
        meter.record(rows, prefill_rows, seconds)
    return meter


def test_gain_follows_the_curve() -> None:
    flat = settled({1: 0.002, 2: 0.002, 4: 0.002, 8: 0.002}, 4, 0, 0.002)
    assert flat.marginal_gain() == pytest.approx(0.25, rel=0.01)
    linear = settled({1: 0.002, 2: 0.004, 4: 0.008, 8: 0.016}, 4, 0, 0.008)
    assert linear.marginal_gain() == pytest.approx(0.0, abs=0.001)


def test_a_slower_machine_is_no_step_between_measured_and_unmeasured() -> None:
    """Started when idle, now three times slower with 2 rows: 4 rows are taken to be so as well."""
    meter = settled({1: 0.002, 2: 0.002, 4: 0.003, 8: 0.004}, 2, 0, 0.006)
    assert meter.curve == pytest.approx({1: 0.006, 2: 0.006, 4: 0.009, 8: 0.012})


def test_a_bucket_is_forgotten_when_its_last_step_is_long_ago() -> None:
    """Measured with 8 rows in a bad minute, then 2 rows again for 60 busy seconds."""
    meter = settled({2: 0.002, 8: 0.004}, 8, 0, 0.5)
    for _ in range(30_000):
        meter.record(2, 0, 0.002)
    assert meter.curve == pytest.approx({2: 0.002, 8: 0.004})
    assert meter.marginal_gain() > 0.1


def test_unmeasured_neighbours_count_as_free() -> None:
    meter = settled({}, 4, 0, 0.002)
    assert meter.marginal_gain() == pytest.approx(0.25, rel=0.01)
    assert StepMeter().marginal_gain() == 1.0


def test_heavy_prefill_saturates_with_few_rows() -> None:
    curve = {1: 0.002, 2: 0.0021, 4: 0.0022, 8: 0.0024}
    busy = settled(curve, rows=2, prefill_rows=1, seconds=0.04)
    assert busy.marginal_gain() < 0.05
    calm = settled(curve, rows=2, prefill_rows=0, seconds=0.0021)
    assert calm.marginal_gain() > 0.4


def test_a_step_counts_for_the_bucket_at_or_above_its_rows() -> None:
    meter = settled({}, 5, 0, 0.003)
    assert meter.curve == {8: pytest.approx(0.003)}
    assert (meter.steps, meter.rows_sum) == (2000, 10_000)
    assert meter.busy_s == pytest.approx(6.0)
    mixed = settled({}, 5, 1, 0.003)
    assert mixed.curve == {}
    # Prefill counts by bucket, as it is work that the engine does with those rows.
    assert (mixed.bucket_rows[8], mixed.bucket_rows[4]) == (10_000, 0)
    assert mixed.bucket_s[8] == pytest.approx(6.0)


def test_the_curve_exists_from_the_start(make_engine: Callable[..., Any]) -> None:
    gauges = make_engine().engine.sample("s").gauges
    curve = [gauges[names.STEP_CURVE_SECONDS][str(rows)] for rows in (1, 2, 4, 8, 16, 32)]
    assert all(0 < seconds < 1 for seconds in curve)
    assert curve[-1] > curve[0]
    assert gauges[names.STEP_MARGINAL_GAIN][""] > 0
