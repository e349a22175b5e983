"""The three things the loop needs from outside. Adapters implement them; nothing is decided there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from kvpilot_engine.contract import AdminConfig, ApplyReport, ConfigPatch
from kvpilot_operator.tuning.decision import Record
from kvpilot_operator.tuning.observation import Boost, Promoted, Sample


class Key(NamedTuple):
    """Namespace and name of a resource."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class Replica:
    """One running or pending engine as the cluster knows it.

    ``admin_url`` is its admin API (``http://host:port``), "" without an address; ``admin_token`` opens it.
    """

    uid: str
    name: str
    ready: bool
    admin_url: str
    admin_token: str = field(repr=False)
    terminating: bool = False
    pending_reason: str = ""
    created_at: float = 0.0
    restarts: int = 0


@dataclass(frozen=True)
class Snapshot:
    """A resource and what belongs to it, read at one time.

    Attributes:
        manifest: the whole object: apiVersion, kind, metadata, spec, status.
        replicas: desired number of the child workload; None before it exists.
        replicas_managed_by: see ``Observation``. autoscaler: the same, of one that keeps at it.
        promoted: content of the owned ConfigMap; None before it exists.
        token_lost: the Secret with the engines' admin token is gone, or somebody else wrote it.
        refused_pods: why the workload cannot make the pods that it wants; "" while it can.
    """

    key: Key
    manifest: Mapping[str, Any]
    replicas: int | None
    pods: tuple[Replica, ...]
    promoted: Promoted | None
    replicas_managed_by: str = ""
    autoscaler: str = ""
    rolling_out: bool = False
    paused_by: str = ""
    boosts: tuple[Boost, ...] = ()
    overrides: tuple[str, ...] = ()
    token_lost: bool = False
    refused_pods: str = ""


class Conflict(Exception):  # noqa: N818 - the API server's own word for it
    """The resource changed since it was read; look again."""


class Cluster(Protocol):
    """Where resources live and engines run."""

    async def keys(self) -> list[Key]:
        """All resources there are."""

    async def read(self, key: Key) -> Snapshot | None:
        """The resource now, or None when it is gone."""

    async def roll_out(self, snapshot: Snapshot, config: Promoted) -> None:
        """Make the owned objects what the spec asks for; ``config`` is written only where there is none yet.

        Never sets replicas of a workload that exists.
        """

    async def write_status(self, snapshot: Snapshot, status: Mapping[str, Any]) -> Snapshot:
        """Replace the status, given that the resource is still the one that was read.

        Raises:
            Conflict: it is not.
        """

    async def write_config(self, snapshot: Snapshot, config: Promoted) -> None:
        """Replace the content of the owned ConfigMap."""

    async def scale(self, snapshot: Snapshot, replicas: int) -> None:
        """Ask the child workload for that many replicas."""

    async def own_replicas(self, snapshot: Snapshot) -> None:
        """Take the number of replicas over from who else wrote it, as it is."""

    async def record(self, snapshot: Snapshot, record: Record) -> None:
        """Keep a whole decision record (the last 50)."""

    async def event(
        self, snapshot: Snapshot, kind: Literal["Normal", "Warning"], reason: str, message: str
    ) -> None:
        """Tell people about a transition."""


class MetricsError(Exception):
    """Metrics could not be read: one sentence that names the source."""


class Metrics(Protocol):
    """Where measurements come from."""

    async def samples(self, windows: Mapping[Key, Mapping[str, float]]) -> dict[Key, dict[str, Sample]]:
        """Samples by pod UID; ``windows`` names, for each resource, its windows and their lengths in s.

        A pod without metrics is absent. No data is never zero.

        Raises:
            MetricsError: the source did not answer, or not in time.
        """


class EngineError(Exception):
    """An engine could not be asked, or refused. ``code``: unreachable | refused | stale_epoch."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Plan:
    """What applying a configuration would take: ``restart`` names the cold fields that differ."""

    hot: Sequence[str]
    restart: Sequence[str]


class Engines(Protocol):
    """The engines' own admin interface."""

    async def describe(self, replica: Replica) -> AdminConfig:
        """Version, knobs, live values, ceilings.

        Raises:
            EngineError: it did not answer.
        """

    async def plan(self, replica: Replica, values: Mapping[str, Any]) -> Plan:
        """Which of ``values`` differ, and whether they need a restart."""

    async def apply(self, replica: Replica, patch: ConfigPatch) -> ApplyReport:
        """Apply, then verify by reading back.

        Raises:
            EngineError: it did not answer, refused, or runs something else afterwards.
        """
