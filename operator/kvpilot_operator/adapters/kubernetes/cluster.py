"""The ``Cluster`` port on the Kubernetes API."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from http import HTTPStatus
from typing import Any, Literal

import structlog

from kvpilot_engine.contract.wording import counted
from kvpilot_operator import manifests
from kvpilot_operator.adapters.kubernetes import objects, overrides
from kvpilot_operator.adapters.kubernetes.api import (
    APPLY,
    JSON,
    JSON_PATCH,
    MERGE_PATCH,
    ApiError,
    JsonObject,
    KubernetesApi,
    path_of,
)
from kvpilot_operator.adapters.kubernetes.events import EVENTS_API, event_on
from kvpilot_operator.manifests import names
from kvpilot_operator.ports import Conflict
from kvpilot_operator.resource.errors import ManifestError
from kvpilot_operator.resource.model import API_VERSION, DeploymentSpec
from kvpilot_operator.status.codec import decode_status, encode_status
from kvpilot_operator.status.history import parse_records
from kvpilot_operator.status.model import Status
from kvpilot_operator.status.overrides import end_of, overrides_of
from kvpilot_operator.status.snapshot import Key, Snapshot
from kvpilot_operator.tuning.decision import Record
from kvpilot_operator.tuning.observation import Promoted

log = structlog.get_logger(__name__)

DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
"""Annotation by which a ReplicaSet chooses the pods that go first."""

RECORDS_BYTES = 900_000
"""Total of the kept records, under the 1 MiB of a ConfigMap."""


class KubernetesCluster:
    """Resources of the watched namespaces, and the objects that they own.

    Args:
        operator_key: key from which the engines' admin tokens are derived.
        namespaces: watched ones; none for all.
        instance: name of this process in the Events that it writes.
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
        """Name of the metrics source of the resource when it was last read."""
        return self._sources.get(key, "default")

    async def missing_kinds(self) -> list[str]:
        """Our kinds that the API server does not serve.

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
        return [_key_of(item) for item in items]

    async def statuses(self) -> dict[Key, Status]:
        """The status of every resource of the watched namespaces.

        Raises:
            ApiError: the API server did not answer.
        """
        items = await self._list_watched("KVCacheDeployment")
        return {_key_of(item): decode_status(item.get("status")) for item in items}

    async def read(self, key: Key) -> Snapshot | None:
        """The resource and what belongs to it; None if it is deleted or being deleted.

        Raises:
            ApiError: the API server did not answer.
        """
        namespace, name = key
        pods_of = ",".join(f"{label}={value}" for label, value in names.selector_labels(name).items())
        if self._namespaces and namespace not in self._namespaces:
            return None
        manifest, workload, pods, config, override_items = await asyncio.gather(
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
        # With spec.replicas another writer is no conflict: the number of the spec is written again.
        conflicting = objects.conflicting_manager(workload) if workload is not None and scaled else ""
        config = config if _owned_by(config, uid) else None
        token = objects.admin_token(self._key, uid)
        replicas = (objects.replica_of(pod, token) for pod in pods)
        return Snapshot(
            key=key,
            manifest=manifest,
            desired_replicas=None if workload is None else int(workload["spec"].get("replicas", 1)),
            replicas=tuple(sorted((pod for pod in replicas if pod is not None), key=lambda pod: pod.name)),
            promoted=manifests.promoted_of((config or {}).get("data")),
            accepted=manifests.accepted_of((config or {}).get("data")),
            replicas_managed_by=autoscaler or conflicting,
            autoscaler=autoscaler,
            rolling_out=workload is not None and objects.replacing_pods(workload),
            overrides=overrides_of(override_items, name, manifest, self._clock()),
            token_lost=token_lost,
            replica_failure="" if workload is None else objects.replica_failure(workload),
        )

    async def _token_lost(self, key: Key, uid: str) -> bool:
        """True if the Secret is missing or not ours. One that cannot be seen must not stop tuning."""
        try:
            secret = await self._api.metadata("Secret", key.namespace, names.admin_name(key.name))
        except ApiError as error:
            log.debug("secret_not_seen", resource=str(key), error=str(error))
            return False
        return not (_owned_by(secret, uid) and objects.holds_token(secret))

    async def _autoscaler(self, workload: Mapping[str, Any] | None, scaled: bool) -> str:
        """The autoscaler of the Deployment; "" without one.

        With spec.scaling only an autoscaler that owns the field counts. With spec.replicas each one counts,
        since our own write takes the field from it at once.
        """
        if workload is None or (scaled and objects.AUTOSCALER not in objects.replica_managers(workload)):
            return ""
        namespace, name = workload["metadata"]["namespace"], workload["metadata"]["name"]
        path = path_of("autoscaling/v2", "HorizontalPodAutoscaler", namespace)
        return objects.autoscaler_of(name, await self._api.list(path))

    async def roll_out(self, snapshot: Snapshot, config: Promoted) -> None:
        """Apply the owned objects. The configuration is written only if there is none.

        Raises:
            ManifestError: an object of that name has another owner, or the API server refuses the template.
        """
        resource = snapshot.resource
        token = objects.admin_token(self._key, resource.metadata.uid)
        owned = manifests.owned_objects(resource, token)
        maps = (manifests.config_map(resource, config), manifests.decisions_map(resource, ()))
        *_, workload = await self._read_own(snapshot, (*maps, *owned))
        if snapshot.promoted is None:
            await self.write_config(snapshot, config)
        first = None
        if workload is None:
            first = _first_replicas(snapshot, resource.spec)
        elif objects.MANAGER in objects.replica_managers(workload):
            # After an interrupted first apply the main manager owns the number; dropping it resets it to 1.
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
            # The number gets its own field manager now, so that the next apply can omit it.
            await self._write_scale(snapshot.key, first)
            await self._api.apply(owned[-1], objects.MANAGER)

    async def _read_own(
        self, snapshot: Snapshot, wanted: Iterable[Mapping[str, Any]]
    ) -> list[JsonObject | None]:
        """The wanted objects that exist, None for the others; of Secrets only the metadata.

        Raises:
            ManifestError: one has another owner; apply would make it ours, and delete it with the resource.
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
            # A policy that refuses an empty Secret may accept the real one, which is applied next.
            if error.denies_object:
                return None
            raise

    async def write_status(self, snapshot: Snapshot, status: Status) -> Snapshot:
        """Replace the status.

        Raises:
            Conflict: the resource changed since it was read, or was deleted.
        """
        metadata = {k: v for k, v in snapshot.manifest["metadata"].items() if k != "managedFields"}
        body = {**snapshot.manifest, "metadata": metadata, "status": encode_status(status)}
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
        content = manifests.config_map(snapshot.resource, config, snapshot.accepted)
        await self._api.apply(content, objects.MANAGER)

    async def scale(self, snapshot: Snapshot, replicas: int) -> None:
        """Set the number of replicas of the child workload."""
        await self._write_scale(snapshot.key, replicas)

    async def prefer_removal(self, snapshot: Snapshot, uids: Sequence[str]) -> None:
        """Lower the deletion cost of pods: their ReplicaSet removes those with the lowest cost first."""
        for replica in snapshot.replicas:
            if replica.uid in uids:
                patch = {"metadata": {"uid": replica.uid, "annotations": {DELETION_COST: "-100"}}}
                await self._on_pod("PATCH", snapshot.key, replica.name, patch, MERGE_PATCH)

    async def recycle(self, snapshot: Snapshot, uid: str) -> None:
        """Delete one pod; its ReplicaSet makes another."""
        for replica in snapshot.replicas:
            if replica.uid == uid:
                await self._on_pod(
                    "DELETE", snapshot.key, replica.name, {"preconditions": {"uid": uid}}, JSON
                )

    async def _on_pod(self, method: str, key: Key, name: str, body: JsonObject, kind: str) -> None:
        """Write to a pod; one that is gone, or has another UID by now, is left alone."""
        try:
            path = path_of("v1", "Pod", key.namespace, name)
            await self._api.request(method, path, body, content_type=kind)
        except ApiError as error:
            if error.status not in {404, 409, 422}:
                raise

    async def take_over_replicas(self, snapshot: Snapshot, replicas: int) -> None:
        """Become the only field manager of the replicas, without changing their number.

        Applying the same number makes kvpilot a second owner, and the other one is then removed. (The API
        server gives a number without any owner a new one.) Every write requires the resource version that was
        read last, so a number that is written meanwhile is not overwritten.

        Raises:
            Conflict: the number is no longer ``replicas``, or the workload changed meanwhile.
        """
        path = path_of("apps/v1", "Deployment", *snapshot.key)
        try:
            workload = await self._api.request("GET", path)
            if int(workload["spec"].get("replicas", 1)) != replicas:
                raise Conflict(f"{snapshot.key} no longer asks for {counted(replicas, 'replica')}")
            await self._write_scale(snapshot.key, replicas, workload["metadata"]["resourceVersion"])
            metadata = (await self._api.request("GET", path))["metadata"]
            fields = objects.without_conflicting_managers(metadata["managedFields"])
            patch = [
                {"op": "test", "path": "/metadata/resourceVersion", "value": metadata["resourceVersion"]},
                {"op": "replace", "path": "/metadata/managedFields", "value": fields},
            ]
            await self._api.request("PATCH", path, patch, content_type=JSON_PATCH)
        except ApiError as error:
            if error.status in {404, 409, 422}:
                raise Conflict(str(error)) from error
            raise

    async def record(self, snapshot: Snapshot, record: Record) -> None:
        """Keep a whole decision record; a record with the same id and outcome is replaced."""
        lines = (await self._kept_records(snapshot.key)).splitlines()
        new = json.dumps(asdict(record), sort_keys=True, separators=(",", ":"), default=str)
        kept = [line for line in lines if not _tells_of(line, record)] + [new]
        while len(kept) > 1 and sum(len(line.encode()) + 1 for line in kept) > RECORDS_BYTES:
            kept.pop(0)
        await self._api.apply(manifests.decisions_map(snapshot.resource, kept), objects.MANAGER)

    async def recorded(self, snapshot: Snapshot) -> Sequence[Mapping[str, Any]]:
        """The decision records in ``NAME-decisions``."""
        return parse_records(await self._kept_records(snapshot.key))

    async def _kept_records(self, key: Key) -> str:
        path = path_of("v1", "ConfigMap", key.namespace, names.decisions_name(key.name))
        held = await self._api.get(path) or {}
        return str((held.get("data") or {}).get(names.DECISIONS_KEY, ""))

    async def event(
        self, snapshot: Snapshot, kind: Literal["Normal", "Warning"], reason: str, message: str
    ) -> None:
        """Write an Event on the resource. A failure is logged and does not propagate."""
        regarding = {**snapshot.manifest, "apiVersion": API_VERSION, "kind": "KVCacheDeployment"}
        await self._event_on(regarding, kind, reason, message)

    async def _event_on(
        self, item: Mapping[str, Any], kind: Literal["Normal", "Warning"], reason: str, message: str
    ) -> None:
        namespace, name = item["metadata"]["namespace"], item["metadata"]["name"]
        body = event_on(item, kind, reason, message, at=self._clock(), instance=self._instance)
        try:
            await self._api.request("POST", path_of(EVENTS_API, "Event", namespace), body)
        except ApiError as error:
            log.warning("event_not_written", resource=f"{namespace}/{name}", reason=reason, error=str(error))

    def boost_name(self, key: Key, fingerprint: str) -> str:
        """Name of the override of one alert; the same alert always gives the same name."""
        return overrides.boost_name(key, fingerprint)

    async def boost(self, snapshot: Snapshot, fingerprint: str, minimum: int, until: float, why: str) -> str:
        """Create or refresh the override of one alert; returns its name."""
        item = overrides.boost_manifest(snapshot, fingerprint, minimum, until, why)
        await self._api.apply(item, objects.MANAGER)
        return str(item["metadata"]["name"])

    async def sweep(self) -> list[Key]:
        """Delete overrides that are over, report on the others; returns the keys that the former targeted."""
        now, items = self._clock(), await self._list_watched("KVCacheOverride")
        if not items:
            return []
        resources = {_key_of(item): item for item in await self._list_watched("KVCacheDeployment")}
        found = overrides.judged(items, resources, now)
        ended = await overrides.delete_over(self._api, found)
        for item, verdict in ended:
            kind, reason, message = end_of(item, verdict)
            regarding = {**item, "apiVersion": API_VERSION, "kind": "KVCacheOverride"}
            await self._event_on(regarding, kind, reason, message)
        await overrides.report(self._api, (one for one in found if not one[1].over), now)
        return [Key(item["metadata"]["namespace"], item["spec"]["target"]) for item, _ in ended]

    async def _list_watched(self, kind: str) -> list[JsonObject]:
        lists = await asyncio.gather(
            *(self._api.list(path_of(API_VERSION, kind, space)) for space in self._namespaces or ("",))
        )
        return [item for items in lists for item in items]

    async def _write_scale(self, key: Key, replicas: int, resource_version: str = "") -> None:
        """Apply the number of replicas; given a resource version, only if the workload still has it."""
        metadata = {"namespace": key.namespace, "name": key.name}
        scale = {
            "apiVersion": "autoscaling/v1",
            "kind": "Scale",
            "metadata": metadata | ({"resourceVersion": resource_version} if resource_version else {}),
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


def _key_of(item: JsonObject) -> Key:
    return Key(item["metadata"]["namespace"], item["metadata"]["name"])


def _source_ref(manifest: Mapping[str, Any]) -> str:
    metrics = (manifest.get("spec") or {}).get("metrics") or {}
    return str(metrics.get("sourceRef") or "default")


def _owned_by(item: Mapping[str, Any] | None, uid: str) -> bool:
    """True if the object is owned by the resource of this UID."""
    owners = ((item or {}).get("metadata") or {}).get("ownerReferences") or ()
    return any(owner.get("uid") == uid for owner in owners)


def _orphan(item: Mapping[str, Any], name: str) -> bool:
    """True if a resource of the same name that was deleted without its objects left this one."""
    metadata = item["metadata"]
    return (
        not metadata.get("ownerReferences") and (metadata.get("labels") or {}).get(names.NAME_LABEL) == name
    )


def _first_replicas(snapshot: Snapshot, spec: DeploymentSpec) -> int | None:
    """Replicas of a new workload: the number before the old one was deleted, else the minimum."""
    if spec.scaling is None:
        return spec.replicas
    return min(max(snapshot.status.replicas or 0, spec.scaling.minimum), spec.scaling.maximum)


def _tells_of(line: str, record: Record) -> bool:
    try:
        held = json.loads(line)
    except ValueError:
        return True
    return (held.get("id"), held.get("outcome"), held.get("at")) == (record.id, record.outcome, record.at)
