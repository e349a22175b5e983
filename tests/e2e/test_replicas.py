"""Writers of the number of replicas and handovers between them. Pods stay unscheduled."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
from tests.e2e.cluster import condition, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_kubectl_scale_of_the_resource_sets_its_replicas(cluster, namespace, operator, manifest) -> None:
    cluster.apply(manifest(replicas=2, nowhere=True))
    eventually(lambda: cluster.replicas(namespace) == 2, 30, "two replicas")
    cluster.kubectl("scale", "kvcd", "chat", f"--namespace={namespace}", "--replicas=4")
    eventually(lambda: cluster.replicas(namespace) == 4, 20, "four replicas")
    eventually(
        lambda: cluster.status(namespace).get("replicas") == 4,
        20,
        "the status reports it",
    )
    cluster.kubectl("scale", "kvcd", "chat", f"--namespace={namespace}", "--replicas=1")
    eventually(lambda: cluster.replicas(namespace) == 1, 20, "one replica")
    cluster.kubectl("scale", "deployment", "chat", f"--namespace={namespace}", "--replicas=3")
    eventually(lambda: cluster.replicas(namespace) == 1, 30, "the resource's own number again")


def test_handover_at_five_replicas_never_drops_below_five(cluster, namespace, operator, manifest) -> None:
    cluster.apply(manifest(scaling={"min": 5, "max": 8}, nowhere=True))
    eventually(lambda: cluster.replicas(namespace) == 5, 30, "five replicas")
    watch = subprocess.Popen(
        cluster.command(
            "get", "deployment", "chat", f"--namespace={namespace}", "--watch",
            "-o=jsonpath={.spec.replicas}{'\\n'}",
        ),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        hand_over(cluster, namespace, manifest)
    finally:
        watch.kill()
    assert watch.stdout is not None
    seen = [int(line) for line in watch.stdout.read().split()]
    assert seen, "the watch must see the Deployment"
    assert min(seen) >= 5


def hand_over(cluster: Any, namespace: str, manifest: Any) -> None:
    """Hand over from kvpilot to ``spec.replicas``, change that, and hand back."""
    for number, spec in enumerate(({"replicas": 5}, {"replicas": 6}, {"scaling": {"min": 5, "max": 8}}), 2):
        document = manifest(nowhere=True, config={"numWorkers": number}, **spec)
        absent = "scaling" if "replicas" in spec else "replicas"
        document["spec"].pop(absent, None)
        rewrite(cluster, namespace, document, absent)
    eventually(lambda: cluster.replicas(namespace) == 6, 20, "six replicas stay")


def rewrite(cluster: Any, namespace: str, document: dict[str, Any], absent: str) -> None:
    """Give `chat` another spec, without the field ``absent``, and wait until it is reconciled."""
    patch = json.dumps({"spec": {**document["spec"], absent: None}})
    cluster.kubectl("patch", "kvcd", "chat", f"--namespace={namespace}", "--type=merge", f"--patch={patch}")
    generation = cluster.get("kvcd", "chat", namespace)["metadata"]["generation"]
    eventually(
        lambda: cluster.status(namespace).get("observedGeneration") == generation,
        30,
        "the new spec is rolled out",
    )


def conflict(cluster: Any, namespace: str) -> dict[str, Any]:
    """The condition FieldManagerConflict if it is true, else {}."""
    found = condition(cluster.get("kvcd", "chat", namespace), "FieldManagerConflict")
    return found if found.get("status") == "True" else {}


def test_field_manager_conflict_on_the_deployment_is_reported_and_not_overwritten(
    cluster, namespace, operator, manifest
) -> None:
    cluster.apply(manifest(scaling={"min": 1, "max": 4}, nowhere=True))
    eventually(lambda: cluster.replicas(namespace) == 1, 30, "one replica")
    cluster.kubectl("scale", "deployment", "chat", f"--namespace={namespace}", "--replicas=2")
    reported = eventually(lambda: conflict(cluster, namespace), 30, "FieldManagerConflict")
    assert "kubectl" in reported["message"]
    assert cluster.replicas(namespace) == 2

    # After ten minutes, at this scale 30 s, the operator adopts the present number.
    operator.stop()
    operator.start(pace_scale=0.05)
    eventually(lambda: not conflict(cluster, namespace), 90, "the operator adopts the number")
    assert cluster.replicas(namespace) == 2
    owners = cluster.get("deployment", "chat", namespace)["metadata"]["managedFields"]
    assert [item["manager"] for item in owners if "f:replicas" in item["fieldsV1"].get("f:spec", {})] == [
        "kvpilot-scale"
    ]
    cluster.kubectl("scale", "deployment", "chat", f"--namespace={namespace}", "--replicas=3")
    eventually(lambda: conflict(cluster, namespace), 30, "another conflict")


def autoscaler(api_version: str, kind: str, minimum: int) -> dict[str, Any]:
    """An autoscaler that needs no metrics: it only keeps the target at ``minimum`` replicas."""
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "greedy"},
        "spec": {
            "scaleTargetRef": {"apiVersion": api_version, "kind": kind, "name": "chat"},
            "minReplicas": minimum,
            "maxReplicas": 6,
        },
    }


def test_autoscaler_scales_the_resource_and_one_of_the_deployment_is_a_conflict(
    cluster, namespace, operator, manifest
) -> None:
    def applied(document: dict[str, Any]) -> None:
        document["metadata"]["namespace"] = namespace
        cluster.apply(document)

    cluster.apply(manifest(replicas=1, nowhere=True))
    applied(autoscaler("kvpilot.io/v1alpha1", "KVCacheDeployment", 3))
    eventually(
        lambda: cluster.replicas(namespace) == 3,
        60,
        "three replicas through the resource's scale subresource",
    )
    assert cluster.get("kvcd", "chat", namespace)["spec"]["replicas"] == 3
    assert not conflict(cluster, namespace)

    cluster.kubectl("delete", "hpa", "greedy", f"--namespace={namespace}")
    rewrite(cluster, namespace, manifest(scaling={"min": 1, "max": 4}, nowhere=True), "replicas")
    applied(autoscaler("apps/v1", "Deployment", 4))
    reported = eventually(lambda: conflict(cluster, namespace), 60, "FieldManagerConflict")
    assert reported["message"].startswith("HorizontalPodAutoscaler greedy also writes the number of replicas")
    assert cluster.replicas(namespace) == 4

    rewrite(cluster, namespace, manifest(replicas=1, nowhere=True), "scaling")
    assert conflict(cluster, namespace)
    assert cluster.replicas(namespace) == 4
