"""`kvpilot explain` finds a local run by name or by directory, and says where it looked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.operator.status.test_explain import condition, manifest, whole_record
from typer.testing import CliRunner

from kvpilot_operator.cli import app
from kvpilot_operator.local.state import StateDirectory
from kvpilot_operator.status.history import parse_records

RUN = CliRunner()


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


def test_ended_run_is_introduced_as_such(tmp_path: Path) -> None:
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

    def reported() -> list[str]:
        return RUN.invoke(app, ["explain", "chat", "--run", str(root), "--last", "0"]).output.splitlines()

    assert reported() == [
        "The run of chat in team-a has ended. Its last state:",
        "chat in team-a: mode Off, state Cooldown.",
        "  Breached: p95 since 2026-11-22T09:30:00Z.",
        "  Differs from the base: numWorkers 2 (base 1, by d-0042).",
        "",
        "No action so far.",
        "",
        "Why no change is made:",
        "  spec.tuning.mode is Off: kvpilot measures and changes nothing.",
        "  Every objective that can be judged is met: there is nothing to cure.",
        "  The last change ended a short while ago; the next one may begin at 2026-11-22T10:09:00Z.",
    ]
    state = StateDirectory("chat", root)
    state.open()
    assert reported()[:3] == [
        "chat in team-a: mode Off, state Cooldown.",
        "  Breached: p95 since 2026-11-22T09:30:00Z.",
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
