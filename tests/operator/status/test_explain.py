"""`kvpilot explain`: sentences from a status and records, the same in both modes."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
from typer.testing import CliRunner

from kvpilot_engine.contract.knobs import Price
from kvpilot_operator.resource.times import from_rfc3339
from kvpilot_operator.status.explain import explain
from kvpilot_operator.tuning.decision import Diagnosis, Record, Rejected, StageShare
from kvpilot_operator.tuning.state import KnobChange

RUN = CliRunner()
PRICED = {"Started", "Proposed", "Recommended"}


def manifest(mode: str = "Auto", **status: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "chat", "namespace": "team-a"},
        "spec": {"tuning": {"mode": mode}},
        "status": status,
    }


def whole_record(outcome: Any = "Promoted", **evidence: Any) -> dict[str, Any]:
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
        rejected=(
            Rejected("step-tokens-up", "NotAtFault", "batch wait is not at fault"),
            Rejected("batch-up", "AtBound", "the maximum is 4"),
            Rejected("replicas-up", "AtBound", "the maximum is 4"),
        ),
        evidence={"why": "workers were short; 4 are needed", "predictedGain": 0.4, **evidence},
        price=Price(cold_seconds=40.0, cache_bytes=float(64 << 20)) if outcome in PRICED else None,
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
    assert reported.actions[1].story == (
        "p95 missed its target: workers were short, and 4 are needed.",
        "The time of a request went into admission wait (71%) and decode (20%).",
        "So chat-c1f0 tries numWorkers 8 -> 16 and enablePrefetch unset -> true, with chat-a7d2 and "
        "chat-b9e4 as controls; it should gain 40%.",
        "It costs 64 MiB of cache and 40 s of warming up.",
        "Not chosen: batch-up and replicas-up, because the maximum is 4.",
    )
    assert "  2023-11-14T22:13:20Z  d-0042  Started by workers-up" in reported.lines()
    assert [a.id for a in explain(manifest(decisions=decisions), [record], last=1).actions] == ["d-0042"]
    assert explain(manifest(decisions=decisions), [], last=0).actions == ()


CHANGES = "numWorkers 8 -> 16 and enablePrefetch unset -> true"


@pytest.mark.parametrize(
    ("outcome", "verdict", "sentences"),
    [
        (
            "Promoted",
            "Promoted",
            (
                f"{CHANGES} helped on chat-c1f0: mean time fell from 2 s to 1 s.",
                "Every replica gets it now, as generation 17.",
            ),
        ),
        (
            "Reverted",
            "Harmful",
            (
                f"{CHANGES} did harm on chat-c1f0: mean time fell from 2 s to 1 s.",
                "Generation 17 runs again, and numWorkers 16 is not tried again for a day.",
            ),
        ),
        (
            "Reverted",
            "Inconclusive",
            (
                f"{CHANGES} proved nothing on chat-c1f0: mean time fell from 2 s to 1 s.",
                "Generation 17 runs again, and numWorkers 16 is not tried again for a while.",
            ),
        ),
        (
            "Aborted",
            "BreachGone",
            (
                f"Trying {CHANGES} on chat-c1f0 was stopped: the controls meet the objective without the "
                "change (BreachGone).",
                "Up to then, mean time fell from 2 s to 1 s.",
                "So nothing is concluded, and generation 17 runs again.",
            ),
        ),
    ],
)
def test_change_that_was_not_kept_does_not_read_like_one_that_was(
    outcome: str, verdict: str, sentences: tuple[str, ...]
) -> None:
    record = whole_record(outcome, verdict=verdict, effect="mean time fell from 2 s to 1 s")
    [action] = explain(manifest(), [record]).actions
    assert action.story == sentences


@pytest.mark.parametrize(
    "outcome",
    ["Started", "Proposed", "Recommended", "Promoted", "Reverted", "Aborted", "Emergency", "ScaledOut"],
)
def test_record_of_an_older_operator_is_told_by_its_summary(outcome: str) -> None:
    record = whole_record(outcome) | {"evidence": {}, "diagnosis": None, "rejected": [], "price": None}
    assert explain(manifest(), [record]).actions[0].story == ("numWorkers 8 -> 16; p95 met.",)


@pytest.mark.parametrize(
    ("outcome", "left"),
    [
        ("Recommended", "numWorkers 8 -> 16 should gain 40%, which kvpilot leaves to you."),
        ("Proposed", "numWorkers 8 -> 16 should gain 40%. Approve it with `kvpilot approve chat d-0042`."),
    ],
)
def test_what_a_person_has_to_do_follows_from_what_was_found(outcome: str, left: str) -> None:
    record = {**whole_record(outcome), "summary": f"Workers were short; 4 are needed; {left}"}
    assert explain(manifest(), [record]).actions[0].story[:3] == (
        "p95 missed its target: workers were short, and 4 are needed.",
        "The time of a request went into admission wait (71%) and decode (20%).",
        left,
    )


PREDICTED = {"predicted": 0.62, "predictedLow": 0.54, "predictedHigh": 0.71}


def test_what_should_come_of_an_action_without_arms_is_told() -> None:
    scaled = whole_record("ScaledOut", **PREDICTED) | {"replicas": [3, 5], "rejected": []}
    assert explain(manifest(), [scaled]).actions[0].story[-1] == (
        "The share of their capacity in use should then be 62%, within 54% and 71%."
    )
    cut = whole_record("Emergency", **PREDICTED)
    assert explain(manifest(), [cut]).actions[0].story[-1] == (
        "Memory should then be at 62%, within 54% and 71%. It is taken back if memory does not fall."
    )
    said = "replicas 3 -> 5: the replicas were 58% in use after 95 s; 62% (54% to 71%) was predicted."
    measured = whole_record("Measured", measured=0.58) | {"summary": said}
    assert explain(manifest(), [scaled, measured]).actions[1].story == (said,)


def test_who_approved_a_change_is_told() -> None:
    record = whole_record("Started") | {"summary": "Short; trying it. Approved by ada."}
    assert explain(manifest(), [record]).actions[0].story[3] == "Approved by ada."


@pytest.mark.parametrize(
    ("outcome", "reported"),
    [
        *(("Started", True), ("Recommended", True), ("ScaledOut", True)),
        *(("Promoted", False), ("ScaledIn", False), ("Reset", False)),
    ],
)
def test_only_outcomes_of_a_diagnosis_show_it(outcome: str, reported: bool) -> None:
    [action] = explain(manifest(), [whole_record(outcome)]).actions
    assert any("of a request went into" in told for told in action.story) == reported


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
    assert reported.present == ("Breached: p95 since 2026-11-22T09:30:00Z.",)
    assert reported.why_not == (
        "MetricsStale since 2026-11-22T09:40:00Z: The metrics of a ready replica are older than 3 scrapes.",
        "batchSize 32 is blocked until 2026-11-23T09:00:00Z: it did harm, did not help enough, or was rolled "
        "back.",
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
        "In flight since 2026-11-22T10:04:00Z: d-0043 tries prefetchSize 16 -> 24 on chat-0, for p95.",
        "Differs from the base: numWorkers 16 (base unset, by d-0042).",
    )
    assert reported.why_not == ()
