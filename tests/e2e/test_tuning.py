"""A breach under real load, cured by a knob, while no pod restarts and no request fails."""

from __future__ import annotations

from typing import Any

import pytest

# ruff: noqa: PLR0917 - fixtures are taken by name
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420)]


def decisions(cluster: Any, namespace: str) -> list[dict[str, Any]]:
    return cluster.get("kvcd", "chat", namespace).get("status", {}).get("decisions", [])


def outcomes(cluster: Any, namespace: str) -> list[str]:
    return [f"{item['rule']}: {item['outcome']}" for item in decisions(cluster, namespace)]


@pytest.fixture
def served(cluster, namespace, operator, manifest, load, kit) -> list[str]:
    """Two engines with one worker each; the UIDs of their pods."""
    cluster.apply(
        manifest(
            config={"numWorkers": 1, "batchSize": 8, "maxTokens": 16384},
            objectives={
                "latency": {"p50Ms": 400, "p95Ms": 1500},
                "throughput": {"target": 10},
                "hitRate": "0%",
            },
            replicas=2,
        )
    )
    kit["eventually"](
        lambda: (
            kit["condition"](cluster.get("kvcd", "chat", namespace), "MetricsTrusted").get("status") == "True"
        ),
        120,
        "two engines serve and are measured",
    )
    service = cluster.get("service", "chat", namespace)
    load.url = f"http://{service['spec']['clusterIP']}:8000"
    return sorted(pod["metadata"]["uid"] for pod in cluster.pods(namespace))


def test_a_breach_is_cured_by_a_knob_on_a_canary(cluster, namespace, operator, load, served, kit) -> None:
    load.start(rate=14, seconds=110, output_tokens=64)
    promoted = kit["eventually"](
        lambda: [item for item in decisions(cluster, namespace) if item["outcome"] == "Promoted"],
        105,
        f"a change is promoted ({outcomes(cluster, namespace)})",
    )
    assert promoted[0]["rule"] in {"workers-up", "batch-up"}
    item = cluster.get("kvcd", "chat", namespace)
    assert item["status"]["config"]["overlay"][0]["knob"] in {"numWorkers", "batchSize"}
    result = load.result()
    assert result["errors"] == 0, result
    assert sorted(pod["metadata"]["uid"] for pod in cluster.pods(namespace)) == served
    restarts = [
        s["restartCount"] for pod in cluster.pods(namespace) for s in pod["status"]["containerStatuses"]
    ]
    assert restarts == [0, 0]
    reasons = {event["reason"] for event in cluster.list("events.events.k8s.io", namespace)}
    assert {"ChangeStarted", "ChangePromoted"} <= reasons
    counted = operator.metrics("kvpilot_operator_decisions_total")
    assert any('outcome="Promoted"' in labels for labels in counted)
