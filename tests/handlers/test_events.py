"""Events on transitions only."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from kvpilot_operator import events
from kvpilot_operator.tuning.decision import Outcome, Record


def status(**conditions: tuple[str, str]) -> dict[str, Any]:
    return {
        "conditions": [
            {"type": name, "status": value, "reason": reason, "message": f"{reason}."}
            for name, (value, reason) in conditions.items()
        ]
    }


def record(outcome: Outcome) -> Record:
    return Record("d-0042", 1.0, "workers-up", outcome, "numWorkers 8 -> 16", None, ())


def test_the_same_status_says_nothing_twice() -> None:
    same = status(Ready=("True", "Serving"), SLOMet=("False", "Breached"))
    assert events.transitions(same, same, ()) == ()


def test_a_condition_that_turns_is_told_with_its_own_reason() -> None:
    before, after = status(SLOMet=("True", "AllMet")), status(SLOMet=("False", "Breached"))
    assert events.transitions(before, after, ()) == (events.Event("Warning", "Breached", "Breached."),)
    assert events.transitions(after, before, ()) == (events.Event("Normal", "AllMet", "AllMet."),)


def test_a_condition_that_appears_as_it_should_be_is_no_news_but_ready_is() -> None:
    first = status(
        Ready=("True", "Serving"), Paused=("False", "NotPaused"), MetricsTrusted=("False", "Stale")
    )
    told = events.transitions({}, first, ())
    assert [(event.kind, event.reason) for event in told] == [("Normal", "Serving"), ("Warning", "Stale")]


def test_a_condition_that_nobody_watches_tells_nothing() -> None:
    assert events.transitions(status(Odd=("True", "A")), status(Odd=("False", "B")), ()) == ()


def test_a_decision_that_the_status_knows_is_not_told_again() -> None:
    known = {"decisions": [{"id": "d-0042", "outcome": "Started"}]}
    told = events.transitions(known, known, (record("Started"), record("Promoted")))
    assert [event.reason for event in told] == ["ChangePromoted"]


@pytest.mark.parametrize("outcome", get_args(Outcome))
def test_every_outcome_has_an_event(outcome: Outcome) -> None:
    (event,) = events.transitions({}, {}, (record(outcome),))
    assert event.message == "d-0042 (workers-up): numWorkers 8 -> 16"
    assert event.reason.isalnum()
    assert (event.kind == "Warning") == (outcome in {"Reverted", "Aborted", "Infeasible"})
