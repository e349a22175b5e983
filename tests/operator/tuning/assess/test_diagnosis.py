"""What is at fault in a breach: reason and message."""

from __future__ import annotations

from typing import Any

import pytest
from tests.operator.tuning.observations import BAD, context_of, curve, gauges, observe, three

WIDE = {"numWorkers": 16, "batchSize": 16}
QUEUED = {"admission_wait": 0.7, "decode": 0.3}
CASES: list[tuple[dict[str, Any], str, str, str]] = [
    ({}, "", "AllMet", "every objective that can be judged is met"),
    (
        {"attained": BAD, "stages": QUEUED},
        "admission_wait",
        "QueueAtAdmission",
        "p95 is breached: waiting for admission is 70% of request time",
    ),
    (
        {"attained": BAD, "stages": {"tier_load": 0.7, "decode": 0.3}},
        "tier_load",
        "TierLoadSlow",
        "p95 is breached: loading from slower tiers is 70% of request time",
    ),
    (
        {"attained": BAD, "stages": QUEUED, "busy": 0.97, "gauges": gauges(marginal_gain=0.05)},
        "admission_wait",
        "DeviceSaturated",
        "p95 is breached: waiting for admission is 70% of request time, and the device is saturated",
    ),
    (
        {"gauges": gauges(memory_ratio=0.95)},
        "",
        "MemoryOverLimit",
        "memory is at 95% of its limit, 80% is allowed",
    ),
]


def test_a_queue_that_just_formed_is_seen_before_its_requests_end() -> None:
    def of(waiting: float) -> str:
        pods = three(attained=BAD, stages={"decode": 1.0}, gauges=gauges(waiting=waiting, running=8.0))
        return context_of(observe(*pods, config=WIDE)).diagnosis.message

    assert of(4.0) == "p95 is breached: decode is 100% of request time"
    # 20 requests/s that wait in a queue of 20 wait 1 s each.
    assert of(20.0) == "p95 is breached: waiting for admission is 50% of request time"


@pytest.mark.parametrize(("per_row", "full"), [(0.0001, False), (0.02, True)])
def test_many_rows_are_not_full_while_twice_as_many_bring_more(per_row: float, full: bool) -> None:
    """One more row of 16 brings at most 6%, on any device."""
    shown = gauges(marginal_gain=0.05, curve=curve(0.016, per_row))
    pods = three(attained=BAD, stages=QUEUED, busy=0.97, rows=16, row_rate=16 / shown.curve[16], gauges=shown)
    assert context_of(observe(*pods, config=WIDE)).diagnosis.saturated is full


@pytest.mark.parametrize(("per_row", "full"), [(0.0001, False), (0.02, True), (None, False)])
def test_without_the_gain_of_one_more_row_the_curve_says_what_is_full(
    per_row: float | None, full: bool
) -> None:
    known = {} if per_row is None else curve(0.016, per_row)
    shown, row_rate = gauges(marginal_gain=None, curve=known), 16 / known.get(16, 0.02)
    pods = three(attained=BAD, stages=QUEUED, busy=0.97, rows=16, row_rate=row_rate, gauges=shown)
    assert context_of(observe(*pods, config=WIDE)).diagnosis.saturated is full
    calm = three(attained=BAD, stages=QUEUED, busy=0.5, rows=16, row_rate=row_rate, gauges=shown)
    assert not context_of(observe(*calm, config=WIDE)).diagnosis.saturated


def test_replicas_that_say_the_gain_of_one_more_row_speak_for_the_others() -> None:
    first, *_ = three(attained=BAD, stages=QUEUED, busy=0.97, gauges=gauges(marginal_gain=None))
    for gain, full in ((0.05, True), (0.5, False)):
        telling = three(attained=BAD, stages=QUEUED, busy=0.97, gauges=gauges(marginal_gain=gain))[1:]
        assert context_of(observe(first, *telling, config=WIDE)).diagnosis.saturated is full


@pytest.mark.parametrize(("figures", "stage", "reason", "message"), CASES, ids=[case[2] for case in CASES])
def test_diagnosis_names_stage_and_reason(
    figures: dict[str, Any], stage: str, reason: str, message: str
) -> None:
    diagnosis = context_of(observe(*three(**figures), config=WIDE)).diagnosis
    assert (diagnosis.stage, diagnosis.reason, diagnosis.message) == (stage, reason, message)
    assert diagnosis.saturated is (reason == "DeviceSaturated")
