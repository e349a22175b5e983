"""The objects that a resource owns: names, safety, drain, and what never stands in a pod template."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
import yaml

from kvpilot_operator.manifests import config_map, decisions_map, owned_objects, promoted_of
from kvpilot_operator.manifests.names import COLD_HASH
from kvpilot_operator.resource import KVCacheDeployment
from kvpilot_operator.tuning.observation import Promoted


def resource(name: str = "chat", **spec: Any) -> KVCacheDeployment:
    return KVCacheDeployment.parse(
        {
            "apiVersion": "kvpilot.io/v1alpha1",
            "kind": "KVCacheDeployment",
            "metadata": {"name": name, "namespace": "team-a", "uid": "u-1"},
            "spec": {"scaling": {"min": 2, "max": 4}, **spec},
        }
    )


def owned(replicas: int | None = None, **spec: Any) -> dict[str, dict[str, Any]]:
    return {item["kind"]: item for item in owned_objects(resource(**spec), "token", replicas)}


def template(**spec: Any) -> dict[str, Any]:
    found: dict[str, Any] = owned(**spec)["Deployment"]["spec"]["template"]
    return found


def engine(**spec: Any) -> dict[str, Any]:
    containers = template(**spec)["spec"]["containers"]
    return next(item for item in containers if item["name"] == "engine")


def test_every_object_is_owned_labelled_and_in_the_same_namespace() -> None:
    everything = [
        *owned_objects(resource(), "token", 2),
        config_map(resource(), Promoted(1, {})),
        decisions_map(resource(), []),
    ]
    assert [(item["kind"], item["metadata"]["name"]) for item in everything] == [
        ("ServiceAccount", "chat"),
        ("Secret", "chat-admin"),
        ("Service", "chat"),
        ("PodDisruptionBudget", "chat"),
        ("Deployment", "chat"),
        ("ConfigMap", "chat-config"),
        ("ConfigMap", "chat-decisions"),
    ]
    for item in everything:
        metadata = item["metadata"]
        assert metadata["namespace"] == "team-a"
        assert metadata["labels"]["app.kubernetes.io/managed-by"] == "kvpilot"
        assert metadata["ownerReferences"] == [
            {
                "apiVersion": "kvpilot.io/v1alpha1",
                "kind": "KVCacheDeployment",
                "name": "chat",
                "uid": "u-1",
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ]


def test_the_same_resource_gives_the_same_objects() -> None:
    assert json.dumps(owned_objects(resource(), "token")) == json.dumps(owned_objects(resource(), "token"))


def test_replicas_are_left_out_unless_the_workload_is_new() -> None:
    assert "replicas" not in owned()["Deployment"]["spec"]
    assert owned(replicas=3)["Deployment"]["spec"]["replicas"] == 3


def test_names_ports_and_selectors_fit_together() -> None:
    found = owned()
    labels = template()["metadata"]["labels"]
    for selector in (
        found["Service"]["spec"]["selector"],
        found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        found["Deployment"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector == {"kvpilot.io/name": "chat", "app.kubernetes.io/component": "engine"}
        assert selector.items() <= labels.items()
    assert {(p["name"], p["containerPort"]) for p in engine()["ports"]} == {("http", 8000), ("admin", 8001)}
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == "http"
    assert found["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
    assert base64.b64decode(found["Secret"]["data"]["token"]) == b"token"


def test_arguments_are_what_the_engine_takes() -> None:
    assert engine(rollout={"drainSeconds": 30})["args"] == [
        *("--model", "builtin/tiny-llama"),
        *("--config", "/etc/kvpilot/config.yaml"),
        *("--host", "0.0.0.0"),
        *("--port", "8000", "--admin-port", "8001"),
        *("--admin-token-file", "/etc/kvpilot-admin/token"),
        *("--drain-seconds", "30"),
    ]


def test_a_model_from_a_claim_is_mounted() -> None:
    model = {"source": "qwen3", "revision": "main", "claimName": "models"}
    arguments = engine(engine={"model": model})["args"]
    assert arguments[:4] == ["--model", "/models/qwen3", "--revision", "main"]
    pod = template(engine={"model": model})["spec"]
    claim = {"claimName": "models", "readOnly": True}
    assert {"name": "models", "persistentVolumeClaim": claim} in pod["volumes"]
    mounts = {item["mountPath"]: item["name"] for item in engine(engine={"model": model})["volumeMounts"]}
    assert mounts["/models"] == "models"


def test_a_pod_may_drain_longer_than_its_requests_take() -> None:
    pod = template(rollout={"drainSeconds": 300})["spec"]
    sleep = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > 300 + sleep
    assert engine()["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
    assert engine()["livenessProbe"]["httpGet"]["path"] == "/healthz"
    startup = engine()["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 1800


def test_pods_run_under_the_restricted_standard() -> None:
    pod = template()["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert engine()["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    writable = {m["mountPath"] for m in engine()["volumeMounts"] if not m.get("readOnly")}
    assert writable == {"/tmp", "/dev/shm"}


def test_a_hot_value_never_stands_in_the_pod_template() -> None:
    one = template(engine={"config": {"numWorkers": 8, "maxTokens": 4096, "cacheStrategy": "lru"}})
    other = template(engine={"config": {"numWorkers": 16, "maxTokens": 8192, "cacheStrategy": "lfu"}})
    assert one == other


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"dtype": "float32"}},
        {"config": {"device": "cpu"}},
        {"image": "other:1"},
        {"model": {"source": "/models/other"}},
    ],
)
def test_what_an_engine_takes_at_its_start_rolls_the_pods(change: dict[str, Any]) -> None:
    assert template(engine=change) != template()


def test_the_digest_does_not_depend_on_what_is_a_default_anyway() -> None:
    given = template(engine={"config": {"dtype": "float16"}})
    assert given["metadata"]["annotations"][COLD_HASH] == template()["metadata"]["annotations"][COLD_HASH]


def test_the_configuration_comes_back_from_its_configmap() -> None:
    promoted = Promoted(17, {"numWorkers": 16, "compressionRatio": 0.5, "cacheStrategy": "lru"})
    written = config_map(resource(), promoted)
    assert promoted_of(written["data"]) == promoted
    assert yaml.safe_load(written["data"]["config.yaml"])["generation"] == 17
    assert promoted_of(None) is None
    assert promoted_of({"config.yaml": "generation: ["}) is None


def test_decisions_keep_the_last_fifty() -> None:
    lines = decisions_map(resource(), [f'{{"id": {n}}}' for n in range(60)])["data"]["decisions.jsonl"]
    assert lines.splitlines()[0] == '{"id": 10}'
    assert len(lines.splitlines()) == 50


def test_the_last_words_of_an_engine_that_fails_are_kept_by_kubernetes() -> None:
    assert engine()["terminationMessagePolicy"] == "FallbackToLogsOnError"
