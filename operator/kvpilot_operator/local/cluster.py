"""The ``Cluster`` port on one machine: the resource is a file, its pods are child processes."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import secrets
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from kvpilot_engine.contract.config import COLD_FIELDS
from kvpilot_operator.adapters.scrape_metrics import Target
from kvpilot_operator.local.process import Launch
from kvpilot_operator.local.replicas import ReplicaSet
from kvpilot_operator.local.router import Backend
from kvpilot_operator.local.state import StateDirectory, config_text
from kvpilot_operator.manifests.workload import cold_hash
from kvpilot_operator.ports import Conflict, Key, Snapshot
from kvpilot_operator.spec.errors import ManifestError
from kvpilot_operator.spec.models import DeploymentSpec, KVCacheDeployment
from kvpilot_operator.spec.resolve import base_config, policy_of
from kvpilot_operator.tuning.decision import Record
from kvpilot_operator.tuning.observation import Promoted

EventListener = Callable[[Literal["Normal", "Warning"], str, str], None]

_UNITS = {"": 1, "m": 1e-3} | {
    prefix + suffix: base**power
    for suffix, base in (("", 1000), ("i", 1024))
    for power, prefix in enumerate(("K" if suffix else "k", "M", "G", "T", "P", "E"), 1)
}


def quantity(text: str, field: str) -> int:
    """Bytes of a Kubernetes quantity such as ``64Gi``.

    Raises:
        ManifestError: it is none, or not above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-zA-Z]*)", text)
    if match is None or match[2] not in _UNITS or float(match[1]) == 0:
        raise ManifestError([f"{field}: must be a quantity of bytes like 2Gi, got {text!r}"])
    return int(float(match[1]) * _UNITS[match[2]])


def memory_limit(spec: DeploymentSpec) -> int | None:
    """The engine container's memory limit in the template, bytes; None where it gives none."""
    for container in spec.template.spec.get("containers", ()):
        limit = container.get("resources", {}).get("limits", {}).get("memory")
        if container.get("name") == "engine" and limit is not None:
            return quantity(str(limit), "spec.template.spec.containers.engine.resources.limits.memory")
    return None


class LocalCluster:
    """One resource and its engines.

    Args:
        manifest: the object as the user wrote it, valid.
        on_event: told of every Event.
        on_backends: told of the replicas that may get requests, whenever they change.
        on_refused: told the exit status and last words of an engine that cannot start.
        tell: one line for people.
    """

    def __init__(
        self,
        manifest: Mapping[str, Any],
        state: StateDirectory,
        *,
        on_event: EventListener,
        on_backends: Callable[[list[Backend]], None],
        on_refused: Callable[[int, str], None],
        tell: Callable[[str], None],
    ) -> None:
        resource = KVCacheDeployment.parse(manifest)
        memory_limit(resource.spec)
        self.key = Key(resource.metadata.namespace, resource.metadata.name)
        self._state = state
        self._on_event = on_event
        self._token = secrets.token_hex(32)
        self._desired: int | None = None
        self._promoted = state.read_config()
        self._manifest = self._resumed(manifest)
        self._spec = resource.spec
        self.replica_set = ReplicaSet(
            self._launch, self._token, lambda: on_backends(self.replica_set.backends), on_refused, tell
        )

    @property
    def spec(self) -> DeploymentSpec:
        """What is asked for now."""
        return self._spec

    @property
    def targets(self) -> dict[Key, list[Target]]:
        """Metrics pages, for the scraper."""
        return {self.key: self.replica_set.targets}

    def edit(self, manifest: Mapping[str, Any]) -> bool:
        """The user changed the object; True when its spec differs.

        Raises:
            ManifestError: it cannot be used, or changes what cannot change; the old one stays.
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
        self._written()
        return True

    async def keys(self) -> list[Key]:
        """The one resource."""
        return [self.key]

    async def read(self, key: Key) -> Snapshot | None:
        """The resource now."""
        if key != self.key:
            return None
        return Snapshot(
            key=key,
            manifest=self._manifest,
            replicas=self._desired,
            pods=self.replica_set.replicas,
            promoted=self._promoted,
            rolling_out=self.replica_set.rolling_out,
        )

    async def roll_out(self, snapshot: Snapshot, config: Promoted) -> None:
        """Start what the spec asks for, or replace engines whose cold settings changed."""
        if self._promoted is None:
            await self.write_config(snapshot, config)
        if self._desired is None:
            scaling = self._spec.scaling
            self._desired = scaling.minimum if scaling is not None else self._spec.replicas
        self._ask()

    async def write_status(self, snapshot: Snapshot, status: Mapping[str, Any]) -> Snapshot:
        """Replace the status, given that the resource is still the one that was read.

        Raises:
            Conflict: it was edited meanwhile.
        """
        if snapshot.manifest is not self._manifest:
            raise Conflict(f"{self.key} was edited")
        self._manifest = {**self._manifest, "status": dict(status)}
        self._written()
        return replace(snapshot, manifest=self._manifest)

    async def write_config(self, snapshot: Snapshot, config: Promoted) -> None:
        """Keep a configuration as the last known good one; engines that start later start with it."""
        self._promoted = config
        self._state.write_config(config)

    async def scale(self, snapshot: Snapshot, replicas: int) -> None:
        """Run that many engines."""
        self._desired = replicas
        self._ask()

    async def own_replicas(self, snapshot: Snapshot) -> None:
        """Nobody else can write it."""

    async def record(self, snapshot: Snapshot, record: Record) -> None:
        """Keep a whole decision record."""
        self._state.add_record(record)

    async def event(
        self, snapshot: Snapshot, kind: Literal["Normal", "Warning"], reason: str, message: str
    ) -> None:
        """Tell people about a transition."""
        self._on_event(kind, reason, message)

    def _resumed(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """The object with the identity and status of an earlier run, where there was one."""
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

    def _written(self) -> None:
        self._state.write_resource(self._manifest)

    def _ask(self) -> None:
        self.replica_set.ask(self._desired or 0, self._template(), float(self._spec.rollout.drain_seconds))

    def _template(self) -> str:
        """Digest of everything that only a new process takes."""
        model = self._spec.engine.model
        parts = [model.source, model.revision, memory_limit(self._spec), cold_hash(base_config(self._spec))]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _launch(self, pod: str) -> Launch:
        """An engine of the promoted configuration, with the cold fields of the present spec."""
        assert self._promoted is not None
        base = base_config(self._spec)
        cold = base.model_dump(include=set(COLD_FIELDS), by_alias=True, mode="json", exclude_unset=True)
        start = self._state.write_start(
            pod, config_text(self._promoted.generation, {**self._promoted.config, **cold})
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
            log=self._state.path / f"{pod}.log",
        )
