"""A resource and its replicas, read at one time: the first input of a reconcile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from kvpilot_operator.resource.model import KVCacheDeployment
from kvpilot_operator.status.codec import decode_status
from kvpilot_operator.status.model import Status
from kvpilot_operator.status.overrides import Overrides
from kvpilot_operator.tuning.observation import Promoted


class Key(NamedTuple):
    """Namespace and name of a resource."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class Replica:
    """One running or pending replica as the cluster knows it.

    ``admin_url`` is its admin API (``http://host:port``), "" without an address; ``admin_token`` opens it.
    ``start_s`` is the time from its creation until it served, s; 0 while unknown.
    """

    uid: str
    name: str
    ready: bool
    admin_url: str
    admin_token: str = field(repr=False)
    terminating: bool = False
    pending_reason: str = ""
    created_at: float = 0.0
    start_s: float = 0.0
    restarts: int = 0


@dataclass(frozen=True)
class AcceptedSpec:
    """The last spec that was valid and rolled out, and its ``metadata.generation``."""

    generation: int
    spec: Mapping[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """A resource and what belongs to it, read at one time.

    Attributes:
        manifest: the object as the API server holds it.
        desired_replicas: number of replicas that the child workload asks for; None before it exists.
        replicas_managed_by, autoscaler: see ``Observation``.
        overrides: what they ask for now.
        promoted: content of the owned ConfigMap; None before it exists.
        token_lost: the Secret with the engines' admin token is missing or was edited.
        replica_failure: why the workload cannot create the pods that it wants; "" while it can.
        accepted: the last spec that was rolled out; None before the first one.
        spec_error: why the present spec is not in force but ``accepted`` is; "" while the present one is.
    """

    key: Key
    manifest: Mapping[str, Any]
    desired_replicas: int | None
    replicas: tuple[Replica, ...]
    promoted: Promoted | None
    replicas_managed_by: str = ""
    autoscaler: str = ""
    rolling_out: bool = False
    overrides: Overrides = field(default_factory=Overrides)
    token_lost: bool = False
    replica_failure: str = ""
    accepted: AcceptedSpec | None = None
    spec_error: str = ""

    @cached_property
    def resource(self) -> KVCacheDeployment:
        """The parsed resource, with the spec in force.

        Raises:
            ManifestError: it is invalid.
        """
        manifest = dict(self.manifest)
        if self.spec_error and self.accepted is not None:
            metadata = {**manifest["metadata"], "generation": self.accepted.generation}
            manifest |= {"metadata": metadata, "spec": self.accepted.spec}
        return KVCacheDeployment.parse(manifest)

    @property
    def spec_generation(self) -> int:
        """``metadata.generation`` of the present spec, whether it is in force or not."""
        return int(self.manifest["metadata"].get("generation") or 0)

    @cached_property
    def status(self) -> Status:
        """The typed status; empty if it cannot be read."""
        return decode_status(self.manifest.get("status"))
