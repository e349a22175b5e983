"""The ``Cluster`` port on the Kubernetes API."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Literal

import structlog

from kvpilot_operator import manifests
from kvpilot_operator.adapters import kubernetes_objects as objects
from kvpilot_operator.adapters.kubernetes_api import (
    APPLY,
    JSON_PATCH,
    ApiError,
    JsonObject,
    KubernetesApi,
    path_of,
)
from kvpilot_operator.manifests import names
from kvpilot_operator.ports import Conflict, Key, Snapshot
from kvpilot_operator.spec.errors import ManifestError
from kvpilot_operator.spec.models import API_VERSION, DeploymentSpec, KVCacheDeployment
from kvpilot_operator.tuning.decision import Record
from kvpilot_operator.tuning.observation import Promoted

log = structlog.get_logger(__name__)

EVENTS_API = "events.k8s.io/v1"
REPORTER = "kvpilot.io/operator"
NOTE_BYTES = 1024
"""The API's limit of an Event's note."""

RECORDS_BYTES = 900_000
"""Total of the kept records, under the 1 MiB of a ConfigMap."""


class KubernetesCluster:
    """Resources of the watched namespaces, and the objects that they own.

    Args:
        operator_key: what the engines' admin tokens are derived from.
        namespaces: watched ones; none for all.
        instance: this process, in the Events it tells.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        api: KubernetesApi,
        operator_key: bytes,
        *,
        namespaces: Iterable[str] = (),
        instance: str = "operator",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._api = api
        self._key = operator_key
        self._namespaces = tuple(namespaces)
        self._instance = instance[:128]
        self._clock = clock
        self._sources: dict[Key, str] = {}

    def source_of(self, key: Key) -> str:
        """Name of the metrics source that the resource asked for when it was last read."""
        return self._sources.get(key, "default")

    async def missing_kinds(self) -> list[str]:
        """Our kinds that the API server does not serve (yet).

        Raises:
            ApiError: the API server did not answer.
        """
        try:
            served = await self._api.request("GET", f"/apis/{API_VERSION}")
        except ApiError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            served = {}
        found = {item["kind"] for item in served.get("resources", ())}
        return [kind for kind in ("KVCacheDeployment", "KVCacheOverride") if kind not in found]

    async def keys(self) -> list[Key]:
        """All resources of the watched namespaces."""
        items = await self._list_watched("KVCacheDeployment")
        return [Key(item["metadata"]["namespace"], item["metadata"]["name"]) for item in items]

    async def read(self, key: Key) -> Snapshot | None:
        """The resource and what belongs to it; None when it is gone or going.

        Raises:
            ApiError: the API server did not answer.
        """
        namespace, name = key
        pods_of = ",".join(f"{label}={value}" for label, value in names.selector_labels(name).items())
        if self._namespaces and namespace not in self._namespaces:
            return None
        manifest, workload, pods, config, overrides = await asyncio.gather(
            self._api.get(path_of(API_VERSION, "KVCacheDeployment", namespace, name)),
            self._api.get(path_of("apps/v1", "Deployment", namespace, name)),
            self._api.list(path_of("v1", "Pod", namespace), labelSelector=pods_of),
            self._api.get(path_of("v1", "ConfigMap", namespace, names.config_name(name))),
            self._api.list(path_of(API_VERSION, "KVCacheOverride", namespace)),
        )
        if manifest is None or "deletionTimestamp" in manifest["metadata"]:
            self._sources.pop(key, None)
            return None
        uid = manifest["metadata"]["uid"]
        self._sources[key] = _source_ref(manifest)
        workload = workload if _owned_by(workload, uid) else None
        scaled = "replicas" not in manifest["spec"]
        token_lost, autoscaler = await asyncio.gather(
            self._token_lost(key, uid), self._autoscaler(workload, scaled)
        )
        # Where the resource sets the number, who else writes it is simply put right.
        rival = objects.rival_manager(workload) if workload is not None and scaled else ""
        config = config if _owned_by(config, uid) else None
        token = objects.admin_token(self._key, uid)
        asked = objects.in_force(overrides, name, self._clock())
        replicas = (objects.replica_of(pod, token) for pod in pods)
        return Snapshot(
            key=key,
            manifest=manifest,
            replicas=None if workload is None else int(workload["spec"].get("replicas", 1)),
            pods=tuple(sorted((pod for pod in replicas if pod is not None), key=lambda pod: pod.name)),
            promoted=manifests.promoted_of((config or {}).get("data")),
            replicas_managed_by=autoscaler or rival,
            autoscaler=autoscaler,
            rolling_out=workload is not None and objects.replacing_pods(workload),
            paused_by=asked.paused_by,
            boosts=asked.boosts,
            overrides=asked.names,
            token_lost=token_lost,
            refused_pods="" if workload is None else objects.refused_pods(workload),
        )

    async def _token_lost(self, key: Key, uid: str) -> bool:
        """False where that cannot be told: it must not hold up tuning."""
        try:
            secret = await self._api.metadata("Secret", key.namespace, names.admin_name(key.name))
        except ApiError as error:
            log.debug("secret_not_seen", resource=str(key), error=str(error))
            return False
        return not (_owned_by(secret, uid) and objects.holds_token(secret))

    async def _autoscaler(self, workload: Mapping[str, Any] | None, scaled: bool) -> str:
        """The autoscaler of the Deployment. One that has not written lately is of no interest, but where the
        resource's own number takes the field from it at once."""
        if workload is None or (scaled and objects.AUTOSCALER not in objects.replica_managers(workload)):
            return ""
        namespace, name = workload["metadata"]["namespace"], workload["metadata"]["name"]
        path = path_of("autoscaling/v2", "HorizontalPodAutoscaler", namespace)
        return objects.autoscaler_of(name, await self._api.list(path))

    async def roll_out(self, snapshot: Snapshot, config: Promoted) -> None:
        """Apply the owned objects. The configuration is written only where there is none yet.

        Raises:
            ManifestError: an object of that name is somebody else's, or the API server refuses the template.
        """
        resource = KVCacheDeployment.parse(snapshot.manifest)
        token = objects.admin_token(self._key, snapshot.manifest["metadata"]["uid"])
        owned = manifests.owned_objects(resource, token)
        maps = (manifests.config_map(resource, config), manifests.decisions_map(resource, ()))
        *_, workload = await self._read_own(snapshot, (*maps, *owned))
        if snapshot.promoted is None:
            await self.write_config(snapshot, config)
        first = None
        if workload is None:
            first = _first_replicas(snapshot, resource.spec)
        elif objects.MANAGER in objects.replica_managers(workload):
            # Left by a first apply that was cut short: what the main manager drops would go back to one.
            await self._write_scale(snapshot.key, int(workload["spec"].get("replicas", 1)))
        for item in owned if first is None else manifests.owned_objects(resource, token, first):
            try:
                await self._api.apply(item, objects.MANAGER)
            except ApiError as error:
                if item["kind"] == "Deployment" and error.refuses_object:
                    raise ManifestError([f"spec.template: {error}"]) from error
                if error.denies_object:
                    name = item["metadata"]["name"]
                    raise ManifestError([f"{item['kind']} {name} is refused: {error}"]) from error
                raise
        if first is not None:
            # The number gets its own manager now, so that the next apply may leave it out.
            await self._write_scale(snapshot.key, first)
            await self._api.apply(owned[-1], objects.MANAGER)

    async def _read_own(
        self, snapshot: Snapshot, wanted: Iterable[Mapping[str, Any]]
    ) -> list[JsonObject | None]:
        """What there is of the wanted objects, None for the others. Nobody reads Secrets: only metadata.

        Raises:
            ManifestError: one is somebody else's. Apply would make it ours, to go with the resource.
        """
        uid, namespace = snapshot.manifest["metadata"]["uid"], snapshot.key.namespace
        asked = [(item["apiVersion"], item["kind"], item["metadata"]["name"]) for item in wanted]
        found = await asyncio.gather(
            *(
                self._seen_secret(namespace, name)
                if kind == "Secret"
                else self._api.get(path_of(version, kind, namespace, name))
                for version, kind, name in asked
            )
        )
        for (_, kind, name), held in zip(asked, found, strict=True):
            if held is not None and not _owned_by(held, uid) and not _orphan(held, snapshot.key.name):
                raise ManifestError(
                    [
                        f"metadata.name: {kind} {name} exists and is not this resource's; choose another "
                        "name, or delete it"
                    ]
                )
        return found

    async def _seen_secret(self, namespace: str, name: str) -> JsonObject | None:
        try:
            return await self._api.metadata("Secret", namespace, name)
        except ApiError as error:
            # A policy that refuses an empty one may well take the real one, which is tried next.
            if error.denies_object:
                return None
            raise

    async def write_status(self, snapshot: Snapshot, status: Mapping[str, Any]) -> Snapshot:
        """Replace the status.

        Raises:
            Conflict: the resource changed since it was read, or is gone.
        """
        metadata = {k: v for k, v in snapshot.manifest["metadata"].items() if k != "managedFields"}
        body = {**snapshot.manifest, "metadata": metadata, "status": dict(status)}
        path = path_of(API_VERSION, "KVCacheDeployment", *snapshot.key, "status")
        try:
            written = await self._api.request("PUT", path, body, fieldManager=objects.MANAGER)
        except ApiError as error:
            if error.status in {404, 409}:
                raise Conflict(str(error)) from error
            raise
        return replace(snapshot, manifest=written)

    async def write_config(self, snapshot: Snapshot, config: Promoted) -> None:
        """Replace the content of the owned ConfigMap."""
        resource = KVCacheDeployment.parse(snapshot.manifest)
        await self._api.apply(manifests.config_map(resource, config), objects.MANAGER)

    async def scale(self, snapshot: Snapshot, replicas: int) -> None:
        """Ask the child workload for that many replicas."""
        await self._write_scale(snapshot.key, replicas)

    async def own_replicas(self, snapshot: Snapshot) -> None:
        """Take the number of replicas over as it is: the API server forgets who else wrote it.

        Writing the same number makes us a second owner beside the other one, who is then removed. (A number
        without any owner would be given one by the API server, which is not us.)

        Raises:
            Conflict: the workload changed meanwhile.
        """
        if snapshot.replicas is None:
            return
        await self._write_scale(snapshot.key, snapshot.replicas)
        path = path_of("apps/v1", "Deployment", *snapshot.key)
        workload = await self._api.get(path)
        if workload is None:
            return
        metadata = workload["metadata"]
        patch = [
            {"op": "test", "path": "/metadata/resourceVersion", "value": metadata["resourceVersion"]},
            {
                "op": "replace",
                "path": "/metadata/managedFields",
                "value": objects.without_rivals(metadata["managedFields"]),
            },
        ]
        try:
            await self._api.request("PATCH", path, patch, content_type=JSON_PATCH)
        except ApiError as error:
            if error.status in {404, 409, 422}:
                raise Conflict(str(error)) from error
            raise

    async def record(self, snapshot: Snapshot, record: Record) -> None:
        """Keep a whole decision record; the same decision told again replaces what was told of it."""
        name = names.decisions_name(snapshot.key.name)
        held = await self._api.get(path_of("v1", "ConfigMap", snapshot.key.namespace, name)) or {}
        lines = str((held.get("data") or {}).get(names.DECISIONS_KEY, "")).splitlines()
        new = json.dumps(asdict(record), sort_keys=True, separators=(",", ":"), default=str)
        kept = [line for line in lines if not _tells_of(line, record)] + [new]
        while len(kept) > 1 and sum(len(line.encode()) + 1 for line in kept) > RECORDS_BYTES:
            kept.pop(0)
        resource = KVCacheDeployment.parse(snapshot.manifest)
        await self._api.apply(manifests.decisions_map(resource, kept), objects.MANAGER)

    async def event(
        self, snapshot: Snapshot, kind: Literal["Normal", "Warning"], reason: str, message: str
    ) -> None:
        """Tell people about a transition. An Event that cannot be written is logged, and nothing fails."""
        metadata = snapshot.manifest["metadata"]
        now = datetime.fromtimestamp(self._clock(), UTC)
        body = {
            "apiVersion": EVENTS_API,
            "kind": "Event",
            "metadata": {"generateName": f"{snapshot.key.name}-", "namespace": snapshot.key.namespace},
            "eventTime": now.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "action": "Tune",
            "type": kind,
            "reason": reason,
            "note": message.encode()[:NOTE_BYTES].decode(errors="ignore"),
            "reportingController": REPORTER,
            "reportingInstance": self._instance,
            "regarding": {
                "apiVersion": API_VERSION,
                "kind": "KVCacheDeployment",
                "namespace": snapshot.key.namespace,
                "name": snapshot.key.name,
                "uid": metadata["uid"],
                "resourceVersion": metadata.get("resourceVersion", ""),
            },
        }
        try:
            await self._api.request("POST", path_of(EVENTS_API, "Event", snapshot.key.namespace), body)
        except ApiError as error:
            log.warning("event_not_written", resource=str(snapshot.key), reason=reason, error=str(error))

    def boost_name(self, key: Key, fingerprint: str) -> str:
        """Name of the override of one alert; the same alert always has the same."""
        return f"{key.name[:40]}-alert-{hashlib.sha256(fingerprint.encode()).hexdigest()[:10]}"

    async def boost(self, snapshot: Snapshot, fingerprint: str, minimum: int, until: float, why: str) -> str:
        """Create or refresh the override of one alert; its name."""
        name = self.boost_name(snapshot.key, fingerprint)
        metadata = snapshot.manifest["metadata"]
        owner = {
            "apiVersion": API_VERSION, "kind": "KVCacheDeployment", "name": metadata["name"],
            "uid": metadata["uid"],
        }  # fmt: skip
        await self._api.apply(
            {
                "apiVersion": API_VERSION,
                "kind": "KVCacheOverride",
                "metadata": {
                    "name": name,
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
            },
            objects.MANAGER,
        )
        return name

    async def sweep(self) -> list[Key]:
        """Delete the overrides that have expired; the resources that they were of."""
        swept = []
        now = self._clock()
        for item in await self._list_watched("KVCacheOverride"):
            metadata, spec = item["metadata"], item["spec"]
            if objects.seconds_of(spec["expiresAt"]) > now:
                continue
            unchanged = {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]}
            path = path_of(API_VERSION, "KVCacheOverride", metadata["namespace"], metadata["name"])
            try:
                await self._api.request("DELETE", path, {"preconditions": unchanged})
            except ApiError as error:
                if error.status not in {404, 409}:
                    raise
                continue
            swept.append(Key(metadata["namespace"], spec["target"]))
        return swept

    async def _list_watched(self, kind: str) -> list[JsonObject]:
        lists = await asyncio.gather(
            *(self._api.list(path_of(API_VERSION, kind, space)) for space in self._namespaces or ("",))
        )
        return [item for items in lists for item in items]

    async def _write_scale(self, key: Key, replicas: int) -> None:
        scale = {
            "apiVersion": "autoscaling/v1",
            "kind": "Scale",
            "metadata": {"namespace": key.namespace, "name": key.name},
            "spec": {"replicas": replicas},
        }
        await self._api.request(
            "PATCH",
            path_of("apps/v1", "Deployment", *key, "scale"),
            scale,
            content_type=APPLY,
            fieldManager=objects.SCALE_MANAGER,
            force="true",
        )


def _source_ref(manifest: Mapping[str, Any]) -> str:
    metrics = (manifest.get("spec") or {}).get("metrics") or {}
    return str(metrics.get("sourceRef") or "default")


def _owned_by(item: Mapping[str, Any] | None, uid: str) -> bool:
    """An object of the same name that somebody else made is not ours to read."""
    owners = ((item or {}).get("metadata") or {}).get("ownerReferences") or ()
    return any(owner.get("uid") == uid for owner in owners)


def _orphan(item: Mapping[str, Any], name: str) -> bool:
    """Left by a resource of the same name that was deleted without what it owned."""
    metadata = item["metadata"]
    return (
        not metadata.get("ownerReferences") and (metadata.get("labels") or {}).get(names.NAME_LABEL) == name
    )


def _first_replicas(snapshot: Snapshot, spec: DeploymentSpec) -> int | None:
    """Of a workload that is made: the number before it was lost, else the least that is asked for."""
    if spec.scaling is None:
        return spec.replicas
    before = int((snapshot.manifest.get("status") or {}).get("replicas") or 0)
    return min(max(before, spec.scaling.minimum), spec.scaling.maximum)


def _tells_of(line: str, record: Record) -> bool:
    try:
        held = json.loads(line)
    except ValueError:
        return True
    return (held.get("id"), held.get("outcome"), held.get("at")) == (record.id, record.outcome, record.at)
