"""The verdict of --check: each required step missing in turn, with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from kvpilot_operator.local.check import CheckResult, check_run
from kvpilot_operator.local.recorder import Point, ReplicaPoint
from kvpilot_operator.tuning.decision import Diagnosis, Objective, Record
from kvpilot_operator.tuning.state import KnobChange

LATENCY = ("p50", "p95")
ENGINES = tuple(ReplicaPoint(uid, uid, True, 0, 1, {}) for uid in ("a", "b"))


def point(at: float, p95: float, *, breached: bool = False, waiting: float = 0) -> Point:
    state = "Breached" if breached else "Met"
    return Point(
        at=at,
        tuning="Observe",
        load_phase="rise",
        objectives=(
            Objective("p50", 0.5, 0.9, 0.9, "Met"),
            Objective("p95", 0.95, p95, p95, state),
            Objective("memory", 0.9, 0.99, 0.99, "Breached"),
        ),
        diagnosis="",
        quantiles={},
        stages={},
        arrivals=1,
        completed=1,
        hit_rate=None,
        ceiling=None,
        memory=None,
        waiting=waiting,
        running=1,
        generation=1,
        knobs={},
        replicas=ENGINES,
        holds=(),
    )


def record(at: float, outcome: str, *, stage: str = "admission_wait", name: str = "d-0001") -> Record:
    return Record(
        id=name,
        at=at,
        rule="workers-up",
        outcome=outcome,  # type: ignore[arg-type]
        summary=f"{outcome}.",
        diagnosis=Diagnosis("p95", stage, "QueueAtAdmission", "waiting is 80%"),
        objectives=(),
        changes=(KnobChange("numWorkers", 1, 4),),
        generation=2,
    )


POINTS = (
    point(1, 1.0),
    point(2, 0.2, breached=True, waiting=9),
    point(5, 0.9, breached=True, waiting=2),
    point(6, 0.96),
    point(7, 0.96),
    point(8, 0.97),
)
RECORDS = (record(3, "Started"), record(4, "Promoted"))


def judged(
    points: Sequence[Point] = POINTS, records: Sequence[Record] = RECORDS, mode: str = "Auto"
) -> CheckResult:
    return check_run(points, records, LATENCY, mode)


def test_cure_is_reported_with_its_change() -> None:
    check = judged()
    assert check.cured
    assert [(step.name, step.at) for step in check.steps] == [
        ("breach", 2),
        ("diagnosis", 3),
        ("change", 4),
        ("met again", 8),
        ("same replicas", 8),
    ]
    assert check.reason == "cured: numWorkers 1 -> 4 (generation 2, workers-up)"


@pytest.mark.parametrize(
    ("points", "records", "mode", "reason"),
    [
        (POINTS[:1], (), "Auto", "no latency objective was breached"),
        (POINTS, (), "Off", "no knob was changed for a breached latency objective: tuning mode is Off"),
        (POINTS, (record(3, "Recommended"),), "Recommend", "tuning mode is Recommend"),
        (POINTS, (record(3, "Started", stage=""),), "Auto", "no knob was changed"),
        (POINTS, (record(1, "Started"), record(4, "Promoted")), "Auto", "no knob was changed"),
        (POINTS, RECORDS[:1], "Auto", "no change was promoted before the end"),
        (POINTS, (RECORDS[0], record(4, "Reverted")), "Auto", "the change was reverted: Reverted."),
        (POINTS[:5], RECORDS, "Auto", "the objectives were not met again before the end"),
        (POINTS[:3], RECORDS, "Auto", "not met again before the end (p95 90% of 95%)"),
        ((*POINTS[:5], point(8, 0.97, waiting=5)), RECORDS, "Auto", "(a backlog remains)"),
        (
            (*POINTS[:5], point(8, 0.5), point(9, 0.97), point(10, 0.97)),
            RECORDS,
            "Auto",
            "not met again",
        ),
        (
            (*POINTS[:5], replace(POINTS[5], replicas=(ENGINES[0], replace(ENGINES[1], restarts=1)))),
            RECORDS,
            "Auto",
            "a replica was added, replaced or restarted meanwhile",
        ),
        (
            (*POINTS[:5], replace(POINTS[5], replicas=(*ENGINES, replace(ENGINES[0], uid="c")))),
            RECORDS,
            "Auto",
            "a replica was added, replaced or restarted meanwhile",
        ),
    ],
)
def test_first_missing_step_is_the_reason(
    points: Sequence[Point], records: Sequence[Record], mode: str, reason: str
) -> None:
    check = judged(points, records, mode)
    assert not check.cured
    assert reason in check.reason


def test_reverted_first_attempt_does_not_fail_the_check() -> None:
    records = (
        record(2, "Started", name="d-0001"),
        record(3, "Reverted", name="d-0001"),
        record(3, "Started", name="d-0002"),
        record(4, "Promoted", name="d-0002"),
    )
    assert judged(records=records).cured


def test_replica_started_before_the_breach_does_not_count_as_replaced() -> None:
    first = replace(POINTS[0], replicas=ENGINES[:1])
    assert judged((first, *POINTS[1:])).cured
