"""Values read from API objects. Pure."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from typing import Any

from kvpilot_operator.manifests.names import ADMIN_PORT, TOKEN_KEY
from kvpilot_operator.resource.times import seconds_of
from kvpilot_operator.status.snapshot import Replica

MANAGER = "kvpilot"
"""Field manager of the owned objects, never of a workload's number of replicas."""

SCALE_MANAGER = "kvpilot-scale"
"""Field manager of the number of replicas, through the workload's /scale."""

ADMIN_EPOCH = 1

AUTOSCALER = "kube-controller-manager"
"""Field manager under which a HorizontalPodAutoscaler writes."""

LAST_WORDS = 256
"""Longest last line of a container in a condition, characters."""

_SOUND_STARTS = frozenset({None, "ContainerCreating", "PodInitializing"})
_NO_NEWS = frozenset({"", "Error", "Completed"})
_REFUSED_POD = re.compile(r'^pods "[^"]*" is ')


def admin_token(operator_key: bytes, uid: str) -> str:
    """Admin token of a resource's engines, derived from the operator's key, so that no Secret is read."""
    return hmac.new(operator_key, f"{uid}:{ADMIN_EPOCH}".encode(), hashlib.sha256).hexdigest()


def replica_of(pod: Mapping[str, Any], token: str) -> Replica | None:
    """The replica of a pod; None for a pod that has ended."""
    metadata, status = pod["metadata"], pod.get("status") or {}
    if status.get("phase") in {"Succeeded", "Failed"}:
        return None
    conditions = {item["type"]: item for item in status.get("conditions") or ()}
    containers = (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ()))
    address = status.get("podIP", "")
    host = f"[{address}]" if ":" in address else address
    ready = conditions.get("Ready", {}).get("status") == "True"
    created_at = seconds_of(metadata.get("creationTimestamp"))
    return Replica(
        uid=metadata["uid"],
        name=metadata["name"],
        ready=ready,
        admin_url=f"http://{host}:{ADMIN_PORT}" if host else "",
        admin_token=token,
        terminating="deletionTimestamp" in metadata,
        pending_reason="" if ready else _pending_reason(conditions, containers),
        created_at=created_at,
        start_s=max(0.0, seconds_of(conditions["Ready"].get("lastTransitionTime")) - created_at)
        if ready
        else 0.0,
        restarts=sum(int(item.get("restartCount", 0)) for item in containers),
    )


def _pending_reason(
    conditions: Mapping[str, Mapping[str, Any]], containers: Iterable[Mapping[str, Any]]
) -> str:
    """Why a pod is not running, by the scheduler, the kubelet or the container that ended.

    "" while it starts normally.
    """
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        return f"{scheduled.get('reason', 'Unschedulable')}: {scheduled.get('message', '')}".rstrip(": ")
    for container in containers:
        waiting = (container.get("state") or {}).get("waiting") or {}
        stuck = waiting.get("reason") not in _SOUND_STARTS
        words = _last_words(container)
        if stuck or words:
            reported = (waiting["reason"] if stuck else "Restarted", words or waiting.get("message", ""))
            return ": ".join(filter(None, reported))
    return ""


def _last_words(container: Mapping[str, Any]) -> str:
    """The last line of a container that failed, or the reason of its end; "" without a failure."""
    states = (container.get("state") or {}, container.get("lastState") or {})
    ended: Mapping[str, Any] = next((s["terminated"] for s in states if s.get("terminated")), {})
    if not ended.get("exitCode"):
        return ""
    lines = str(ended.get("message") or "").split("\n")
    line = next((line.strip() for line in reversed(lines) if line.strip()), "")
    reason = str(ended.get("reason") or "")
    reported = (reason if reason not in _NO_NEWS else "", line[:LAST_WORDS])
    return ": ".join(filter(None, reported)) or f"exit status {ended['exitCode']}"


def replica_managers(workload: Mapping[str, Any]) -> set[str]:
    """Field managers that own the workload's number of replicas."""
    entries = workload["metadata"].get("managedFields") or ()
    return {entry.get("manager", "") for entry in entries if _owns_replicas(entry)}


def conflicting_manager(workload: Mapping[str, Any]) -> str:
    """Another field manager of the number of replicas; "" if there is none, or if it is an autoscaler."""
    return min(replica_managers(workload) - {MANAGER, SCALE_MANAGER, AUTOSCALER}, default="")


def autoscaler_of(name: str, autoscalers: Iterable[Mapping[str, Any]]) -> str:
    """The HorizontalPodAutoscaler whose target is the Deployment of that name; "" without one."""
    for item in autoscalers:
        target = item["spec"]["scaleTargetRef"]
        if (target["kind"], target["name"]) == ("Deployment", name):
            return f"HorizontalPodAutoscaler {item['metadata']['name']}"
    return ""


def without_conflicting_managers(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """``metadata.managedFields`` in which only kvpilot owns the number of replicas."""
    kept = []
    for entry in entries:
        if not _owns_replicas(entry) or entry.get("manager") in {MANAGER, SCALE_MANAGER}:
            kept.append(dict(entry))
            continue
        spec = {name: value for name, value in entry["fieldsV1"]["f:spec"].items() if name != "f:replicas"}
        fields = {**entry["fieldsV1"], "f:spec": spec}
        if not spec:
            del fields["f:spec"]
        if fields:
            kept.append({**entry, "fieldsV1": fields})
    return kept


def _owns_replicas(entry: Mapping[str, Any]) -> bool:
    return "f:replicas" in ((entry.get("fieldsV1") or {}).get("f:spec") or {})


def replica_failure(workload: Mapping[str, Any]) -> str:
    """Why the API server refuses the workload's pods, such as a quota; "" if it does not."""
    for condition in (workload.get("status") or {}).get("conditions") or ():
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            # Without the pod's name, which differs at every attempt.
            message = _REFUSED_POD.sub("", condition.get("message", ""))
            return f"{condition.get('reason', 'ReplicaFailure')}: {message}".rstrip(": ")
    return ""


def holds_token(secret: Mapping[str, Any] | None) -> bool:
    """True if the token in the Secret is the one that kvpilot wrote, judged by the metadata alone."""
    entries = ((secret or {}).get("metadata") or {}).get("managedFields") or ()
    return any(
        entry.get("manager") == MANAGER
        and f"f:{TOKEN_KEY}" in ((entry.get("fieldsV1") or {}).get("f:data") or {})
        for entry in entries
    )


def replacing_pods(workload: Mapping[str, Any]) -> bool:
    """True if pods of an older template still run, or the controller has not seen the newest template."""
    status = workload.get("status") or {}
    if int(status.get("observedGeneration", 0)) < int(workload["metadata"].get("generation", 0)):
        return True
    return int(status.get("replicas", 0)) > int(status.get("updatedReplicas", 0))
