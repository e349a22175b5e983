"""`kvpilot explain`: sentences from a status and records, the same in both modes."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
from typer.testing import CliRunner

from kvpilot_operator.resource.times import from_rfc3339
from kvpilot_operator.status.explain import explain
from kvpilot_operator.tuning.decision import Diagnosis, Record, Rejected, StageShare
from kvpilot_operator.tuning.state import KnobChange

RUN = CliRunner()


def manifest(mode: str = "Auto", **status: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "chat", "namespace": "team-a"},
        "spec": {"tuning": {"mode": mode}},
        "status": status,
    }


def whole_record(outcome: Any = "Promoted") -> dict[str, Any]:
    record = Record(
        id="d-0042",
        at=1_700_000_000.0,
        rule="workers-up",
        outcome=outcome,
        summary="numWorkers 8 -> 16; p95 met.",
        diagnosis=Diagnosis(
            "p95",
            "admission_wait",
            "QueueAtAdmission",
            "admission wait was 71% of the excess",
            (StageShare("admission_wait", 0.4, 0.71), StageShare("decode", 0.1, 0.2)),
        ),
        objectives=(),
        changes=(KnobChange("numWorkers", 8, 16), KnobChange("enablePrefetch", None, True)),
        generation=17,
        canary="chat-c1f0",
        controls=("chat-a7d2", "chat-b9e4"),
        rejected=(Rejected("batch-up", "NotAtFault", "batch wait is not at fault"),),
    )
    return dict(json.loads(json.dumps(asdict(record))))


def test_action_is_explained_with_its_evidence() -> None:
    decisions = [
        {
            "id": "d-0041",
            "at": "2023-11-14T22:00:00Z",
            "rule": "x",
            "outcome": "Started",
            "summary": "Began.",
        },
        {
            "id": "d-0042",
            "at": "2023-11-14T22:13:20Z",
            "rule": "x",
            "outcome": "Started",
            "summary": "Short.",
        },
    ]
    record = whole_record("Started")
    reported = explain(manifest(decisions=decisions), [record])
    assert [(a.id, a.summary) for a in reported.actions] == [
        ("d-0041", "Began."),
        ("d-0042", "numWorkers 8 -> 16; p95 met."),
    ]
    assert reported.actions[1].details == (
        "Tries: numWorkers 8 -> 16, enablePrefetch default -> true (generation 17).",
        "Because: admission wait was 71% of the excess.",
        "Stages: admission wait 71%, decode 20%.",
        "Canary chat-c1f0, compared with chat-a7d2, chat-b9e4.",
        "Rejected: batch-up: batch wait is not at fault.",
    )
    assert "  2023-11-14T22:13:20Z  d-0042  Started by workers-up" in reported.lines()
    assert [a.id for a in explain(manifest(decisions=decisions), [record], last=1).actions] == ["d-0042"]
    assert explain(manifest(decisions=decisions), [], last=0).actions == ()


@pytest.mark.parametrize(
    ("outcome", "sentence"),
    [
        ("Promoted", "Changed: numWorkers 8 -> 16, enablePrefetch default -> true (generation 17)."),
        (
            "Aborted",
            "Tried and aborted: numWorkers 8 -> 16, enablePrefetch default -> true (back to generation 17).",
        ),
        (
            "Reverted",
            "Tried and reverted: numWorkers 8 -> 16, enablePrefetch default -> true (back to generation 17).",
        ),
    ],
)
def test_change_that_was_not_kept_does_not_read_like_one_that_was(outcome: str, sentence: str) -> None:
    [action] = explain(manifest(), [whole_record(outcome)]).actions
    assert action.details[0] == sentence


@pytest.mark.parametrize(
    ("outcome", "reported"),
    [
        *(("Started", True), ("Recommended", True), ("ScaledOut", True)),
        *(("Promoted", False), ("ScaledIn", False), ("Reset", False)),
    ],
)
def test_only_outcomes_of_a_diagnosis_show_it(outcome: str, reported: bool) -> None:
    [action] = explain(manifest(), [whole_record(outcome)]).actions
    assert any(detail.startswith(("Because:", "Stages:")) for detail in action.details) == reported


def test_holds_and_blocked_values_explain_why_no_change_is_made() -> None:
    reported = explain(
        manifest(
            tuning={
                "state": "Hold",
                "holds": [{"reason": "MetricsStale", "since": "2026-11-22T09:40:00Z"}],
                "blockedValues": [
                    {"knob": "batchSize", "value": "32", "until": "2026-11-23T09:00:00Z"},
                    {"knob": "batchSize", "value": "16", "until": "2026-11-22T09:00:00Z"},
                ],
            },
            objectives=[{"name": "p95", "state": "Breached", "since": "2026-11-22T09:30:00Z"}],
        ),
        now=from_rfc3339("2026-11-22T10:00:00Z"),
    )
    assert reported.present == ("p95 is breached since 2026-11-22T09:30:00Z.",)
    assert reported.why_not == (
        "MetricsStale since 2026-11-22T09:40:00Z: The metrics of a ready replica are older than 3 scrapes.",
        "batchSize 32 harmed or did not help: blocked until 2026-11-23T09:00:00Z.",
    )


def condition(kind: str, status: str, reason: str, message: str) -> dict[str, str]:
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": "2026-11-22T09:40:00Z",
    }


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (manifest(), "The resource is not reconciled yet: is the operator running?"),
        (
            manifest("Off", tuning={"state": "Observe"}),
            "spec.tuning.mode is Off: kvpilot measures and changes nothing.",
        ),
        (
            manifest(conditions=[condition("Ready", "False", "InvalidSpec", "spec.scaling.max: required")]),
            "The spec is invalid: spec.scaling.max: required.",
        ),
        (
            manifest(
                tuning={"state": "Observe"},
                conditions=[
                    condition("Ready", "False", "ReplicasNotReady", "1 of 2 are ready: b: OOMKilled.")
                ],
            ),
            "Replicas are not ready since 2026-11-22T09:40:00Z: 1 of 2 are ready: b: OOMKilled.",
        ),
        (
            manifest(
                tuning={"state": "Observe"},
                conditions=[condition("SLOMet", "True", "AllMet", "Every objective is met.")],
            ),
            "Every objective that can be judged is met: there is nothing to cure.",
        ),
        (
            manifest(
                tuning={"state": "Observe"},
                conditions=[
                    condition("Infeasible", "True", "TargetUnreachable", "hit rate 70% > ceiling 61%")
                ],
            ),
            "Infeasible: hit rate 70% > ceiling 61%.",
        ),
    ],
)
def test_reason_why_no_change_is_made(given: dict[str, Any], sentence: str) -> None:
    assert explain(given).why_not == (sentence,)


def test_change_in_flight_and_overlay_are_shown() -> None:
    change = {
        "id": "d-0043",
        "values": [{"knob": "prefetchSize", "from": "16", "to": "24"}],
        "epoch": 7,
        "generation": 18,
        "startedAt": "2026-11-22T10:04:00Z",
        "phaseSince": "2026-11-22T10:04:00Z",
        "canary": {"name": "chat-0", "uid": "5d1e"},
        "objective": "p95",
    }
    overlay = [{"knob": "numWorkers", "basedOn": "null", "value": "16", "decision": "d-0042"}]
    reported = explain(manifest(tuning={"state": "Canary", "change": change}, config={"overlay": overlay}))
    assert reported.present == (
        "In flight: d-0043 tries prefetchSize 16 -> 24 on canary chat-0 for p95, since 2026-11-22T10:04:00Z.",
        "Differs from the base: numWorkers 16 (base default, by d-0042).",
    )
    assert reported.why_not == ()
