"""Events on transitions only."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, get_args

import pytest

from kvpilot_operator.status import events
from kvpilot_operator.status.model import ConditionStatus, DecisionStatus, Status
from kvpilot_operator.tuning.decision import DecisionOutcome, Record


def status(**conditions: tuple[Any, str]) -> Status:
    return Status(
        conditions=tuple(
            ConditionStatus(
                type=name, status=value, reason=reason, message=f"{reason}.", last_transition_time=1.0
            )
            for name, (value, reason) in conditions.items()
        )
    )


def record(outcome: DecisionOutcome) -> Record:
    return Record("d-0042", 1.0, "workers-up", outcome, "numWorkers 8 -> 16", None, ())


def test_same_status_has_no_event() -> None:
    same = status(Ready=("True", "Serving"), SLOMet=("False", "Breached"))
    assert events.transitions(same, same, ()) == ()


def test_condition_that_changes_has_an_event_with_its_reason() -> None:
    before, after = status(SLOMet=("True", "AllMet")), status(SLOMet=("False", "Breached"))
    assert events.transitions(before, after, ()) == (events.Event("Warning", "Breached", "Breached."),)
    assert events.transitions(after, before, ()) == (events.Event("Normal", "AllMet", "AllMet."),)


def test_first_status_reports_ready_and_faults_only() -> None:
    first = status(
        Ready=("True", "Serving"), Paused=("False", "NotPaused"), MetricsTrusted=("False", "Stale")
    )
    reported = events.transitions(Status(), first, ())
    assert [(event.kind, event.reason) for event in reported] == [("Normal", "Serving"), ("Warning", "Stale")]


def kinds(*steps: Status) -> list[tuple[str, str]]:
    found = [event for a, b in pairwise(steps) for event in events.transitions(a, b, ())]
    return [(event.kind, event.reason) for event in found]


def test_healthy_new_resource_starts_without_warnings() -> None:
    assert kinds(
        Status(),
        status(Ready=("False", "ReplicasStarting"), MetricsTrusted=("Unknown", "NoReplicaReady")),
        status(Ready=("True", "Serving"), MetricsTrusted=("False", "MetricsMissing")),
        status(Ready=("True", "Serving"), MetricsTrusted=("False", "MetricsPartial")),
        status(Ready=("True", "Serving"), MetricsTrusted=("True", "Fresh")),
    ) == [
        ("Normal", "ReplicasStarting"),
        ("Normal", "Serving"),
        ("Normal", "MetricsMissing"),
        ("Normal", "Fresh"),
    ]


def test_start_that_fails_is_a_warning() -> None:
    starting = status(Ready=("False", "ReplicasStarting"))
    stuck = status(Ready=("False", "NoReplicaReady"))
    assert kinds(starting, stuck, stuck) == [("Warning", "NoReplicaReady")]
    assert kinds(Status(), stuck) == [("Warning", "NoReplicaReady")]


def test_metrics_that_are_lost_later_are_a_warning() -> None:
    fresh, lost = status(MetricsTrusted=("True", "Fresh")), status(MetricsTrusted=("False", "MetricsMissing"))
    assert kinds(fresh, lost) == [("Warning", "MetricsMissing")]


def test_breach_that_becomes_critical_is_another_warning() -> None:
    breached, critical = (
        status(SLOMet=("False", "Breached")),
        status(SLOMet=("False", "ThroughputBelowFloor")),
    )
    assert kinds(breached, critical, critical, breached) == [("Warning", "ThroughputBelowFloor")]


def test_unknown_condition_has_no_event() -> None:
    assert events.transitions(status(Odd=("True", "A")), status(Odd=("False", "B")), ()) == ()


def test_decision_in_the_status_has_no_second_event() -> None:
    started = DecisionStatus(id="d-0042", at=1.0, rule="workers-up", outcome="Started", summary="")
    known = Status(decisions=(started,))
    reported = events.transitions(known, known, (record("Started"), record("Promoted")))
    assert [event.reason for event in reported] == ["ChangePromoted"]


@pytest.mark.parametrize("outcome", get_args(DecisionOutcome))
def test_every_outcome_has_an_event(outcome: DecisionOutcome) -> None:
    (event,) = events.transitions(Status(), Status(), (record(outcome),))
    assert event.message == "d-0042 (workers-up): numWorkers 8 -> 16"
    assert event.reason.isalnum()
    warnings = {"Reverted", "Aborted", "Harmful", "Infeasible", "Emergency", "Refused", "RolledBack"}
    assert (event.kind == "Warning") == (outcome in warnings)
