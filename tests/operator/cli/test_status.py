"""`kvpilot status` and `kvpilot history` of local runs."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from tests.operator.cli.runs import manifest, ok, refused, running, switched_off

from kvpilot_operator.local.state import StateDirectory


def test_status_is_a_row_for_each_run(run: StateDirectory, tmp_path: Path) -> None:
    with running(tmp_path, manifest("code", {})):
        pass
    ok("pause", "chat")
    heading, chat, code = ok("status").splitlines()
    assert heading.split()[:5] == ["NAME", "MODE", "STATE", "READY", "GEN"]
    assert chat.split()[:5] == ["chat", "Auto", "Observe", "2/2", "7"]
    assert chat.rstrip().endswith("1/2 met, p95 breached  override pause")
    assert code.split()[:5] == ["code", "Auto", "ended", "0/0", "-"]
    assert "\x1b" not in chat, "no colours without a terminal"


def test_status_of_one_run_is_shown_in_full(run: StateDirectory) -> None:
    ok("pin", "chat", "batchSize", "8", "--by", "ana", "--reason", "test")
    lines = ok("status", "chat").splitlines()
    assert lines[:6] == [
        "chat in default: mode Auto, state Observe",
        "  Objectives  1/2 met, p95 breached",
        "  Replicas    2 of 2 ready",
        "  Generation  7",
        "  Differs     numWorkers 16, base 8, by d-0003",
        lines[5],
    ]
    assert lines[5].startswith("  Overrides   pin until ")
    assert " by ana (test), chat-pin-" in lines[5]
    assert lines[6] == ("  Last        d-0003 Promoted at 2026-11-22T09:40:00Z: numWorkers 8 -> 16; p95 met.")


def test_kill_switch_is_shown_with_its_cause_and_with_what_goes_on(run: StateDirectory) -> None:
    run.write_resource(manifest(status=switched_off("kvpilot up runs with --tuning=off")))
    reason = "off since 2026-11-22T09:30:00Z: kvpilot up runs with --tuning=off; bounds, schedules, boosts, "
    lines = ok("status", "chat").splitlines()
    assert lines[1] == f"  Tuning      {reason}pins and rollbacks go on"
    assert "  Holds       MetricsStale: no scrape" in lines
    assert "KillSwitch" not in "".join(lines), "shown once"
    row, last = ok("status").splitlines()[1:]
    assert row.rstrip().endswith("tuning off, MetricsStale")
    assert last == f"Tuning is {reason}pins and rollbacks go on."
    assert json.loads(ok("status", "chat", "-o", "json"))["off"] == {
        "since": "2026-11-22T09:30:00Z",
        "why": "kvpilot up runs with --tuning=off",
        "goesOn": ["bounds", "schedules", "boosts", "pins", "rollbacks"],
    }
    run.write_resource(manifest())
    assert "Tuning" not in ok("status", "chat")
    assert json.loads(ok("status", "chat", "-o", "json"))["off"] is None


def test_status_for_programs(run: StateDirectory) -> None:
    ok("boost", "chat", "9", "--by", "ana")
    plain = json.loads(ok("status", "chat", "-o", "json"))
    assert plain["objectives"] == {"p95": "Breached", "errors": "Met", "hitRate": "Unknown"}
    [override] = plain["overrides"]
    assert (override["inForce"], override["by"]) == (True, "ana")
    assert "spec.scaling.max allows 4" in override["message"]
    assert yaml.safe_load(ok("status", "-o", "yaml"))[0]["name"] == "chat"


def test_history_lists_decisions_with_their_generations(run: StateDirectory) -> None:
    heading, first, last, _, kept, *generations = ok("history", "chat").splitlines()
    assert heading.split() == ["TIME", "ID", "RULE", "OUTCOME", "GEN", "SUMMARY"]
    assert first.split()[1:5] == ["d-0002", "workers-up", "Reverted", "5"]
    assert last.split()[1:5] == ["d-0003", "workers-up", "Promoted", "7"]
    assert ok("history", "chat", "--last", "1").splitlines()[1] == last
    assert kept == "Configurations that `kvpilot rollback` can go back to:"
    assert [line.split() for line in generations[1:]] == [
        ["5", "2026-11-22T08:00:00Z", "-", "Found", "{}"],
        ["7", "2026-11-22T09:40:00Z", "d-0003", "Promoted", '{"numWorkers":16}'],
    ]
    plain = json.loads(ok("history", "chat", "-o", "json"))
    assert plain["decisions"][0]["generation"] == 5
    assert [item["number"] for item in plain["generations"]] == [5, 7]


def test_a_run_without_decisions_says_so(run: StateDirectory) -> None:
    run.write_resource(manifest(status={}))
    (run.path / "decisions.jsonl").unlink()
    assert ok("history", "chat") == "No decision so far.\n"


def test_status_that_cannot_be_read_is_one_line(run: StateDirectory) -> None:
    run.write_resource(manifest(status={"replicas": "many"}))
    assert refused("status", "chat").startswith(
        "kvpilot status: the status of chat cannot be read: replicas:"
    )


def test_directory_without_runs_is_one_line(run: StateDirectory, tmp_path: Path) -> None:
    assert refused("status", "--run", str(tmp_path)) == f"kvpilot status: no runs in {tmp_path}"
    assert refused("status", "--run", "x", "-n", "y").endswith("cannot go with --run, got y")


def test_why_not_answers_for_one_knob(run: StateDirectory) -> None:
    ok("pin", "chat", "numWorkers", "16")
    first, second, *_ = ok("explain", "chat", "--why-not", "numWorkers").splitlines()
    assert first == "numWorkers is 16; d-0003 set it at 2026-11-22T09:40:00Z, the spec has it 8."
    assert second.endswith("kvpilot unpin ends that.")
    assert json.loads(ok("explain", "chat", "--why-not", "batchSize", "-o", "json"))["knob"] == "batchSize"
    assert refused("explain", "chat", "--why-not", "workers").startswith(
        "kvpilot explain: --why-not: there is no knob workers; there are: numWorkers"
    )


def test_export_is_a_manifest_with_the_tuned_values(run: StateDirectory) -> None:
    document = manifest(engine={"config": {"numWorkers": 8}})
    run.write_resource(document)
    text = ok("export", "--as-spec", "chat")
    assert "      numWorkers: 16  # d-0003: numWorkers 8 -> 16; p95 met." in text
    assert yaml.safe_load(text) == json.loads(ok("export", "chat", "-o", "json"))
