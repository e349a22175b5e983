"""Pause, approve, pin, boost and roll back a local run: what is written, said, and refused."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import yaml
from tests.operator.cli.runs import STATUS, kvpilot, manifest, ok, refused

from kvpilot_operator.local.state import StateDirectory
from kvpilot_operator.resource import KVCacheOverride
from kvpilot_operator.resource.times import from_rfc3339
from kvpilot_operator.status.overrides import expiry_of


def written(run: StateDirectory) -> list[dict[str, Any]]:
    items, faults = run.overrides.read()
    assert faults == []
    return items


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> int:
    """The present second, at which the clock stands still."""
    now = int(time.time())
    monkeypatch.setattr("time.time", lambda: float(now))
    return now


@pytest.mark.usefixtures("now")
@pytest.mark.parametrize(
    ("command", "spec", "said", "undo"),
    [
        (["pause", "chat", "--for", "2h"], {"pause": {"scaling": False}}, "tuning is paused", "resume chat"),
        (["pause", "chat", "--scaling"], {"pause": {"scaling": True}}, "tuning and scaling", "resume chat"),
        (
            ["pin", "chat", "numWorkers", "12"],
            {"pin": {"knob": "numWorkers", "value": 12}},
            "numWorkers is pinned to 12",
            "unpin chat numWorkers",
        ),
        (
            ["pin", "chat", "cacheStrategy", "LFU"],
            {"pin": {"knob": "cacheStrategy", "value": "lfu"}},
            "cacheStrategy is pinned to LFU",
            "unpin chat cacheStrategy",
        ),
        (
            ["boost", "chat", "3", "--for", "30m"],
            {"boost": {"minReplicas": 3}},
            "at least 3 replicas",
            "unboost chat",
        ),
        (["rollback", "chat"], {"rollback": {"to": 5}}, "it goes back to generation 5", ""),
        (["rollback", "chat", "--to", "7"], {"rollback": {"to": 7}}, "it goes back to generation 7", ""),
    ],
)
def test_command_writes_an_override_and_says_until_when(
    run: StateDirectory,
    command: list[str],
    spec: dict[str, Any],
    said: str,
    undo: str,
) -> None:
    output = ok(*command, "--by", "ana", "--reason", "incident 4711")
    [item] = written(run)
    kind = next(iter(spec))
    assert item["spec"][kind] == spec[kind]
    assert (item["spec"]["by"], item["spec"]["reason"]) == ("ana", "incident 4711")
    name = item["metadata"]["name"]
    assert name.startswith(f"chat-{command[0]}-")
    first, *more = output.splitlines()
    assert first.startswith(f"chat in default: {said}")
    assert first.endswith(f"({name}).")
    until = from_rfc3339(first.split(" until ")[1].split(" ")[0])
    assert until == expiry_of(item)
    assert more == ([f"End it earlier: kvpilot {undo}"] if undo else [])


def test_override_of_a_command_is_one_that_kubectl_would_take(run: StateDirectory) -> None:
    ok("pause", "chat")
    KVCacheOverride.parse(json.loads(next(run.path.glob("overrides/*.json")).read_text()))


def test_by_is_the_user_of_this_machine(run: StateDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "ana")
    ok("pause", "chat")
    assert written(run)[0]["spec"]["by"] == "ana"


def test_output_for_programs(run: StateDirectory, now: int) -> None:
    plain = json.loads(ok("boost", "chat", "9", "-o", "json"))
    assert plain["spec"]["boost"] == {"minReplicas": 9}
    assert plain["note"] == "asks for 9 replicas; spec.scaling.max allows 4, so it gets 4"
    assert from_rfc3339(plain["until"]) == now + 1800
    assert yaml.safe_load(ok("unboost", "chat", "-o", "yaml")) == {
        "ended": [plain["name"]],
        "namespace": "default",
    }
    assert "Note: it asks for 9 replicas; spec.scaling.max allows 4" in ok("boost", "chat", "9")


def test_what_began_is_ended(run: StateDirectory) -> None:
    ok("pause", "chat")
    ok("pause", "chat", "--by", "ben")
    ok("pin", "chat", "numWorkers", "12", "--by", "ana")
    ok("pin", "chat", "batchSize", "8")
    output = ok("resume", "chat")
    assert output.count("the pause") == 2
    assert "the pause by ben is ended" in output
    assert "the pin of numWorkers to 12 by ana is ended" in ok("unpin", "chat", "numWorkers")
    assert [item["spec"]["pin"]["knob"] for item in written(run)] == ["batchSize"]
    assert refused("resume", "chat") == "kvpilot resume: chat in default is not paused"
    assert refused("unpin", "chat", "numWorkers") == (
        "kvpilot unpin: chat in default has no pin of numWorkers"
    )


def test_boosts_of_alerts_stay(run: StateDirectory) -> None:
    ok("boost", "chat", "2", "--by", "alertmanager")
    assert refused("unboost", "chat") == "kvpilot unboost: chat in default has no boost of a person"


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("pause chat --for 2", "pause: --for: '2' is not a duration such as 90s, 10m or 1h30m"),
        ("pause chat --for 0s", "pause: --for: must be longer than 0 s, got 0s"),
        (
            "pin chat numWorkers 500",
            "pin: spec.pin.value: numWorkers must be a whole number from 1 to 128, got 500",
        ),
        ("pin chat useQuantization true", "pin: spec.pin.knob: must be one of the knobs numWorkers, "),
        ("boost chat 0", "boost: spec.boost.minReplicas: "),
        ("boost chat many", "boost: MIN: Input should be a valid integer"),
        (
            "approve chat d-0042",
            "approve: spec.tuning.mode is Auto; only mode Approve waits for an approval",
        ),
        ("approve chat 42", "approve: spec.approve.decision: "),
        ("rollback chat --to 9", "rollback: generation 9 is not kept; these are: 5, 7"),
        ("pause chta", "pause: no resource chta: no cluster to ask"),
    ],
)
def test_command_that_makes_no_sense_is_one_line_and_writes_nothing(
    run: StateDirectory, command: str, line: str
) -> None:
    assert refused(*command.split()).startswith(f"kvpilot {line}")
    assert written(run) == []


def test_second_pin_of_a_knob_to_another_value_is_refused(run: StateDirectory) -> None:
    ok("pin", "chat", "numWorkers", "12")
    [first] = written(run)
    assert refused("pin", "chat", "numWorkers", "16") == (
        f"kvpilot pin: contradicts {first['metadata']['name']}, which is in force; end that one first"
    )
    ok("pin", "chat", "numWorkers", "12")
    assert len(written(run)) == 2


def test_run_that_has_ended_takes_no_override(run: StateDirectory) -> None:
    run.close()
    assert refused("pause", "chat") == (
        "kvpilot pause: the run of chat has ended; `kvpilot up` starts it again"
    )
    assert kvpilot("status", "chat").exit_code == 0


def test_boost_of_a_fixed_number_is_refused(run: StateDirectory) -> None:
    document = manifest()
    document["spec"] = {"replicas": 2}
    run.write_resource(document)
    assert refused("boost", "chat", "3").startswith("kvpilot boost: spec.replicas fixes the number")


def test_rollback_without_an_earlier_generation_is_refused(run: StateDirectory) -> None:
    run.write_resource(manifest(status={"config": {"generation": 1}}))
    assert refused("rollback", "chat") == (
        "kvpilot rollback: no kept generation before the present one (1) has other tuned knobs and was not "
        "taken back"
    )


def test_rollback_passes_over_what_is_in_force_already_and_what_was_taken_back(run: StateDirectory) -> None:
    tuned = (("Found", "{}"), ("Promoted", '{"numWorkers":16}'), ("Promoted", '{"numWorkers":64}'),
             ("TakenBack", '{"numWorkers":16}'), ("Pinned", '{"numWorkers":16}'))  # fmt: skip
    at = "2026-11-22T08:00:00Z"
    generations = [
        {"number": number, "at": at, "verdict": verdict, "knobs": knobs}
        for number, (verdict, knobs) in enumerate(tuned, 3)
    ]
    run.write_resource(
        manifest(status={**STATUS, "tuning": {**STATUS["tuning"], "generations": generations}})
    )
    ok("rollback", "chat")
    assert [item["spec"]["rollback"] for item in written(run)] == [{"to": 3}]


def test_newer_rollback_needs_no_end_of_the_older_one(run: StateDirectory) -> None:
    ok("rollback", "chat", "--to", "5")
    ok("rollback", "chat", "--to", "7")
    assert [item["spec"]["rollback"]["to"] for item in written(run)].count(7) == 1
