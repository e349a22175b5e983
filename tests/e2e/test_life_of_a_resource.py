"""Life of a resource: apply, ready, scraped, deleted, with and without a running operator."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from tests.e2e.cluster import condition, eventually

# ruff: noqa: PLR0917 - fixtures are taken by name
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(480)]

OWNED = ("serviceaccount", "secret", "service", "poddisruptionbudget", "deployment", "configmap", "pod")


def leftovers(cluster: Any, namespace: str) -> list[str]:
    return [
        f"{kind}/{item['metadata']['name']}"
        for kind in OWNED
        for item in cluster.list(kind, namespace, "kvpilot.io/name=chat")
    ]


def reconciles_without_a_write(cluster: Any, namespace: str, operator: Any, wanted: int = 4) -> bool:
    """True if ``wanted`` reconciles in a row leave the resource unchanged."""

    def version() -> str:
        return cluster.get("kvcd", "chat", namespace)["metadata"]["resourceVersion"]

    def results() -> float:
        return operator.metrics("kvpilot_operator_step_seconds_count")['{step="decide"}']

    before, first = version(), results()
    while results() < first + wanted and version() == before:
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
    eventually(
        lambda: reconciles_without_a_write(cluster, namespace, operator), 60, "no writes in a steady state"
    )

    cluster.kubectl("delete", "kvcd", "chat", f"--namespace={namespace}", "--timeout=20s")
    eventually(lambda: not leftovers(cluster, namespace), 60, "everything it owned is gone")
    assert operator.stop() == 0


def test_ready_says_why_replicas_do_not_serve(cluster, namespace, operator, manifest) -> None:
    def reported(words: str) -> bool:
        found = condition(cluster.get("kvcd", "chat", namespace), "Ready")
        return found.get("status") == "False" and words in found["message"]

    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "none", "namespace": namespace},
    }
    cluster.apply({**quota, "spec": {"hard": {"pods": "0"}}})
    cluster.apply(manifest(scaling={"min": 1, "max": 1}, config={"numHeads": 3}))
    eventually(lambda: reported("exceeded quota: none"), 40, "the quota")
    cluster.kubectl("delete", "resourcequota", "none", f"--namespace={namespace}")
    eventually(
        lambda: reported("num_heads: 3 differs from the model's 8"), 150, "the engine's last log lines"
    )


def test_delete_succeeds_while_the_operator_is_down(cluster, namespace, operator, manifest) -> None:
    cluster.apply(manifest(scaling={"min": 1, "max": 1}))
    eventually(lambda: cluster.pods(namespace), 30, "a pod")
    operator.kill()
    cluster.kubectl("delete", "kvcd", "chat", f"--namespace={namespace}", "--timeout=20s")
    eventually(lambda: not leftovers(cluster, namespace), 60, "everything it owned is gone")


def test_invalid_spec_is_reported_and_changes_no_running_replica(
    cluster, namespace, operator, manifest
) -> None:
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

    return str(eventually(refused, 20, "a condition that names the error")["message"])


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
def test_template_that_the_api_server_refuses_is_reported(
    cluster, namespace, operator, manifest, part, named
) -> None:
    document = manifest(scaling={"min": 1, "max": 1}, nowhere=True)
    right = json.dumps({"spec": {"template": {"spec": dict.fromkeys(part)}}})
    document["spec"]["template"]["spec"].update(part)
    cluster.apply(document)
    reported = refusal(cluster, namespace)
    assert all(item in reported for item in named), reported
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
def test_objects_of_others_are_neither_adopted_nor_deleted(
    cluster, namespace, operator, manifest, kind, name, content
) -> None:
    theirs = {"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "namespace": namespace}, **content}
    cluster.apply(theirs)
    before = cluster.get(kind.lower(), name, namespace)
    cluster.apply(manifest(scaling={"min": 1, "max": 1}, nowhere=True))
    reported = refusal(cluster, namespace)
    assert reported.startswith(f"metadata.name: {kind} {name} exists and is not this resource's"), reported
    cluster.kubectl("delete", "kvcd", "chat", f"--namespace={namespace}", "--timeout=20s")
    assert cluster.get(kind.lower(), name, namespace) == before


def test_deleted_deployment_is_recreated_with_its_size(cluster, namespace, operator, manifest) -> None:
    def uid() -> str:
        return str(cluster.get("deployment", "chat", namespace)["metadata"]["uid"])

    cluster.apply(manifest(scaling={"min": 1, "max": 4}, nowhere=True), boost(namespace))
    eventually(lambda: cluster.status(namespace).get("replicas") == 3, 40, "boosted")
    first = uid()
    cluster.kubectl("delete", "deployment", "chat", f"--namespace={namespace}")
    eventually(lambda: cluster.replicas(namespace) == 3, 30, "the Deployment is recreated")
    assert uid() != first
    decisions = cluster.status(namespace)["decisions"]
    assert [item["outcome"] for item in decisions] == ["ScaledOut"], "the deletion causes no decision"


def test_other_owned_objects_are_restored_after_a_manual_deletion_or_edit(
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
            f"{kind} {name} is recreated",
        )
    token = cluster.get("secret", "chat-admin", namespace)["data"]
    cluster.kubectl(
        "patch", "secret", "chat-admin", f"--namespace={namespace}", '--patch={"data":{"token":"dGhlaXJz"}}'
    )
    eventually(
        lambda: cluster.get("secret", "chat-admin", namespace)["data"] == token, 20, "the token is restored"
    )


def boost(namespace: str) -> dict[str, Any]:
    return {
        "apiVersion": "kvpilot.io/v1alpha1", "kind": "KVCacheOverride",
        "metadata": {"name": "more", "namespace": namespace},
        "spec": {"target": "chat", "boost": {"minReplicas": 3}, "expiresAt": "2099-01-01T00:00:00Z"},
    }  # fmt: skip
