"""The ports: what the reconciler and the alert receiver need from outside. Adapters decide nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from kvpilot_engine.contract import AdminConfig, ApplyReport, ConfigPatch
from kvpilot_operator.status.model import Status
from kvpilot_operator.status.snapshot import Key, Replica, Snapshot
from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.decision import Record
from kvpilot_operator.tuning.observation import EngineProblem, Promoted, Sample, SourceProblem


class Conflict(Exception):  # noqa: N818 - the API server's own word for it
    """The resource changed since the snapshot; reconcile again."""


class Cluster(Protocol):
    """Where resources live and replicas run."""

    async def keys(self) -> list[Key]:
        """Every resource that this operator watches."""

    async def read(self, key: Key) -> Snapshot | None:
        """The resource now; None if it does not exist."""

    async def roll_out(self, snapshot: Snapshot, config: Promoted) -> None:
        """Apply the owned objects of the spec. Never sets the replicas of a workload that exists.

        Args:
            config: written only if the resource has no configuration yet.
        """

    async def write_status(self, snapshot: Snapshot, status: Status) -> Snapshot:
        """Replace the status, if the resource has not changed since the snapshot.

        Raises:
            Conflict: it has.
        """

    async def write_config(self, snapshot: Snapshot, config: Promoted) -> None:
        """Replace the content of the owned ConfigMap."""

    async def scale(self, snapshot: Snapshot, replicas: int) -> None:
        """Set the number of replicas of the child workload."""

    async def prefer_removal(self, snapshot: Snapshot, uids: Sequence[str]) -> None:
        """Let these replicas go first at the next scale-in; without effect on one that is gone."""

    async def recycle(self, snapshot: Snapshot, uid: str) -> None:
        """Replace one replica by a new one; its requests are drained. Without effect if it is gone."""

    async def take_over_replicas(self, snapshot: Snapshot, replicas: int) -> None:
        """Become the only field manager of the workload's replicas, without changing their number.

        Raises:
            Conflict: the number is no longer ``replicas``, or the workload changed meanwhile.
        """

    async def record(self, snapshot: Snapshot, record: Record) -> None:
        """Keep a whole decision record; the last 50 stay."""

    async def recorded(self, snapshot: Snapshot) -> Sequence[Mapping[str, Any]]:
        """The decision records that are kept, oldest first, as JSON holds them."""

    async def event(
        self, snapshot: Snapshot, kind: Literal["Normal", "Warning"], reason: str, message: str
    ) -> None:
        """Write an Event on the resource."""


class BoostingCluster(Cluster, Protocol):
    """A cluster that also holds the overrides which verified alerts create."""

    async def boost(self, snapshot: Snapshot, fingerprint: str, minimum: int, until: float, why: str) -> str:
        """Create or refresh the override of one alert; returns its name."""

    def boost_name(self, key: Key, fingerprint: str) -> str:
        """Name of the override of one alert."""


class MetricsError(Exception):
    """Metrics could not be read. The message is one sentence that names the source."""

    def __init__(self, message: str, reason: str = reasons.METRICS_UNAVAILABLE) -> None:
        super().__init__(message)
        self.problem = SourceProblem(reason, message)


class Metrics(Protocol):
    """Where measurements come from."""

    def scrape_s(self, key: Key) -> float:
        """Configured interval of the scrapes of a resource's source, s; 0 if it is unknown."""

    async def samples(self, windows: Mapping[Key, Mapping[str, float]]) -> dict[Key, dict[str, Sample]]:
        """Samples of each resource by replica UID. A replica without metrics is absent: no data is not zero.

        Args:
            windows: for each resource its windows by name, with their lengths in s.

        Raises:
            MetricsError: the source did not answer in time.
        """


class EngineCallError(Exception):
    """An engine could not be asked, or refused.

    Attributes:
        code: ``unreachable`` (no answer), ``unauthorized`` (it refused the token), ``refused`` (any other
            refusal) or ``stale_epoch`` (a newer writer was there).
    """

    def __init__(self, message: str, code: EngineProblem) -> None:
        super().__init__(message)
        self.code = code


class Engines(Protocol):
    """The administration of engines, neutral of their runtime."""

    async def describe(self, replica: Replica) -> AdminConfig:
        """Version, knobs, live values and ceilings.

        Raises:
            EngineCallError: the engine did not answer, or refused.
        """

    async def apply(self, replica: Replica, patch: ConfigPatch) -> ApplyReport:
        """Apply a configuration, then verify it by reading it back.

        Raises:
            EngineCallError: the engine did not answer, refused, or runs another configuration afterwards.
        """
