"""A breach under real load, cured by a knob, while no pod restarts and no request fails."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.e2e.cluster import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_a_breach_is_cured_by_a_knob_on_a_canary(cluster, namespace, operator, overload) -> None:
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
    assert status["config"]["overlay"][0]["knob"] in {"numWorkers", "batchSize"}
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
    told = cluster.get("configmap", "chat-decisions", namespace)["data"]["decisions.jsonl"]
    assert "Promoted" in [json.loads(line)["outcome"] for line in told.splitlines()]


def test_an_operator_killed_at_each_step_of_a_change_leaves_a_whole_configuration(
    cluster, namespace, operator, overload
) -> None:
    scene: Any = overload()
    for state in ("Canary", "Settle", "Verify", "Promote"):
        # The status is written first: the intent is known, the deed is not done.
        scene.wait_for(state)
        operator.kill()
        operator.start()

    eventually(scene.ended, 150, f"the change ends; {scene.outcomes()}")
    assert sorted(pod["metadata"]["uid"] for pod in cluster.pods(namespace)) == scene.uids
    assert any(end in outcome for outcome in scene.outcomes() for end in ("Promoted", "Reverted", "Aborted"))
    assert scene.users.failures == []
