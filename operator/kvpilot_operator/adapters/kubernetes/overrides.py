"""KVCacheOverrides in the API server: those that alerts create, the verdict in each status, and their end."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from kvpilot_operator.adapters.kubernetes.api import ApiError, JsonObject, KubernetesApi, path_of
from kvpilot_operator.adapters.kubernetes.objects import MANAGER
from kvpilot_operator.resource.model import API_VERSION
from kvpilot_operator.status.overrides import Verdict, name_of, overrides_of, with_verdict
from kvpilot_operator.status.snapshot import Key, Snapshot


def boost_name(key: Key, fingerprint: str) -> str:
    """Name of the override of one alert; the same alert always has the same."""
    return f"{key.name[:40]}-alert-{hashlib.sha256(fingerprint.encode()).hexdigest()[:10]}"


def boost_manifest(snapshot: Snapshot, fingerprint: str, minimum: int, until: float, why: str) -> JsonObject:
    """The override of one alert: at least ``minimum`` replicas until ``until``, s since the epoch."""
    metadata = snapshot.manifest["metadata"]
    owner = {
        "apiVersion": API_VERSION, "kind": "KVCacheDeployment", "name": metadata["name"],
        "uid": metadata["uid"],
    }  # fmt: skip
    return {
        "apiVersion": API_VERSION,
        "kind": "KVCacheOverride",
        "metadata": {
            "name": boost_name(snapshot.key, fingerprint),
            "namespace": snapshot.key.namespace,
            "ownerReferences": [owner],
            "labels": {"app.kubernetes.io/managed-by": "kvpilot"},
        },
        "spec": {
            "target": snapshot.key.name,
            "boost": {"minReplicas": minimum},
            "expiresAt": datetime.fromtimestamp(until, UTC).isoformat(timespec="seconds"),
            "by": "alertmanager",
            "reason": why[:1024],
        },
    }


Judged = tuple[JsonObject, Verdict]
"""An override and the verdict on it."""


def judged(items: Sequence[JsonObject], resources: Mapping[Key, JsonObject], now: float) -> list[Judged]:
    """The verdict on each override, those of one resource together and the oldest first.

    Args:
        items: all overrides.
        resources: all resources that an override may target.
    """
    found: list[Judged] = []
    for key in sorted({Key(item["metadata"]["namespace"], item["spec"]["target"]) for item in items}):
        own = {name_of(item): item for item in items if item["metadata"]["namespace"] == key.namespace}
        verdicts = overrides_of(own.values(), key.name, resources.get(key), now).verdicts
        found += [(own[verdict.name], verdict) for verdict in verdicts]
    return found


async def report(api: KubernetesApi, found: Iterable[Judged], now: float) -> None:
    """Write into the status of each override whether it is in force, and why not, where that has changed.

    One that changed since it was read, or is gone, is left for the next time.

    Raises:
        ApiError: the API server did not answer, or refused.
    """
    for before, verdict in found:
        after = with_verdict(before, verdict, now)
        if after.get("status") != before.get("status"):
            await _write_status(api, after)


async def _write_status(api: KubernetesApi, item: JsonObject) -> None:
    metadata = {name: value for name, value in item["metadata"].items() if name != "managedFields"}
    body = {"apiVersion": API_VERSION, "kind": "KVCacheOverride", **item, "metadata": metadata}
    path = path_of(API_VERSION, "KVCacheOverride", metadata["namespace"], metadata["name"], "status")
    try:
        await api.request("PUT", path, body, fieldManager=MANAGER)
    except ApiError as error:
        if error.status not in {404, 409}:
            raise


async def delete_over(api: KubernetesApi, found: Iterable[Judged]) -> list[Judged]:
    """Delete the overrides that are over, in the given order; returns those that were deleted.

    One that changed since it was read, or is gone, is left alone.

    Raises:
        ApiError: the API server did not answer, or refused.
    """
    swept = []
    for item, verdict in found:
        metadata = item["metadata"]
        if not verdict.over:
            continue
        unchanged = {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]}
        path = path_of(API_VERSION, "KVCacheOverride", metadata["namespace"], metadata["name"])
        try:
            await api.request("DELETE", path, {"preconditions": unchanged})
        except ApiError as error:
            if error.status not in {404, 409}:
                raise
            continue
        swept.append((item, verdict))
    return swept
