"""`kvpilot explain`: sentences from a status and records, the same in both modes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvpilot_operator.cli import app
from kvpilot_operator.cli.explain import parse_records
from kvpilot_operator.explain import explain
from kvpilot_operator.local.state import StateDirectory
from kvpilot_operator.spec.times import from_rfc3339
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
        canary_uid="c1f0",
        control_uids=("a7d2", "b9e4"),
        rejected=(Rejected("batch-up", "NotAtFault", "batch wait is not at fault"),),
    )
    return dict(json.loads(json.dumps(asdict(record))))


def test_an_action_is_told_with_its_evidence() -> None:
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
    told = explain(manifest(decisions=decisions), [record])
    assert [(a.id, a.summary) for a in told.actions] == [
        ("d-0041", "Began."),
        ("d-0042", "numWorkers 8 -> 16; p95 met."),
    ]
    assert told.actions[1].details == (
        "Changed: numWorkers 8 -> 16, enablePrefetch default -> true (generation 17).",
        "Because: admission wait was 71% of the excess.",
        "Stages: admission wait 71%, decode 20%.",
        "Canary c1f0, compared with 2 other engines.",
        "Not taken: batch-up: batch wait is not at fault.",
    )
    assert "  2023-11-14T22:13:20Z  d-0042  Started by workers-up" in told.lines()
    assert [a.id for a in explain(manifest(decisions=decisions), [record], last=1).actions] == ["d-0042"]
    assert explain(manifest(decisions=decisions), [], last=0).actions == ()


@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        *(("Started", True), ("Recommended", True), ("ScaledOut", True)),
        *(("Promoted", False), ("ScaledIn", False), ("Reset", False)),
    ],
)
def test_only_what_a_diagnosis_led_to_is_told_with_it(outcome: str, told: bool) -> None:
    [action] = explain(manifest(), [whole_record(outcome)]).actions
    assert any(detail.startswith(("Because:", "Stages:")) for detail in action.details) == told


def test_holds_and_bars_say_why_nothing_is_done() -> None:
    told = explain(
        manifest(
            tuning={
                "state": "Hold",
                "holds": [{"reason": "MetricsStale", "since": "2026-11-22T09:40:00Z"}],
                "barred": [
                    {"knob": "batchSize", "value": "32", "until": "2026-11-23T09:00:00Z"},
                    {"knob": "batchSize", "value": "16", "until": "2026-11-22T09:00:00Z"},
                ],
            },
            objectives=[{"name": "p95", "state": "Breached", "since": "2026-11-22T09:30:00Z"}],
        ),
        now=from_rfc3339("2026-11-22T10:00:00Z"),
    )
    assert told.present == ("p95 is breached since 2026-11-22T09:30:00Z.",)
    assert told.why_not == (
        "MetricsStale since 2026-11-22T09:40:00Z: The metrics of a ready engine are older than 3 scrapes.",
        "batchSize 32 did harm or no good: not tried again before 2026-11-23T09:00:00Z.",
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
        (manifest(), "kvpilot has not looked at this resource yet: is the operator running?"),
        (
            manifest("Off", tuning={"state": "Observe"}),
            "spec.tuning.mode is Off: kvpilot measures and tunes nothing.",
        ),
        (
            manifest(conditions=[condition("Ready", "False", "InvalidSpec", "spec.scaling.max: required")]),
            "The spec cannot be used: spec.scaling.max: required.",
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
def test_why_nothing_was_done(given: dict[str, Any], sentence: str) -> None:
    assert explain(given).why_not == (sentence,)


def test_a_change_in_flight_is_told_and_the_overlay() -> None:
    change = {
        "id": "d-0043",
        "knob": "prefetchSize",
        "from": "16",
        "to": "24",
        "epoch": 7,
        "generation": 18,
        "startedAt": "2026-11-22T10:04:00Z",
        "phaseSince": "2026-11-22T10:04:00Z",
        "canaryUID": "c1f0",
        "objective": "p95",
    }
    overlay = [{"knob": "numWorkers", "basedOn": "null", "value": "16", "decision": "d-0042"}]
    told = explain(manifest(tuning={"state": "Canary", "change": change}, config={"overlay": overlay}))
    assert told.present == (
        "In flight: d-0043 tries prefetchSize 16 -> 24 on canary c1f0 for p95, since 2026-11-22T10:04:00Z.",
        "Differs from the base: numWorkers 16 (base default, by d-0042).",
    )
    assert told.why_not == ()


def local(tmp_path: Path) -> Path:
    run = tmp_path / ".kvpilot" / "chat"
    run.mkdir(parents=True)
    (run / "resource.json").write_text(json.dumps(manifest(tuning={"state": "Observe"})))
    (run / "decisions.jsonl").write_text(json.dumps(whole_record()) + '\n{"id": "cut of')
    return tmp_path / ".kvpilot"


def test_a_local_run_is_found_by_name_or_by_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = local(tmp_path)
    monkeypatch.chdir(tmp_path)
    state = StateDirectory("chat")
    state.open()
    for arguments in (["chat"], ["chat", "--run", str(root)], ["chat", "--run", str(root / "chat")]):
        result = RUN.invoke(app, ["explain", *arguments])
        assert result.exit_code == 0, result.output
        assert result.output.startswith("chat in team-a: mode Auto, state Observe.")
        assert "d-0042  Promoted by workers-up" in result.output
    plain = json.loads(RUN.invoke(app, ["explain", "chat", "-o", "json"]).output)
    assert (plain["state"], plain["actions"][0]["id"], plain["whyNot"]) == ("Observe", "d-0042", [])
    assert plain["ended"] is False
    state.close()


def test_a_run_that_has_ended_is_told_as_the_past(tmp_path: Path) -> None:
    root = local(tmp_path)
    status = {
        "tuning": {
            "state": "Cooldown",
            "cooldownUntil": "2026-11-22T10:09:00Z",
        },
        "objectives": [{"name": "p95", "state": "Breached", "since": "2026-11-22T09:30:00Z"}],
        "config": {"overlay": [{"knob": "numWorkers", "basedOn": "1", "value": "2", "decision": "d-0042"}]},
        "conditions": [condition("SLOMet", "True", "AllMet", "Every objective is met.")],
    }
    (root / "chat/resource.json").write_text(json.dumps(manifest("Off", **status)))

    def told() -> list[str]:
        return RUN.invoke(app, ["explain", "chat", "--run", str(root), "--last", "0"]).output.splitlines()

    assert told() == [
        "The run of chat in team-a has ended. When it ended: mode Off, state Cooldown.",
        "  p95 was breached since 2026-11-22T09:30:00Z.",
        "  Differed from the base: numWorkers 2 (base 1, by d-0042).",
        "",
        "No action so far.",
        "",
        "Why nothing was done when it ended:",
        "  spec.tuning.mode was Off: kvpilot measured and tuned nothing.",
        "  Every objective that could be judged was met: there was nothing to cure.",
        "  The last change was cooling down until 2026-11-22T10:09:00Z.",
    ]
    state = StateDirectory("chat", root)
    state.open()
    assert told()[:3] == [
        "chat in team-a: mode Off, state Cooldown.",
        "  p95 is breached since 2026-11-22T09:30:00Z.",
        "  Differs from the base: numWorkers 2 (base 1, by d-0042).",
    ]
    state.close()
    plain = json.loads(RUN.invoke(app, ["explain", "chat", "--run", str(root), "-o", "json"]).output)
    assert plain["ended"] is True


def test_an_unknown_name_is_exit_2_and_names_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = local(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "no-such-file"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    result = RUN.invoke(app, ["explain", "chta", "--run", str(root)])
    assert result.exit_code == 2
    assert result.output == f"kvpilot explain: no run of chta in {root}; there are: chat\n"
    result = RUN.invoke(app, ["explain", "chta"])
    assert result.exit_code == 2
    assert result.output.startswith("kvpilot explain: no resource chta: no cluster to ask")
    assert result.output.endswith("local runs in .kvpilot: chat\n")
    result = RUN.invoke(app, ["explain", "other", "--run", str(root / "chat")])
    assert (result.exit_code, "is a run of chat, not of other" in result.output) == (2, True)
    result = RUN.invoke(app, ["explain", "chat", "--run", str(root), "-n", "team-b"])
    assert result.exit_code == 2
    assert result.output == "kvpilot explain: --namespace: cannot go with --run, got team-b\n"


def test_a_cut_line_of_the_records_is_left_out() -> None:
    assert parse_records('{"id": "a", "at": 1, "outcome": "Started"}\n{"id"\n[]\n{"id": "b"}\n') == [
        {"id": "a", "at": 1, "outcome": "Started"}
    ]
