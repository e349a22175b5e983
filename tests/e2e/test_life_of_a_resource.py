"""Apply, ready, scraped, deleted: with the operator there, and with it gone."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from tests.e2e.cluster import condition, eventually

# ruff: noqa: PLR0917 - fixtures are taken by name
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


def test_what_keeps_engines_from_serving_is_told_in_ready(cluster, namespace, operator, manifest) -> None:
    def told(words: str) -> bool:
        found = condition(cluster.get("kvcd", "chat", namespace), "Ready")
        return found.get("status") == "False" and words in found["message"]

    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "none", "namespace": namespace},
    }
    cluster.apply({**quota, "spec": {"hard": {"pods": "0"}}})
    cluster.apply(manifest(scaling={"min": 1, "max": 1}, config={"numHeads": 3}))
    eventually(lambda: told("exceeded quota: none"), 40, "the quota")
    cluster.kubectl("delete", "resourcequota", "none", f"--namespace={namespace}")
    eventually(lambda: told("num_heads: 3 differs from the model's 8"), 150, "the engine's last words")


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
    assert "p50Ms <= p95Ms <= p99Ms is required" in refusal(cluster, namespace)
    assert not cluster.pods(namespace)


def refusal(cluster: Any, namespace: str) -> str:
    def refused() -> dict[str, Any]:
        found = condition(cluster.get("kvcd", "chat", namespace), "Ready")
        return found if found.get("reason") == "InvalidSpec" else {}

    return str(eventually(refused, 20, "a condition that names the fault")["message"])


@pytest.mark.parametrize(
    ("part", "named"),
    [
        (
            {"tolerations": [{"operator": "Sometimes"}]},
            ("spec.template", "tolerations[0].operator", "Sometimes"),
        ),
        ({"nodeSelectr": {"a": "b"}}, ("spec.template", "nodeSelectr")),
    ],
)
def test_a_template_that_the_api_server_refuses_is_a_condition(
    cluster, namespace, operator, manifest, part, named
) -> None:
    document = manifest(scaling={"min": 1, "max": 1}, nowhere=True)
    right = json.dumps({"spec": {"template": {"spec": dict.fromkeys(part)}}})
    document["spec"]["template"]["spec"].update(part)
    cluster.apply(document)
    told = refusal(cluster, namespace)
    assert all(item in told for item in named), told
    cluster.kubectl("patch", "kvcd", "chat", f"--namespace={namespace}", "--type=merge", f"--patch={right}")
    eventually(lambda: cluster.pods(namespace), 30, "the corrected template is rolled out")


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [
        ("Service", "chat", {"spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]}}),
        ("ConfigMap", "chat-config", {"data": {"theirs": "yes"}}),
        ("Secret", "chat-admin", {"data": {"token": "dGhlaXJz"}}),
    ],
)
def test_what_is_somebody_elses_is_neither_taken_nor_deleted(
    cluster, namespace, operator, manifest, kind, name, content
) -> None:
    theirs = {"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "namespace": namespace}, **content}
    cluster.apply(theirs)
    before = cluster.get(kind.lower(), name, namespace)
    cluster.apply(manifest(scaling={"min": 1, "max": 1}, nowhere=True))
    told = refusal(cluster, namespace)
    assert told.startswith(f"metadata.name: {kind} {name} exists and is not this resource's"), told
    cluster.kubectl("delete", "kvcd", "chat", f"--namespace={namespace}", "--timeout=20s")
    assert cluster.get(kind.lower(), name, namespace) == before


def test_a_deployment_that_was_deleted_by_hand_comes_back_as_large(
    cluster, namespace, operator, manifest
) -> None:
    def uid() -> str:
        return str(cluster.get("deployment", "chat", namespace)["metadata"]["uid"])

    cluster.apply(manifest(scaling={"min": 1, "max": 4}, nowhere=True), boost(namespace))
    eventually(
        lambda: cluster.get("kvcd", "chat", namespace).get("status", {}).get("replicas") == 3, 40, "boosted"
    )
    first = uid()
    cluster.kubectl("delete", "deployment", "chat", f"--namespace={namespace}")
    eventually(lambda: cluster.replicas(namespace) == 3, 30, "made again")
    assert uid() != first
    decisions = cluster.get("kvcd", "chat", namespace)["status"]["decisions"]
    assert [item["outcome"] for item in decisions] == ["ScaledOut"], "nothing was decided about the loss"


def test_other_owned_objects_that_were_deleted_or_edited_by_hand_are_put_right_at_once(
    cluster, namespace, operator, manifest
) -> None:
    cluster.apply(manifest(scaling={"min": 1, "max": 1}, nowhere=True))
    eventually(lambda: cluster.pods(namespace), 30, "a pod")
    for kind, name in (("service", "chat"), ("poddisruptionbudget", "chat"), ("secret", "chat-admin")):
        before = cluster.get(kind, name, namespace)["metadata"]["uid"]
        cluster.kubectl("delete", kind, name, f"--namespace={namespace}")
        eventually(
            lambda kind=kind, name=name, before=before: (
                cluster.get(kind, name, namespace).get("metadata", {}).get("uid") not in {None, before}
            ),
            20,
            f"{kind} {name} is made again",
        )
    token = cluster.get("secret", "chat-admin", namespace)["data"]
    cluster.kubectl(
        "patch", "secret", "chat-admin", f"--namespace={namespace}", '--patch={"data":{"token":"dGhlaXJz"}}'
    )
    eventually(
        lambda: cluster.get("secret", "chat-admin", namespace)["data"] == token, 20, "the token is ours again"
    )


def boost(namespace: str) -> dict[str, Any]:
    return {
        "apiVersion": "kvpilot.io/v1alpha1", "kind": "KVCacheOverride",
        "metadata": {"name": "more", "namespace": namespace},
        "spec": {"target": "chat", "boost": {"minReplicas": 3}, "expiresAt": "2099-01-01T00:00:00Z"},
    }  # fmt: skip
