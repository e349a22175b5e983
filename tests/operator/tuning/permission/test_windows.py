"""Windows by cron schedules and time zones, and what they permit."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from tests.operator.tuning.observations import BAD, NOW, gauges, observe, replica, three
from tests.operator.tuning.policies import policy_of

from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.decision import Decision, Scale
from kvpilot_operator.tuning.observation import Observation
from kvpilot_operator.tuning.permission.windows import (
    check_schedule,
    check_zone,
    closed,
    in_force,
    open_until,
    opens_at,
)
from kvpilot_operator.tuning.policy import Scaling, ScheduledBounds, Window
from kvpilot_operator.tuning.state import TuningState

BERLIN = "Europe/Berlin"
HOUR = 3600.0
SMALL = {"numWorkers": 2, "batchSize": 2}
QUEUED = {"admission_wait": 0.71, "prefill": 0.04, "decode": 0.25}
KNOWN = TuningState(last_generation=1)


def at(text: str, zone: str = "UTC", *, fold: int = 0) -> float:
    """A local time as s since the epoch; ``fold`` 1 is the second one of a repeated hour."""
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone), fold=fold).timestamp()


@pytest.mark.parametrize(
    ("moment", "closes"),
    [
        ("2026-06-01T21:59:59", None),
        ("2026-06-01T22:00:00", "2026-06-02T06:00:00"),
        ("2026-06-02T05:59:59", "2026-06-02T06:00:00"),
        ("2026-06-02T06:00:00", None),
        ("2026-06-06T23:00:00", None),  # a Saturday
    ],
)
def test_a_window_is_open_from_its_start_for_its_duration(moment: str, closes: str | None) -> None:
    window = Window("0 22 * * 1-5", 8 * HOUR)
    assert open_until(window, at(moment)) == (None if closes is None else at(closes))


@pytest.mark.parametrize(
    ("start", "lasts_until", "following"),
    [
        # 02:30 does not exist on this day: the start comes right after the skipped hour.
        (at("2026-03-29T03:00:00", BERLIN), at("2026-03-29T04:00:00", BERLIN), 23.5),
        # 02:30 exists twice on this day: the start comes once, and the hour is one of elapsed time.
        (at("2026-10-25T02:30:00", BERLIN), at("2026-10-25T02:30:00", BERLIN, fold=1), 25.0),
    ],
    ids=["spring", "autumn"],
)
def test_a_window_follows_daylight_saving_time(start: float, lasts_until: float, following: float) -> None:
    window = Window("30 2 * * *", HOUR, BERLIN)
    assert open_until(window, start - 1) is None
    assert open_until(window, start) == lasts_until == start + HOUR
    assert open_until(window, lasts_until) is None
    assert (
        opens_at(window, lasts_until) == start - start % HOUR + (23.5 if start % HOUR == 0 else 25.5) * HOUR
    )


def test_a_window_starts_by_local_time_in_summer_and_in_winter() -> None:
    window = Window("0 22 * * *", HOUR, "America/New_York")
    assert open_until(window, at("2026-07-02T02:00:00")) == at("2026-07-02T03:00:00")
    assert open_until(window, at("2026-01-02T03:00:00")) == at("2026-01-02T04:00:00")


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("", "must be a cron schedule of 5 fields"),
        ("@daily", "must be a cron schedule of 5 fields"),
        ("* * * * * *", "must be a cron schedule of 5 fields"),
        ("61 * * * *", "must be a cron schedule: bad minute"),
        ("0 0 31 2 *", "must be a cron schedule: bad day-of-month"),
    ],
)
def test_a_schedule_that_is_none_is_refused(schedule: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_schedule(schedule)


@pytest.mark.parametrize("zone", ["", "Berlin", "../etc/passwd", "Europe"])
def test_a_zone_that_is_none_is_refused(zone: str) -> None:
    with pytest.raises(ValueError, match="must be a time zone of the IANA database"):
        check_zone(zone)


def decided(policy: Any, now: float = NOW, **changes: Any) -> Decision:
    seen = observe(*three(attained=BAD, stages=QUEUED), config=SMALL, **changes)
    return decide(replace(seen, at=now), KNOWN, policy, now)


def outcomes(decision: Decision) -> list[str]:
    return [record.outcome for record in decision.records]


def saturated() -> Observation:
    full = {"attained": BAD, "busy": 0.95, "done": 0.5, "gauges": gauges(marginal_gain=0.02)}
    pods = (replica(f"chat-{index}", **full) for index in (0, 1))
    return observe(*pods, config={"numWorkers": 16, "batchSize": 16})


OPEN, CLOSED = Window("* * * * *", 120.0), Window("0 22 * * *", HOUR)
"""NOW is 02:46 in UTC."""


def test_no_experiment_begins_outside_of_every_window() -> None:
    decision = decided(policy_of(maintenance=(CLOSED,)))
    assert (decision.state.change, decision.actions) == (None, ())
    assert [(hold.reason, hold.message) for hold in decision.state.holds] == [
        (
            "OutsideMaintenanceWindow",
            "no maintenance window is open; the next one opens at 1970-01-01 22:00 UTC",
        )
    ]
    assert decided(policy_of(maintenance=(CLOSED, OPEN))).state.change is not None
    assert closed(policy_of(), NOW) == ""


def test_replicas_and_emergencies_wait_for_no_window() -> None:
    policy = policy_of(maintenance=(CLOSED,), scaling=Scaling(4, 6))
    assert Scale(4, "replicas-bounds") in decided(policy).actions
    busy = (
        replica(f"chat-{i}", attained=BAD, busy=0.95, done=0.5, gauges=gauges(marginal_gain=0.02))
        for i in (0, 1)
    )
    seen = observe(*busy, config={"numWorkers": 16, "batchSize": 16})
    assert [
        record.outcome for record in decide(seen, KNOWN, policy_of(maintenance=(CLOSED,)), NOW).records
    ] == ["ScaledOut"]
    full = observe(*three(gauges=gauges(memory_ratio=0.97)), config=SMALL)
    assert [
        record.outcome for record in decide(full, KNOWN, policy_of(maintenance=(CLOSED,)), NOW).records
    ] == ["Emergency"]


def test_relief_of_memory_waits_for_no_window() -> None:
    full = observe(*three(gauges=gauges(memory_ratio=0.9)), config=SMALL)
    decision = decide(full, KNOWN, policy_of(maintenance=(CLOSED,)), NOW)
    assert [(record.rule, record.outcome) for record in decision.records] == [("memory-relief", "Started")]
    assert decision.state.holds == ()


def bounds(*schedules: ScheduledBounds, gpu_limit: int | None = None) -> tuple[int, int, str]:
    scaling = in_force(
        policy_of(scaling=Scaling(2, 6, schedules=schedules, gpu_limit=gpu_limit)), NOW
    ).scaling
    assert scaling is not None
    return scaling.minimum, scaling.maximum, scaling.limited_by


def test_open_schedules_raise_the_minimum_and_replace_the_maximum() -> None:
    assert bounds() == (2, 6, "")
    assert bounds(ScheduledBounds(CLOSED, 5, 9)) == (2, 6, "")
    assert bounds(ScheduledBounds(OPEN, 5)) == (5, 6, "")
    assert bounds(ScheduledBounds(OPEN, 1)) == (2, 6, "")
    assert bounds(ScheduledBounds(OPEN, 3, 4), ScheduledBounds(OPEN, 5, 9)) == (5, 9, "")
    assert bounds(ScheduledBounds(OPEN, 3, 3), ScheduledBounds(OPEN, 5)) == (5, 5, "")


def test_the_budget_of_gpus_caps_every_bound() -> None:
    assert bounds(gpu_limit=6) == (2, 6, "")
    assert bounds(gpu_limit=4) == (2, 4, "budgets.maxGPUs allows 4 replicas")
    assert bounds(ScheduledBounds(OPEN, 5, 9), gpu_limit=4) == (4, 4, "budgets.maxGPUs allows 4 replicas")


def test_replicas_follow_a_schedule_in_every_mode() -> None:
    policy = policy_of(scaling=Scaling(1, 6, schedules=(ScheduledBounds(OPEN, 5),)), mode="Off")
    assert Scale(5, "replicas-bounds") in decided(policy).actions


def test_scaling_out_stops_at_the_budget_of_gpus_and_says_so() -> None:
    busy = (
        replica(f"chat-{i}", attained=BAD, busy=0.95, done=0.5, gauges=gauges(marginal_gain=0.02))
        for i in (0, 1)
    )
    seen = observe(*busy, config={"numWorkers": 16, "batchSize": 16})
    decision = decide(seen, KNOWN, policy_of(scaling=Scaling(1, 6, gpu_limit=2)), NOW)
    assert decision.actions == ()
    (hold,) = [hold for hold in decision.state.holds if hold.reason == "NoRemedy"]
    assert "replicas-up: GpuBudget, budgets.maxGPUs allows 2 replicas" in hold.message
