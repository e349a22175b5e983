"""The objects that a resource owns, for server-side apply. Pure: the same resource gives the same objects."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any

import yaml

from kvpilot_operator.manifests import names
from kvpilot_operator.manifests.workload import deployment
from kvpilot_operator.resource.model import KVCacheDeployment
from kvpilot_operator.status.snapshot import AcceptedSpec
from kvpilot_operator.tuning.observation import Promoted

MAX_RECORDS = 50
"""Number of whole decision records kept."""


def owned_objects(
    resource: KVCacheDeployment, admin_token: str, replicas: int | None = None
) -> tuple[dict[str, Any], ...]:
    """Everything but the two ConfigMaps, in the order in which they are applied.

    Args:
        resource: the resource, with its UID.
        admin_token: bearer token of its engines' admin API.
        replicas: number of a workload that does not exist yet; None leaves the number alone.
    """
    return (
        _object("v1", "ServiceAccount", resource, automountServiceAccountToken=False),
        _admin_secret(resource, admin_token),
        _service(resource),
        _disruption_budget(resource),
        deployment(resource, _metadata(resource), replicas),
    )


def config_map(
    resource: KVCacheDeployment, promoted: Promoted, accepted: AcceptedSpec | None = None
) -> dict[str, Any]:
    """The promoted configuration, from which pods start, and the last spec that was rolled out.

    Hot values live here and nowhere else.
    """
    content = {"generation": promoted.generation, "config": dict(promoted.config)}
    data = {names.CONFIG_KEY: yaml.safe_dump(content, sort_keys=True)}
    if accepted is not None:
        content = {"generation": accepted.generation, "spec": dict(accepted.spec)}
        data[names.SPEC_KEY] = yaml.safe_dump(content, sort_keys=True)
    return _object("v1", "ConfigMap", resource, names.config_name(resource.metadata.name), data=data)


def promoted_of(data: dict[str, str] | None) -> Promoted | None:
    """The promoted configuration in :func:`config_map`; None if it is absent or cannot be read."""
    try:
        content = yaml.safe_load((data or {})[names.CONFIG_KEY])
        return Promoted(int(content["generation"]), dict(content["config"]))
    except (KeyError, TypeError, ValueError, yaml.YAMLError):
        return None


def accepted_of(data: dict[str, str] | None) -> AcceptedSpec | None:
    """The accepted spec in :func:`config_map`; None if it is absent or cannot be read."""
    try:
        content = yaml.safe_load((data or {})[names.SPEC_KEY])
        return AcceptedSpec(int(content["generation"]), dict(content["spec"]))
    except (KeyError, TypeError, ValueError, yaml.YAMLError):
        return None


def decisions_map(resource: KVCacheDeployment, records: Iterable[str]) -> dict[str, Any]:
    """The last whole decision records, one JSON document a line, oldest first."""
    lines = list(records)[-MAX_RECORDS:]
    return _object(
        "v1",
        "ConfigMap",
        resource,
        names.decisions_name(resource.metadata.name),
        data={names.DECISIONS_KEY: "".join(f"{line}\n" for line in lines)},
    )


def _object(
    api_version: str, kind: str, resource: KVCacheDeployment, name: str = "", /, **content: Any
) -> dict[str, Any]:
    return {"apiVersion": api_version, "kind": kind, "metadata": _metadata(resource, name), **content}


def _metadata(resource: KVCacheDeployment, name: str = "") -> dict[str, Any]:
    """Owner references: deleting the resource deletes its objects without a finalizer."""
    owner = resource.metadata
    return {
        "name": name or owner.name,
        "namespace": owner.namespace,
        "labels": dict(names.labels(owner.name)),
        "ownerReferences": [
            {
                "apiVersion": resource.api_version,
                "kind": resource.kind,
                "name": owner.name,
                "uid": owner.uid,
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ],
    }


def _admin_secret(resource: KVCacheDeployment, token: str) -> dict[str, Any]:
    data = {names.TOKEN_KEY: base64.b64encode(token.encode()).decode()}
    return _object(
        "v1", "Secret", resource, names.admin_name(resource.metadata.name), type="Opaque", data=data
    )


def _service(resource: KVCacheDeployment) -> dict[str, Any]:
    port = {"name": "http", "port": names.HTTP_PORT, "targetPort": "http", "protocol": "TCP"}
    return _object(
        "v1",
        "Service",
        resource,
        spec={
            "type": "ClusterIP",
            "selector": names.selector_labels(resource.metadata.name),
            "ports": [port],
        },
    )


def _disruption_budget(resource: KVCacheDeployment) -> dict[str, Any]:
    """Uses ``maxUnavailable``, since ``minAvailable`` blocks every drain of a single pod."""
    return _object(
        "policy/v1",
        "PodDisruptionBudget",
        resource,
        spec={
            "maxUnavailable": 1,
            "selector": {"matchLabels": names.selector_labels(resource.metadata.name)},
        },
    )
