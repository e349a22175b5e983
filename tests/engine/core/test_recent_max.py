"""The largest value of the last day."""

from __future__ import annotations

from kvpilot_engine.core.recent_max import RecentMax

DAY_S = 86_400.0


def test_a_value_counts_for_a_day_and_at_most_an_interval_longer() -> None:
    longest = RecentMax(DAY_S)
    assert longest.value(0.0) == 0.0
    longest.add(500.0, 10.0)
    longest.add(100.0, DAY_S / 2)
    assert longest.value(DAY_S) == 500.0
    assert longest.value(DAY_S * 1.1) == 100.0
    assert longest.value(3 * DAY_S) == 0.0


def test_the_largest_of_an_interval_stays() -> None:
    longest = RecentMax(DAY_S)
    for value in (5.0, 9.0, 7.0):
        longest.add(value, 1.0)
    assert longest.value(2.0) == 9.0
