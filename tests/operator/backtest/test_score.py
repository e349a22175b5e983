"""What a run is worth, on requests that were chosen for it."""

from __future__ import annotations

import math

import pytest

from kvpilot_operator.backtest.engine import Ended
from kvpilot_operator.backtest.score import (
    Judge,
    Windows,
    paired_interval,
    reversals,
    score,
    wrong_direction,
)
from kvpilot_operator.tuning.pace import PACES, PaceName
from kvpilot_operator.tuning.policy import Objectives

OBJECTIVES = Objectives("request", {"p50": (0.1, 0.5), "p95": (0.5, 0.95)}, 0.0, 0.0, 0.0, 0.9, 0.1)


def windows_of(ended: list[Ended], objectives: Objectives, pace: PaceName) -> Windows:
    judge = Judge(objectives, 0.0, 60.0, PACES[pace])
    for item in ended:  # as they end, in any order
        judge.add([item])
    return judge.windows()


def minute(number: int, *, count: int = 100, late: int = 0, took: float = 0.05) -> list[Ended]:
    """Requests of one minute, of which some failed."""
    return [(60.0 * number + 0.5 * index, math.inf if index < late else took, 0.01) for index in range(count)]


@pytest.mark.parametrize(
    ("requests", "missed"),
    [
        (minute(0, late=5), False),
        (minute(0, late=6), True),
        (minute(0, took=0.2), True),
        (minute(0, count=49, late=49), False),
        (minute(0, count=50, late=3), True),
    ],
    ids=["exactly the target", "one too many", "the median", "too few requests", "just enough"],
)
def test_window_misses_an_objective_below_its_target(requests: list[Ended], missed: bool) -> None:
    assert windows_of(requests, OBJECTIVES, "Standard").missed == (missed,)


def test_windows_are_ten_seconds_at_the_fast_pace() -> None:
    found = windows_of(minute(0, late=60), OBJECTIVES, "Fast")
    assert found.missed == (True, True, True, False, False, False)
    assert found.violation_minutes == 0.5


def test_time_to_the_first_token_is_judged_where_the_objective_says_so() -> None:
    first_token = Objectives("firstToken", OBJECTIVES.latency, 0.0, 0.0, 0.0, 0.9, 0.1)
    slow_answers = minute(0, took=30.0)
    assert windows_of(slow_answers, first_token, "Standard").missed == (False,)


@pytest.mark.parametrize(
    ("missed", "cure"),
    [("....", None), (".xx...", 120.0), (".x.x...", 180.0), (".xx..", 240.0), ("..xx", 120.0)],
    ids=["no breach", "cured", "cured for good only", "not clean for long enough", "never cured"],
)
def test_time_to_cure_ends_with_three_clean_windows(missed: str, cure: float | None) -> None:
    assert Windows(0.0, 60.0, tuple(mark == "x" for mark in missed)).time_to_cure_s == cure


def test_reversals_are_opposite_changes_within_half_an_hour() -> None:
    assert reversals([(0, 2, 4), (600, 4, 3), (1200, 3, 2), (4000, 2, 3)]) == 1


def test_replicas_removed_in_a_missed_window_are_the_wrong_direction() -> None:
    windows = Windows(0.0, 60.0, (True, False))
    assert wrong_direction([(30, 4, 3), (40, 3, 4), (90, 4, 3)], windows) == 1


def test_score_weighs_hours_by_lambda() -> None:
    assert score({"violation_minutes": 4.0, "gpu_hours": 2.0}, 3.0) == 10.0


def test_paired_interval_holds_the_mean_and_says_nothing_of_one_pair() -> None:
    mean, low, high = paired_interval([-3.0, -2.0, -4.0, -3.0, -2.5])
    assert (mean, low < mean < high < 0) == (-2.9, True)
    assert paired_interval([-3.0]) == (-3.0, -math.inf, math.inf)
