"""Capacity from the engines' own curve: Little's law, the knee, and slots for a demand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.operator.tuning.observations import curve, gauges, many, observe
from tests.operator.tuning.policies import PRODUCTION

from kvpilot_operator.tuning.assess.capacity import (
    COUNTS,
    USE,
    Capacity,
    count_for,
    demand,
    max_work_s,
    measured,
    slots_for,
)
from kvpilot_operator.tuning.observation import Observation

CURVED = gauges(curve=curve())


def capacity(base: float = 0.016, per_row: float = 0.0008, prefill_s: float = 0.002) -> Capacity:
    """Engines that step with 4 rows; a request needs 10 row-steps."""
    return Capacity(10.0, 4.0, prefill_s, curve(base, per_row))


CAPACITIES = st.builds(
    Capacity,
    row_steps=st.floats(1, 500),
    rows=st.floats(1, 64),
    prefill_s=st.floats(0, 0.1),
    curve=st.builds(curve, st.floats(0.0005, 0.1), st.floats(0, 0.01)),
)
"""Engines whose steps grow with their rows along a line."""


def fleet(waiting: float = 0.0, **figures: float) -> Observation:
    """Three engines with 8 rows in a step of 24 ms, 30% of the time; a request needs 5 row-steps."""
    given = {"rows": 8, "row_rate": 1000 / 3, "busy": 0.3, "rate": 20.0, **figures}
    return observe(*many(3, gauges=replace(CURVED, waiting=waiting), **given))


def test_measured_engine_is_the_mean_one() -> None:
    found = measured(fleet())
    assert found is not None
    assert found.row_steps == pytest.approx(5.0)
    assert found.rows == pytest.approx(8.0)
    # A step takes 8 / 333 s = 24 ms, and a decode step with 8 rows 16 + 8 x 0.8 = 22.4 ms.
    assert found.prefill_s == pytest.approx(0.0016)
    assert found.step_s(8) == pytest.approx(0.024)


def test_nothing_is_measured_without_a_curve_or_without_work() -> None:
    assert measured(observe(*many(3))) is None
    assert measured(fleet(rate=0.0)) is None
    assert measured(observe(*many(3, gauges=gauges(curve={1: 0.0}), rows=8, row_rate=100.0))) is None


@given(CAPACITIES, st.floats(1, 256))
def test_littles_law(engine: Capacity, rows: float) -> None:
    """Requests in work are those that complete per second times the time each is in work."""
    assert engine.rate(rows) * engine.work_s(rows) == pytest.approx(rows)


@given(CAPACITIES, st.floats(1, 256), st.floats(1, 256))
def test_more_rows_never_complete_less_and_never_work_faster(engine: Capacity, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert engine.rate(high) >= engine.rate(low) * (1 - 1e-9)
    assert engine.work_s(high) >= engine.work_s(low) * (1 - 1e-9)


@given(CAPACITIES, st.floats(0.01, 10), st.floats(1, 300))
def test_the_knee_pays_and_fits(engine: Capacity, limit: float, most: float) -> None:
    knee = engine.knee(limit, most)
    assert knee in COUNTS and knee <= most
    assert knee == 1 or engine.work_s(knee) <= limit
    following = next((rows for rows in COUNTS if rows > knee), None)
    if following is not None and following <= most and engine.work_s(following) <= limit:
        gain = engine.rate(following) / engine.rate(knee) - 1
        assert gain < 0.15 * math.log2(following / knee), "the next count does not pay"


@given(CAPACITIES, st.floats(0, 1000), st.integers(1, 256), st.floats(0.01, 10))
def test_slots_stay_within_bounds_and_the_knee(
    engine: Capacity, wanted: float, most: int, limit: float
) -> None:
    for now in {1, most // 2 or 1, most}:
        slots = slots_for(engine, wanted, now, most, limit)
        assert 1 <= slots.count <= most
        assert slots.count <= max(engine.knee(limit, most), now)
        assert slots.ratio >= 1 - 1e-9
        assert slots.count >= now


@given(CAPACITIES, st.floats(0, 1000), st.floats(0, 1000), st.floats(0.01, 10))
def test_more_demand_never_needs_fewer_slots(engine: Capacity, a: float, b: float, limit: float) -> None:
    low, high = sorted((a, b))
    assert slots_for(engine, low, 1, 256, limit).count <= slots_for(engine, high, 1, 256, limit).count


def test_slots_suffice_for_the_demand_with_room_for_bursts() -> None:
    engine = capacity()
    slots = slots_for(engine, 20.0, 2, 128, 0.5)
    rows = engine.rows_for(20.0, engine.knee(0.5, 128))
    assert USE * engine.rate(rows) >= 20.0 > USE * engine.rate(COUNTS[COUNTS.index(rows) - 1])
    assert slots.in_work == pytest.approx(20.0 * engine.work_s(rows))
    assert slots.count == count_for(slots.in_work + 2 * math.sqrt(slots.in_work)) == 12
    assert slots.ratio == pytest.approx(engine.rate(12) / engine.rate(2))
    assert slots_for(engine, 1000.0, 2, 128, 0.5).count == engine.knee(0.5, 128) == 24


def test_a_device_that_steps_no_faster_with_more_rows_has_its_knee_at_one() -> None:
    serial = capacity(base=0.0, per_row=0.01, prefill_s=0.0)
    assert serial.knee(10.0, 128) == 1
    assert slots_for(serial, 100.0, 1, 128, 10.0).count == 1


def test_curve_goes_on_with_its_last_slope() -> None:
    assert capacity(prefill_s=0.0).step_s(64) == pytest.approx(0.016 + 64 * 0.0008)
    assert Capacity(1.0, 1.0, 0.0, {4: 0.02}).step_s(64) == pytest.approx(0.02), "one point says no slope"


def test_last_point_of_a_faster_moment_promises_no_free_rows() -> None:
    # Measured on a shared machine: the step with the most rows was measured while it ran faster.
    measured_apart = {1: 0.0063, 8: 0.0102, 16: 0.0138, 32: 0.0194, 64: 0.0115}
    engine = Capacity(64.0, 48.0, 0.002, measured_apart)
    assert engine.step_s(96) - 2 * 0.002 == pytest.approx(0.0115 + 32 * (0.0115 - 0.0063) / 63)
    assert engine.rate(96) < 2 * engine.rate(48)


@pytest.mark.parametrize(
    ("latency", "seconds"),
    [
        (PRODUCTION.latency, 0.1),
        ({"p50": (0.5, 0.5), "p95": (0.5, 0.95)}, 0.25),
        ({"p99": (1.0, 0.99)}, 0.5),
        ({}, math.inf),
    ],
)
def test_work_may_take_half_of_a_tail_limit_and_all_of_the_median(
    latency: dict[str, tuple[float, float]], seconds: float
) -> None:
    assert max_work_s(replace(PRODUCTION, latency=latency), None) == pytest.approx(seconds)
    assert max_work_s(replace(PRODUCTION, latency=latency), capacity(base=0.001)) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("step_s", "beyond", "seconds"),
    [
        (0.005, set(), 0.1),
        (0.02, set(), 0.25),
        (0.02, {"p95"}, 0.5),
        (0.04, set(), 0.5),
        (0.06, set(), 1.0),
        (0.2, set(), math.inf),
    ],
    ids=[
        "p50",
        "p50 out of reach",
        "p95 known to be so too",
        "the share of p95 out of reach",
        "p99 alone",
        "none",
    ],
)
def test_what_a_request_alone_misses_does_not_limit_the_work(
    step_s: float, beyond: set[str], seconds: float
) -> None:
    engine = Capacity(10.0, 1.0, 0.0, {1: step_s})
    assert max_work_s(PRODUCTION, engine, beyond) == pytest.approx(seconds)


def test_a_limit_on_the_first_token_limits_the_step_with_the_prompt() -> None:
    # A prompt takes 5 ms, of which a mean step with 4 rows has 2 ms.
    engine = capacity()
    assert engine.first_token_s(1) == pytest.approx(engine.curve[1] + 0.005)
    assert engine.first_token_s(4) == pytest.approx(engine.step_s(4) + 0.0045)
    wanted = replace(PRODUCTION, signal="firstToken")
    assert max_work_s(wanted, None) == math.inf
    limit = max_work_s(wanted, engine)
    rows = next(rows for rows in range(1, 1000) if engine.work_s(rows + 1) > limit)
    assert engine.first_token_s(rows) <= 0.1 < engine.first_token_s(rows + 1)


def test_rows_are_flat_where_twice_as_many_bring_little() -> None:
    assert not capacity(prefill_s=0.0).flat()
    assert capacity(base=0.0005, per_row=0.01, prefill_s=0.0).flat()


def test_demand_carries_a_rise_on_and_works_the_backlog_off() -> None:
    steady = fleet()
    assert demand(steady, 0.0, 60.0) == pytest.approx(20.0)
    assert demand(steady, 90.0, 60.0) == pytest.approx(21.0), "90 requests in 30 s on three engines"
    rising = observe(
        *(
            replace(item, sample=replace(item.sample, windows={**item.sample.windows, "short": short}))
            for item in steady.replicas
            if item.sample is not None
            for short in [replace(item.sample.windows["short"], arrivals=300.0)]
        )
    )
    assert demand(rising, 0.0, 60.0) == pytest.approx(30.0 + 10.0)


@pytest.mark.parametrize(
    ("wanted", "count"), [(0.0, 1), (1.0, 1), (2.1, 3), (17.0, 24), (256.0, 256), (1e9, 256)]
)
def test_counts_are_powers_of_two_and_those_between(wanted: float, count: int) -> None:
    assert count_for(wanted) == count
