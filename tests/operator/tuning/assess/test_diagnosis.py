"""What is at fault in a breach: reason and message."""

from __future__ import annotations

from typing import Any

import pytest
from tests.operator.tuning.observations import BAD, context_of, gauges, observe, three

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


@pytest.mark.parametrize(("figures", "stage", "reason", "message"), CASES, ids=[case[2] for case in CASES])
def test_diagnosis_names_stage_and_reason(
    figures: dict[str, Any], stage: str, reason: str, message: str
) -> None:
    diagnosis = context_of(observe(*three(**figures), config=WIDE)).diagnosis
    assert (diagnosis.stage, diagnosis.reason, diagnosis.message) == (stage, reason, message)
    assert diagnosis.saturated is (reason == "DeviceSaturated")
