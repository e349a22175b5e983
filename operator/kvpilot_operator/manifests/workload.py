"""The Deployment of a resource's engines."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from kvpilot_engine.contract import KVCacheConfig
from kvpilot_engine.contract.config import COLD_FIELDS
from kvpilot_operator.manifests import names
from kvpilot_operator.manifests.merge import merged
from kvpilot_operator.resource.model import DeploymentSpec, KVCacheDeployment, Model
from kvpilot_operator.resource.resolve import base_config

PRE_STOP_SECONDS = 5
"""Time for endpoints and routers to drop a terminating pod before it gets its signal, s."""

EXIT_SECONDS = 15
"""Time for an engine to exit after its last request, s."""

STARTUP_SECONDS = 1800
"""Longest time an engine may load its model, s."""

_USER = 65532


def deployment(resource: KVCacheDeployment, metadata: dict[str, Any], replicas: int | None) -> dict[str, Any]:
    """The Deployment, for server-side apply.

    ``replicas`` is None once the workload exists: the number has its own field manager. A workload that is
    created with a number needs that number written through /scale as well; else dropping the field resets it
    to 1.
    """
    name, spec = resource.metadata.name, resource.spec
    workload: dict[str, Any] = {
        "selector": {"matchLabels": names.selector_labels(name)},
        "revisionHistoryLimit": 3,
        "progressDeadlineSeconds": STARTUP_SECONDS + 600,
        "strategy": {
            "type": "RollingUpdate",
            "rollingUpdate": {
                "maxSurge": spec.rollout.max_surge,
                "maxUnavailable": spec.rollout.max_unavailable,
            },
        },
        "template": pod_template(name, spec),
    }
    if replicas is not None:
        workload["replicas"] = replicas
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": workload}


def pod_template(name: str, spec: DeploymentSpec) -> dict[str, Any]:
    """The pod template: kvpilot's, the user's over it, then the selector labels and the digest."""
    ours = {"metadata": {"labels": dict(names.labels(name))}, "spec": _pod(name, spec)}
    template = merged(ours, {"metadata": spec.template.metadata, "spec": spec.template.spec})
    fixed = {
        "labels": {**names.selector_labels(name), **names.PART_OF},
        "annotations": {names.COLD_HASH: cold_hash(base_config(spec))},
    }
    return {**template, "metadata": merged(template["metadata"], fixed)}


def cold_hash(config: KVCacheConfig) -> str:
    """Digest of the fields that need a restart; a new digest replaces the pods."""
    cold = config.model_dump(include=set(COLD_FIELDS), by_alias=True, mode="json")
    return hashlib.sha256(json.dumps(cold, sort_keys=True).encode()).hexdigest()[:16]


def _pod(name: str, spec: DeploymentSpec) -> dict[str, Any]:
    return {
        "serviceAccountName": name,
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": PRE_STOP_SECONDS + spec.rollout.drain_seconds + EXIT_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_engine(spec)],
        "volumes": [
            {"name": "config", "configMap": {"name": names.config_name(name)}},
            {"name": "admin", "secret": {"secretName": names.admin_name(name)}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
            *_model_volumes(spec.engine.model),
        ],
    }


def _engine(spec: DeploymentSpec) -> dict[str, Any]:
    pull = spec.engine.image_pull_policy
    return {
        "name": "engine",
        "image": spec.engine.image,
        **({"imagePullPolicy": pull} if pull else {}),
        "args": _arguments(spec),
        # An engine that cannot start prints the cause as its last line; the condition Ready repeats it.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "env": [
            {"name": "HOME", "value": "/tmp"},
            {"name": "USER", "value": "kvpilot"},
        ],
        "ports": [
            {"name": "http", "containerPort": names.HTTP_PORT, "protocol": "TCP"},
            {"name": "admin", "containerPort": names.ADMIN_PORT, "protocol": "TCP"},
        ],
        "startupProbe": _probe("/readyz", period=2, failures=STARTUP_SECONDS // 2),
        "readinessProbe": _probe("/readyz", period=2, failures=2),
        "livenessProbe": _probe("/healthz", period=10, failures=6),
        "lifecycle": {"preStop": {"sleep": {"seconds": PRE_STOP_SECONDS}}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "config", "mountPath": names.CONFIG_DIRECTORY, "readOnly": True},
            {"name": "admin", "mountPath": names.ADMIN_DIRECTORY, "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
            *_model_mounts(spec.engine.model),
        ],
    }


def _arguments(spec: DeploymentSpec) -> list[str]:
    model = spec.engine.model
    builtin = model.source.startswith("builtin/")
    below = model.claim_name and not builtin
    source = f"{names.MODELS_DIRECTORY}/{model.source.lstrip('/')}" if below else model.source
    return [
        *("--model", source),
        *(("--revision", model.revision) if model.revision else ()),
        *("--config", f"{names.CONFIG_DIRECTORY}/{names.CONFIG_KEY}"),
        *("--host", "0.0.0.0"),
        *("--port", str(names.HTTP_PORT)),
        *("--admin-port", str(names.ADMIN_PORT)),
        *("--admin-token-file", f"{names.ADMIN_DIRECTORY}/{names.TOKEN_KEY}"),
        *("--drain-seconds", str(spec.rollout.drain_seconds)),
    ]


def _model_volumes(model: Model) -> list[dict[str, Any]]:
    if not model.claim_name:
        return []
    claim = {"claimName": model.claim_name, "readOnly": True}
    return [{"name": "models", "persistentVolumeClaim": claim}]


def _model_mounts(model: Model) -> list[dict[str, Any]]:
    if not model.claim_name:
        return []
    return [{"name": "models", "mountPath": names.MODELS_DIRECTORY, "readOnly": True}]


def _probe(path: str, period: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": path, "port": "http"},
        "periodSeconds": period,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }
