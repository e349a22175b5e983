"""Predicted gains and the next value of a count."""

from __future__ import annotations

import pytest

from kvpilot_operator.tuning.observation import Counts
from kvpilot_operator.tuning.rules.prediction import (
    grown,
    ladder_gain,
    miss_gain,
    needed_concurrency,
    queue_gain,
    round_to,
)


def test_concurrency_follows_littles_law_without_waits() -> None:
    counts = Counts(
        outcomes={"ok": 80.0, "timeout": 20.0, "shed": 50.0},
        stage_seconds={"admission_wait": 900.0, "batch_wait": 90.0, "prefill": 10.0, "decode": 30.0},
    )
    assert needed_concurrency(counts, arrivals=20.0) == pytest.approx(20.0 * 0.5)  # 40 s of 80
    assert needed_concurrency(Counts(), arrivals=20.0) == 0.0


@pytest.mark.parametrize(
    ("now", "needed", "maximum", "after"),
    [
        (2, 1.0, 128, 4),  # at least twofold
        (3, 5.8, 128, 12),  # twice the need, on the ladder of counts
        (2, 90.0, 128, 8),  # at most fourfold
        (4, 40.0, 10, 10),  # within the bound
    ],
)
def test_count_grows_by_need_within_its_limits(now: int, needed: float, maximum: int, after: int) -> None:
    assert grown(now, needed, maximum) == after


def test_queue_gain_is_the_wait_that_the_added_servers_remove() -> None:
    assert queue_gain(0.7, now=2, after=8, needed=5.0) == pytest.approx(0.7)
    assert queue_gain(0.7, now=2, after=4, needed=12.0) == pytest.approx(0.35)  # bursts: 1 - now / after
    assert queue_gain(0.7, now=8, after=10, needed=5.0) == pytest.approx(0.7 * 0.2)


def test_gain_of_a_stage_scales_with_its_cost() -> None:
    assert ladder_gain(0.6, before=4, after=8) == pytest.approx(0.3)
    assert ladder_gain(0.6, before=0, after=4) == pytest.approx(0.3)
    assert ladder_gain(0.6, before=8, after=4) == 0.0


def test_misses_shrink_towards_the_ceiling() -> None:
    assert miss_gain(rate=0.5, ceiling=0.9, before=100, after=200) == pytest.approx(0.4)
    assert miss_gain(rate=0.9, ceiling=0.9, before=100, after=200) == 0.0


@pytest.mark.parametrize(
    ("value", "up", "rounded"), [(300.0, False, 256), (300.0, True, 384), (3.0, False, 128)]
)
def test_rounding_keeps_at_least_one_unit(value: float, up: bool, rounded: int) -> None:
    assert round_to(value, 128, up=up) == rounded
