"""Apply, ready, scraped, deleted: with the operator there, and with it gone."""

from __future__ import annotations

import time
from typing import Any

import pytest
from tests.e2e.cluster import condition, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

OWNED = ("serviceaccount", "secret", "service", "poddisruptionbudget", "deployment", "configmap", "pod")


def leftovers(cluster: Any, namespace: str) -> list[str]:
    return [
        f"{kind}/{item['metadata']['name']}"
        for kind in OWNED
        for item in cluster.list(kind, namespace, "kvpilot.io/name=chat")
    ]


def looks_without_a_write(cluster: Any, namespace: str, operator: Any, wanted: int = 4) -> bool:
    """Several looks in a row leave the resource as it is."""

    def version() -> str:
        return cluster.get("kvcd", "chat", namespace)["metadata"]["resourceVersion"]

    def looks() -> float:
        return operator.metrics("kvpilot_operator_step_seconds_count")['{step="decide"}']

    before, first = version(), looks()
    while looks() < first + wanted and version() == before:
        time.sleep(0.2)
    return version() == before


def test_apply_ready_scraped_and_deleted(cluster, namespace, operator, manifest) -> None:
    cluster.apply(manifest(scaling={"min": 1, "max": 2}))
    ready = eventually(
        lambda: condition(cluster.get("kvcd", "chat", namespace), "Ready").get("status") == "True",
        90,
        "Ready",
    )
    assert ready
    item = cluster.get("kvcd", "chat", namespace)
    assert item["status"]["observedGeneration"] == 1
    assert item["status"]["selector"] == "kvpilot.io/name=chat"
    assert item["status"]["config"]["generation"] == 1
    eventually(
        lambda: condition(cluster.get("kvcd", "chat", namespace), "MetricsTrusted").get("status") == "True",
        40,
        "measured by Prometheus",
    )
    (pod,) = cluster.pods(namespace)
    (row,) = cluster.prometheus(f'kvpilot_config_generation{{pod_uid="{pod["metadata"]["uid"]}"}}')
    assert row["metric"]["kvpilot_name"] == "chat"
    reasons = {event["reason"] for event in cluster.list("event", namespace)}
    assert "Serving" in reasons
    eventually(lambda: looks_without_a_write(cluster, namespace, operator), 60, "at rest it writes nothing")

    cluster.kubectl("delete", "kvcd", "chat", f"--namespace={namespace}", "--timeout=20s")
    eventually(lambda: not leftovers(cluster, namespace), 60, "everything it owned is gone")
    assert operator.stop() == 0


def test_delete_while_the_operator_is_down_leaves_nothing_stuck(
    cluster, namespace, operator, manifest
) -> None:
    cluster.apply(manifest(scaling={"min": 1, "max": 1}))
    eventually(lambda: cluster.pods(namespace), 30, "a pod")
    operator.kill()
    cluster.kubectl("delete", "kvcd", "chat", f"--namespace={namespace}", "--timeout=20s")
    eventually(lambda: not leftovers(cluster, namespace), 60, "everything it owned is gone")


def test_a_bad_spec_is_a_condition_and_leaves_what_runs(cluster, namespace, operator, manifest) -> None:
    bad = manifest(objectives={"latency": {"p50Ms": 500, "p95Ms": 1000}}, scaling={"min": 1, "max": 1})
    bad["spec"]["objectives"]["latency"] = {"p95Ms": 50}
    bad["spec"]["profile"] = "production"
    cluster.apply(bad)

    def refused() -> dict[str, Any]:
        found = condition(cluster.get("kvcd", "chat", namespace), "Ready")
        return found if found.get("reason") == "InvalidSpec" else {}

    told = eventually(refused, 20, "a condition that names the fault")
    assert "p50Ms <= p95Ms <= p99Ms is required" in told["message"]
    assert not cluster.pods(namespace)
