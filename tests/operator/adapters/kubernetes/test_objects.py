"""What API objects mean: pods, and managers of replicas."""

from __future__ import annotations

from typing import Any

import pytest

from kvpilot_operator.adapters.kubernetes import objects
from kvpilot_operator.adapters.kubernetes.api import ApiError, path_of

NOW = 1_795_399_200.0  # 2026-11-23T02:00:00Z


def pod(**status: Any) -> dict[str, Any]:
    return {
        "metadata": {"uid": "u", "name": "chat-1", "creationTimestamp": "2026-11-23T02:00:00Z"},
        "status": {"phase": "Running", **status},
    }


def ended(state: dict[str, Any], **terminated: Any) -> dict[str, Any]:
    """A container whose last run failed."""
    return {"state": state, "lastState": {"terminated": {"exitCode": 2, "reason": "Error", **terminated}}}


def test_a_ready_pod() -> None:
    given = pod(
        podIP="10.244.0.7",
        conditions=[{"type": "Ready", "status": "True"}],
        containerStatuses=[{"restartCount": 2}, {"restartCount": 1}],
    )
    got = objects.replica_of(given, "secret")
    assert got is not None
    assert (got.ready, got.admin_url, got.restarts, got.created_at) == (
        True,
        "http://10.244.0.7:8001",
        3,
        NOW,
    )
    assert "secret" not in repr(got)


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_pod_that_has_ended_is_none(phase: str) -> None:
    assert objects.replica_of(pod(phase=phase), "") is None


def test_an_address_of_the_newer_kind_is_bracketed() -> None:
    got = objects.replica_of(pod(podIP="fd00::7"), "")
    assert got is not None
    assert got.admin_url == "http://[fd00::7]:8001"


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (
            {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                             "message": "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."}]},
            "Unschedulable: 0/1 nodes are available: 1 Insufficient nvidia.com/gpu.",
        ),
        ({"containerStatuses": [{"state": {"waiting": {"reason": "ErrImagePull", "message": "none"}}}]},
         "ErrImagePull: none"),
        ({"containerStatuses": [{"state": {"waiting": {"reason": "CrashLoopBackOff"}}}]}, "CrashLoopBackOff"),
        ({"initContainerStatuses": [{"state": {"waiting": {"reason": "ErrImageNeverPull"}}}],
          "containerStatuses": [{"state": {"waiting": {"reason": "PodInitializing"}}}]}, "ErrImageNeverPull"),
        ({"containerStatuses": [{"state": {"waiting": {"reason": "ContainerCreating"}}}]}, ""),
        ({"containerStatuses": [ended({"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s"}},
                                      message="loading\nkvpilot serve: numHeads: must divide\n\n")]},
         "CrashLoopBackOff: kvpilot serve: numHeads: must divide"),
        ({"containerStatuses": [ended({"running": {}}, message="kvpilot serve: no such model")]},
         "Restarted: kvpilot serve: no such model"),
        ({"containerStatuses": [ended({"running": {}}, reason="OOMKilled", exitCode=137)]},
         "Restarted: OOMKilled"),
        ({"containerStatuses": [ended({"waiting": {"reason": "CrashLoopBackOff"}}, message="\n")]},
         "CrashLoopBackOff: exit status 2"),
        ({"containerStatuses": [ended({"running": {}}, message="x" * 4000)]}, f"Restarted: {'x' * 256}"),
        ({"initContainerStatuses": [{"state": {"terminated": {"exitCode": 0, "reason": "Completed",
                                                              "message": "fetched"}}}],
          "containerStatuses": [{"state": {"running": {}}}]}, ""),
        ({"conditions": [{"type": "Ready", "status": "False"}]}, ""),
    ],
)  # fmt: skip
def test_why_a_pod_is_not_running(status: dict[str, Any], reason: str) -> None:
    got = objects.replica_of(pod(**status), "")
    assert got is not None
    assert got.pending_reason == reason


def workload(*managers: str, **status: Any) -> dict[str, Any]:
    fields = [{"manager": m, "fieldsV1": {"f:spec": {"f:replicas": {}}}} for m in managers]
    other = {"manager": "kube-controller-manager", "fieldsV1": {"f:status": {"f:replicas": {}}}}
    metadata = {"name": "chat", "generation": 3, "managedFields": [*fields, other]}
    return {"metadata": metadata, "status": status}


@pytest.mark.parametrize(
    ("managers", "conflicting"),
    [((), ""), (("kvpilot-scale",), ""), (("kvpilot", "kvpilot-scale"), ""), (("kubectl",), "kubectl"),
     (("kvpilot-scale", "kube-controller-manager"), "")],
)  # fmt: skip
def test_who_else_writes_the_number_of_replicas(managers: tuple[str, ...], conflicting: str) -> None:
    assert objects.conflicting_manager(workload(*managers)) == conflicting


def test_what_others_own_beside_the_replicas_stays_theirs() -> None:
    edit = {"manager": "edit", "fieldsV1": {"f:spec": {"f:replicas": {}, "f:paused": {}}, "f:metadata": {}}}
    entries = [*workload("kvpilot-scale", "kubectl")["metadata"]["managedFields"], edit]
    left = objects.without_conflicting_managers(entries)
    assert [entry["manager"] for entry in left] == ["kvpilot-scale", "kube-controller-manager", "edit"]
    assert left[:2] == [entries[0], entries[2]], "the status of the Deployment is not the number asked for"
    assert left[2]["fieldsV1"] == {"f:spec": {"f:paused": {}}, "f:metadata": {}}


def autoscaler(name: str, kind: str = "Deployment", target: str = "chat") -> dict[str, Any]:
    return {"metadata": {"name": name}, "spec": {"scaleTargetRef": {"kind": kind, "name": target}}}


def test_an_autoscaler_of_the_deployment_is_found_and_one_of_the_resource_is_not() -> None:
    others = [autoscaler("other", target="code"), autoscaler("ours", kind="KVCacheDeployment")]
    found = objects.autoscaler_of("chat", [*others, autoscaler("theirs")])
    assert found == "HorizontalPodAutoscaler theirs"
    assert objects.autoscaler_of("chat", others) == ""


def test_pods_that_the_api_server_refuses_are_shown_without_their_changing_names() -> None:
    failure = {
        "type": "ReplicaFailure",
        "status": "True",
        "reason": "FailedCreate",
        "message": 'pods "chat-5d4-x7k2p" is forbidden: exceeded quota: team, used: pods=2, limited: pods=2',
    }
    assert objects.replica_failure(workload(conditions=[failure])) == (
        "FailedCreate: forbidden: exceeded quota: team, used: pods=2, limited: pods=2"
    )
    assert objects.replica_failure(workload(conditions=[{**failure, "status": "False"}])) == ""
    assert objects.replica_failure(workload()) == ""


@pytest.mark.parametrize(
    ("managers", "ours"),
    [({"kvpilot": "f:token"}, True), ({"kvpilot": "f:token", "vault": "f:other"}, True),
     ({"kvpilot": "f:other", "kubectl-edit": "f:token"}, False), ({}, False)],
)  # fmt: skip
def test_whose_token_is_in_the_secret(managers: dict[str, str], ours: bool) -> None:
    fields = [{"manager": who, "fieldsV1": {"f:data": {field: {}}}} for who, field in managers.items()]
    assert objects.holds_token({"metadata": {"managedFields": fields}}) is ours
    assert not objects.holds_token(None)


@pytest.mark.parametrize(
    ("status", "replacing"),
    [
        ({"observedGeneration": 3, "replicas": 2, "updatedReplicas": 2}, False),
        ({"observedGeneration": 3, "replicas": 2, "updatedReplicas": 1}, True),
        ({"observedGeneration": 2, "replicas": 2, "updatedReplicas": 2}, True),
    ],
)
def test_whether_pods_are_being_replaced(status: dict[str, int], replacing: bool) -> None:
    assert objects.replacing_pods(workload(**status)) is replacing


def test_the_admin_token_follows_from_the_key_and_the_resource() -> None:
    token = objects.admin_token(b"k" * 32, "uid-1")
    assert token == objects.admin_token(b"k" * 32, "uid-1")
    assert len(token) == 64
    assert token not in {objects.admin_token(b"k" * 32, "uid-2"), objects.admin_token(b"l" * 32, "uid-1")}


@pytest.mark.parametrize(
    ("given", "path"),
    [
        (("v1", "Pod", "a"), "/api/v1/namespaces/a/pods"),
        (
            ("apps/v1", "Deployment", "a", "chat", "scale"),
            "/apis/apps/v1/namespaces/a/deployments/chat/scale",
        ),
        (("kvpilot.io/v1alpha1", "KVCacheOverride"), "/apis/kvpilot.io/v1alpha1/kvcacheoverrides"),
    ],
)
def test_paths(given: tuple[str, ...], path: str) -> None:
    assert path_of(*given) == path


@pytest.mark.parametrize(
    ("status", "message", "refused"),
    [
        (422, "spec.tolerations: Unsupported value", True),
        (400, "unknown field", True),
        (
            500,
            "failed to create typed patch object (a/chat; apps/v1, Kind=Deployment): .spec.x: no such",
            True,
        ),
        (500, "etcdserver: request timed out", False),
        (503, "the server is currently unable to handle the request", False),
        (0, "cannot connect", False),
    ],
)
def test_a_wrong_object_is_shown_from_a_server_in_trouble(status: int, message: str, refused: bool) -> None:
    assert ApiError(message, status).refuses_object is refused
