"""A breach under real load is cured by a knob without a restart or a failed request."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.e2e.cluster import eventually
from tests.e2e.operators import SWITCH

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def test_breach_is_cured_by_a_knob_on_a_canary_and_a_person_goes_back(
    cluster, namespace, operator, overload, kvpilot
) -> None:
    scene = overload()
    promoted = eventually(
        lambda: [item for item in scene.status.get("decisions", ()) if item["outcome"] == "Promoted"],
        180,
        "a change is promoted",
    )
    assert promoted[0]["rule"] in {"workers-up", "batch-up"}
    status = eventually(
        lambda: scene.status if scene.status["config"]["generation"] > 1 else None, 20, "a new generation"
    )
    tuned = status["config"]["overlay"][0]["knob"]
    assert tuned in {"numWorkers", "batchSize"}
    pods = cluster.pods(namespace)
    assert sorted(pod["metadata"]["uid"] for pod in pods) == scene.uids
    assert [s["restartCount"] for pod in pods for s in pod["status"]["containerStatuses"]] == [0, 0]
    assert scene.users.failures == []
    failed = cluster.prometheus(
        f'sum(kvpilot_requests_total{{namespace="{namespace}",outcome=~"error|timeout|shed"}})'
    )
    assert float(failed[0]["value"][1]) == 0.0
    reasons = {event["reason"] for event in cluster.list("event", namespace)}
    assert {"ChangeStarted", "ChangePromoted"} <= reasons
    assert any(
        'outcome="Promoted"' in labels for labels in operator.metrics("kvpilot_operator_decisions_total")
    )
    reported = cluster.get("configmap", "chat-decisions", namespace)["data"]["decisions.jsonl"]
    assert "Promoted" in [json.loads(line)["outcome"] for line in reported.splitlines()]

    scene.users.stop()
    kvpilot("rollback", "chat", "--reason", "test")
    eventually(lambda: not scene.status["config"].get("overlay"), 60, "the tuned values are gone")
    eventually(scene.ended, 60, f"every engine runs the base; {scene.outcomes()}")
    assert "RolledBack" in " ".join(scene.outcomes())
    blocked = {item["knob"] for item in scene.status["tuning"]["blockedValues"]}
    assert tuned in blocked


def test_kill_switch_takes_a_running_candidate_back(cluster, namespace, operator, overload) -> None:
    scene = overload()
    scene.wait_for("Canary")
    switch = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": SWITCH, "namespace": namespace},
        "data": {"tuning": "off"},
    }
    cluster.apply(switch)
    eventually(
        lambda: operator.metrics("kvpilot_operator_tuning_enabled") == {"": 0.0}, 20, "tuning is switched off"
    )
    eventually(scene.ended, 30, f"no candidate runs; {scene.outcomes()}")
    held = eventually(
        lambda: [item for item in scene.status["tuning"].get("holds", ()) if item["reason"] == "KillSwitch"],
        20,
        "the status says why",
    )
    assert f"ConfigMap {namespace}/{SWITCH} says tuning: off" in held[0]["message"]
    cluster.kubectl("delete", "configmap", SWITCH, f"--namespace={namespace}")
    scene.wait_for("Canary")


def test_operator_killed_at_each_step_of_a_change_leaves_a_consistent_configuration(
    cluster, namespace, operator, overload
) -> None:
    scene: Any = overload()
    # A change of capacity is verified at once: its measure needs no time to settle.
    for state in ("Canary", "Verify", "Promote"):
        # The status is written first: it names the change before the engine has it.
        scene.wait_for(state)
        operator.kill()
        operator.start()

    eventually(scene.ended, 150, f"the change ends; {scene.outcomes()}")
    assert sorted(pod["metadata"]["uid"] for pod in cluster.pods(namespace)) == scene.uids
    assert any(end in outcome for outcome in scene.outcomes() for end in ("Promoted", "Reverted", "Aborted"))
    assert scene.users.failures == []
