"""The ``Cluster`` port on one machine: the resource is a file, its replicas are child processes."""

from __future__ import annotations

import copy
import hashlib
import json
import secrets
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from kvpilot_engine.contract.config import COLD_FIELDS
from kvpilot_operator.adapters.metrics.scrape import Target
from kvpilot_operator.local.process import Launch
from kvpilot_operator.local.replicas import ReplicaSet
from kvpilot_operator.local.state import StateDirectory, config_text
from kvpilot_operator.manifests.workload import cold_hash
from kvpilot_operator.ports import Conflict
from kvpilot_operator.resource.errors import ManifestError
from kvpilot_operator.resource.model import DeploymentSpec, KVCacheDeployment
from kvpilot_operator.resource.quantity import parse_bytes
from kvpilot_operator.resource.resolve import base_config, policy_of
from kvpilot_operator.router.proxy import Backend
from kvpilot_operator.status.codec import encode_status
from kvpilot_operator.status.model import Status
from kvpilot_operator.status.overrides import (
    NO_SUCH_TARGET,
    Overrides,
    Verdict,
    end_of,
    expiry_of,
    kind_of,
    name_of,
    overrides_of,
)
from kvpilot_operator.status.snapshot import AcceptedSpec, Key, Snapshot
from kvpilot_operator.tuning.decision import Record
from kvpilot_operator.tuning.observation import Promoted

EventListener = Callable[[Literal["Normal", "Warning"], str, str], None]


def memory_limit(spec: DeploymentSpec) -> int | None:
    """Memory limit of the template's engine container, bytes; None if there is none.

    Raises:
        ManifestError: the limit is no quantity, or less than one byte.
    """
    for container in spec.template.spec.get("containers", ()):
        limit = container.get("resources", {}).get("limits", {}).get("memory")
        if container.get("name") == "engine" and limit is not None:
            try:
                return parse_bytes(str(limit))
            except ValueError as error:
                field = "spec.template.spec.containers.engine.resources.limits.memory"
                raise ManifestError([f"{field}: {error}, got {str(limit)!r}"]) from None
    return None


class LocalCluster:
    """One resource and its replicas.

    Args:
        manifest: the valid object of the user.
        on_event: called with the type, reason and message of each Event.
        on_backends: called with the ready replicas when they change.
        on_refused: called with the exit status and last line of an engine that cannot start.
        notify: called with one line for the display.
        clock: seconds since the epoch.

    Raises:
        ManifestError: the manifest or its memory limit is invalid.
    """

    def __init__(
        self,
        manifest: Mapping[str, Any],
        state: StateDirectory,
        *,
        on_event: EventListener,
        on_backends: Callable[[list[Backend]], None],
        on_refused: Callable[[int, str], None],
        notify: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        resource = KVCacheDeployment.parse(manifest)
        memory_limit(resource.spec)
        self.key = Key(resource.metadata.namespace, resource.metadata.name)
        self._state = state
        self._clock = clock
        self._on_event = on_event
        self._token = secrets.token_hex(32)
        self._desired: int | None = None
        self._promoted = state.read_config()
        self._manifest = self._resumed(manifest)
        self._spec = resource.spec
        self._notify = notify
        self._pages: dict[str, str] | None = None
        self._on_backends = on_backends
        self.replica_set = ReplicaSet(self._launch, self._token, self._replicas_changed, on_refused, notify)

    @property
    def spec(self) -> DeploymentSpec:
        """The spec of the last accepted manifest."""
        return self._spec

    @property
    def targets(self) -> dict[Key, list[Target]]:
        """URLs of the metrics pages by resource."""
        return {self.key: self.replica_set.targets}

    def edit(self, manifest: Mapping[str, Any]) -> bool:
        """Apply an edit of the user; True if the spec changed.

        Raises:
            ManifestError: it is invalid or changes an immutable field; the previous spec stays in force.
        """
        resource = KVCacheDeployment.parse(manifest)
        memory_limit(resource.spec)
        policy_of(resource.spec)
        if Key(resource.metadata.namespace, resource.metadata.name) != self.key:
            raise ManifestError(
                [f"metadata: {self.key} is up; another name or namespace needs its own kvpilot up"]
            )
        if resource.spec.engine.model != self._spec.engine.model:
            raise ManifestError(
                [f"spec.engine.model: is immutable, got {resource.spec.engine.model.source!r}"]
            )
        if manifest["spec"] == self._manifest["spec"]:
            return False
        metadata = {**self._manifest["metadata"], "generation": self._manifest["metadata"]["generation"] + 1}
        self._manifest = {**self._manifest, "spec": copy.deepcopy(manifest["spec"]), "metadata": metadata}
        self._spec = resource.spec
        self._store()
        return True

    async def keys(self) -> list[Key]:
        """The key of the only resource."""
        return [self.key]

    async def read(self, key: Key) -> Snapshot | None:
        """The resource and its replicas as they are now; None for another key."""
        if key != self.key:
            return None
        return Snapshot(
            key=key,
            manifest=self._manifest,
            desired_replicas=self._desired,
            replicas=self.replica_set.replicas,
            promoted=self._promoted,
            accepted=AcceptedSpec(self._manifest["metadata"]["generation"], self._manifest["spec"]),
            rolling_out=self.replica_set.rolling_out,
            overrides=self._overrides(),
        )

    def _overrides(self) -> Overrides:
        """What the overrides in the state directory ask for now. One that is over is deleted and reported."""
        folder, now = self._state.overrides, self._clock()
        items, faults = folder.read()
        asked = overrides_of(items, self.key.name, self._manifest, now)
        known = {name_of(item): item for item in items}
        for verdict in asked.verdicts:
            if verdict.over:
                folder.delete(verdict.name)
                self._notify(end_of(known[verdict.name], verdict)[2])
        others = [
            Verdict(
                name_of(item),
                kind_of(item),
                False,
                NO_SUCH_TARGET,
                f"its target is {target}",
                expiry_of(item),
            )
            for item in items
            if (target := item["spec"]["target"]) != self.key.name
        ]
        return replace(asked, verdicts=(*asked.verdicts, *others, *faults))

    def _replicas_changed(self) -> None:
        pages = self.replica_set.pages
        if pages != self._pages:
            self._pages = pages
            self._state.write_replicas(pages)
        self._on_backends(self.replica_set.backends)

    async def roll_out(self, snapshot: Snapshot, config: Promoted) -> None:
        """Start the replicas of the spec, or replace those whose cold fields changed."""
        if self._promoted is None:
            await self.write_config(snapshot, config)
        if self._desired is None:
            scaling = self._spec.scaling
            self._desired = scaling.minimum if scaling is not None else self._spec.replicas
        self._converge()

    async def write_status(self, snapshot: Snapshot, status: Status) -> Snapshot:
        """Replace the status, if the resource is still the one of the snapshot.

        Raises:
            Conflict: the resource was edited since the snapshot.
        """
        if snapshot.manifest is not self._manifest:
            raise Conflict(f"{self.key} was edited")
        self._manifest = {**self._manifest, "status": encode_status(status)}
        self._store()
        return replace(snapshot, manifest=self._manifest)

    async def write_config(self, snapshot: Snapshot, config: Promoted) -> None:
        """Store the promoted configuration; engines that start later start with it."""
        self._promoted = config
        self._state.write_config(config)

    async def scale(self, snapshot: Snapshot, replicas: int) -> None:
        """Run that many replicas."""
        self._desired = replicas
        self._converge()

    async def prefer_removal(self, snapshot: Snapshot, uids: Sequence[str]) -> None:
        """Let these replicas go first."""
        self.replica_set.prefer_removal(uids)

    async def recycle(self, snapshot: Snapshot, uid: str) -> None:
        """Replace one replica by a new one."""
        self.replica_set.recycle(uid)

    async def take_over_replicas(self, snapshot: Snapshot, replicas: int) -> None:
        """A local deployment has no other field manager."""

    async def record(self, snapshot: Snapshot, record: Record) -> None:
        """Append a decision record to the state directory."""
        self._state.add_record(record)

    async def recorded(self, snapshot: Snapshot) -> Sequence[Mapping[str, Any]]:
        """The decision records in the state directory."""
        return self._state.records()

    async def event(
        self, snapshot: Snapshot, kind: Literal["Normal", "Warning"], reason: str, message: str
    ) -> None:
        """Pass an Event to the listener."""
        self._on_event(kind, reason, message)

    def _resumed(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """The object with the identity and status of an earlier run, if there was one."""
        earlier = self._state.read_resource() or {}
        identity = earlier.get("metadata") or {}
        same_spec = earlier.get("spec") == manifest["spec"]
        generation = int(identity.get("generation", 0)) + (not same_spec)
        metadata = {
            **manifest["metadata"],
            "namespace": self.key.namespace,
            "uid": identity.get("uid") or str(uuid.uuid4()),
            "generation": max(generation, 1),
        }
        resumed = {**copy.deepcopy(dict(manifest)), "metadata": metadata}
        if earlier.get("status"):
            resumed["status"] = earlier["status"]
        self._state.write_resource(resumed)
        return resumed

    def _store(self) -> None:
        self._state.write_resource(self._manifest)

    def _converge(self) -> None:
        self.replica_set.converge_to(
            self._desired or 0, self._template(), float(self._spec.rollout.drain_seconds)
        )

    def _template(self) -> str:
        """Digest of all settings that only a new process can take."""
        model = self._spec.engine.model
        parts = [model.source, model.revision, memory_limit(self._spec), cold_hash(base_config(self._spec))]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _launch(self, replica: str) -> Launch:
        """How to start an engine: the promoted configuration with the cold fields of the current spec."""
        assert self._promoted is not None
        base = base_config(self._spec)
        cold = base.model_dump(include=set(COLD_FIELDS), by_alias=True, mode="json", exclude_unset=True)
        start = self._state.write_start(
            replica, config_text(self._promoted.generation, {**self._promoted.config, **cold})
        )
        model = self._spec.engine.model
        limit = memory_limit(self._spec)
        return Launch(
            arguments=[
                *("--model", model.source),
                *(("--revision", model.revision) if model.revision else ()),
                *("--config", str(start)),
                *("--drain-seconds", str(max(1, self._spec.rollout.drain_seconds))),
                *("--drain-lag-seconds", "0.3"),
            ],
            environment={
                "KVPILOT_ADMIN_TOKEN": self._token,
                **({"KVPILOT_MEMORY_LIMIT_BYTES": str(limit)} if limit is not None else {}),
            },
            log=self._state.path / f"{replica}.log",
        )
