"""The ports of the reconciler over a simulated deployment: mishaps at writes, faults in what is read."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from kvpilot_engine.contract import AdminConfig, ApplyReport, ConfigPatch
from kvpilot_operator.backtest.cluster import OperatorCrash
from kvpilot_operator.ports import Conflict, EngineCallError
from kvpilot_operator.resource.errors import ManifestError
from kvpilot_operator.status.model import Status
from kvpilot_operator.status.snapshot import Key, Replica, Snapshot
from kvpilot_operator.tuning.decision import Record
from kvpilot_operator.tuning.observation import Counts, Promoted, Sample

if TYPE_CHECKING:
    from tests.operator.reconcile.deployment import Deployment

WRITES = (
    "roll_out",
    "write_status",
    "write_config",
    "scale",
    "prefer_removal",
    "recycle",
    "take_over_replicas",
    "record",
    "event",
    "apply",
)
"""Every method of the ports that changes something."""

SAMPLE_FAULTS = ("missing", "partial", "not finite", "young", "duplicated", "relabelled")
"""What the source may show of one replica instead of the truth."""

HIDING = tuple(fault for fault in SAMPLE_FAULTS if fault != "duplicated")
"""Those of them that hide it. Series that are counted twice show more load than there is, which scales
nothing in; the adapters of metrics leave one of them out."""

ENGINE_FAULTS = ("unreachable", "refuses")

Moment = Literal["before", "after"]


@dataclass
class Mishap:
    """What happens once, before or after the effect of the next write of a kind.

    ``happen`` may raise: then the caller sees a failure, whether the effect is there or not.
    """

    name: str
    write: str
    moment: Moment
    happen: Callable[[Deployment], None]


def crash(deployment: Deployment) -> None:
    """The operator dies."""
    deployment.ports.dead = True
    raise OperatorCrash


def no_answer(deployment: Deployment) -> None:
    """The API server or the engine gives no answer."""
    raise ConnectionError("no answer")


def touch(deployment: Deployment) -> None:
    """Somebody writes the resource, without a change of its spec."""
    deployment.edit(lambda spec: None)


class FaultyPorts:
    """Implements ``Cluster``, ``Metrics`` and ``Engines``. A dead operator has no more effects.

    Attributes:
        armed: mishaps to come, each at the first write that it fits.
        undisturbed: False once one of them has come.
    """

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self.armed: list[Mishap] = []
        self.dead = False
        self.undisturbed = True

    async def _write(self, name: str, effect: Callable[[], Awaitable[Any]], *given: Any) -> Any:
        effects = self._deployment.effects
        try:
            self._happens(name, "before")
            effects.before(name, *given)
            result = await effect()
            effects.after(name, *given)
            self._happens(name, "after")
        except BaseException:
            effects.failed(name)
            raise
        return result

    def _happens(self, write: str, moment: Moment) -> None:
        if self.dead:
            raise OperatorCrash
        found = [m for m in self.armed if (m.write, m.moment) == (write, moment)]
        if found:
            self.armed.remove(found[0])
            self.undisturbed = False
            self._deployment.took[f"{found[0].name} {moment} {write}"] += 1
            found[0].happen(self._deployment)

    # Cluster

    async def keys(self) -> list[Key]:
        return [self._deployment.cluster.key]

    async def read(self, key: Key) -> Snapshot:
        snapshot = self._deployment.read()
        self._deployment.effects.read(snapshot)
        return snapshot

    async def roll_out(self, snapshot: Snapshot, config: Promoted) -> None:
        async def effect() -> None:
            if snapshot.spec_generation in self._deployment.refused_generations:
                raise ManifestError(["spec.template: the API server refuses it"])
            await self._deployment.cluster.roll_out(snapshot, config)
            self._deployment.effects.rolled_out = snapshot.spec_generation

        await self._write("roll_out", effect, config)

    async def write_status(self, snapshot: Snapshot, status: Status) -> Snapshot:
        cluster = self._deployment.cluster
        written: Snapshot = await self._write(
            "write_status", lambda: cluster.write_status(snapshot, status), status
        )
        return written

    async def write_config(self, snapshot: Snapshot, config: Promoted) -> None:
        cluster = self._deployment.cluster
        await self._write("write_config", lambda: cluster.write_config(snapshot, config), config)

    async def scale(self, snapshot: Snapshot, replicas: int) -> None:
        cluster = self._deployment.cluster
        await self._write("scale", lambda: cluster.scale(snapshot, replicas), replicas)

    async def prefer_removal(self, snapshot: Snapshot, uids: Sequence[str]) -> None:
        cluster = self._deployment.cluster
        await self._write("prefer_removal", lambda: cluster.prefer_removal(snapshot, uids), uids)

    async def recycle(self, snapshot: Snapshot, uid: str) -> None:
        cluster = self._deployment.cluster
        await self._write("recycle", lambda: cluster.recycle(snapshot, uid), uid)

    async def take_over_replicas(self, snapshot: Snapshot, replicas: int) -> None:
        async def effect() -> None:
            if self._deployment.cluster.desired_replicas != replicas:
                raise Conflict(f"{replicas} replicas are no longer asked for")
            self._deployment.other_manager = ""

        await self._write("take_over_replicas", effect, replicas)

    async def record(self, snapshot: Snapshot, record: Record) -> None:
        await self._write("record", lambda: self._deployment.cluster.record(snapshot, record), record)

    async def recorded(self, snapshot: Snapshot) -> Sequence[Mapping[str, Any]]:
        return await self._deployment.cluster.recorded(snapshot)

    async def event(
        self, snapshot: Snapshot, kind: Literal["Normal", "Warning"], reason: str, message: str
    ) -> None:
        cluster = self._deployment.cluster
        await self._write("event", lambda: cluster.event(snapshot, kind, reason, message), reason)

    # Metrics

    def scrape_s(self, key: Key) -> float:
        return 0.0

    async def samples(self, windows: Mapping[Key, Mapping[str, float]]) -> dict[Key, dict[str, Sample]]:
        deployment = self._deployment
        shown: dict[str, Sample] = {}
        for uid, sample in (await deployment.cluster.samples(windows))[deployment.cluster.key].items():
            fault = deployment.fault_of(uid, SAMPLE_FAULTS)
            if fault != "missing":
                name = f"old-{uid}" if fault == "relabelled" else uid
                shown[name] = _faulty(_with_more_memory(sample, deployment.leak), fault)
        return {deployment.cluster.key: shown}

    # Engines

    async def describe(self, replica: Replica) -> AdminConfig:
        if self._deployment.fault_of(replica.uid, ("unreachable",)):
            raise EngineCallError(f"{replica.name} does not answer", "unreachable")
        return await self._deployment.cluster.describe(replica)

    async def apply(self, replica: Replica, patch: ConfigPatch) -> ApplyReport:
        async def effect() -> ApplyReport:
            if self._deployment.fault_of(replica.uid, ENGINE_FAULTS):
                raise EngineCallError(f"{replica.name} takes nothing", "refused")
            return await self._deployment.cluster.apply(replica, patch)

        try:
            report: ApplyReport = await self._write("apply", effect, replica, patch)
        except ConnectionError as error:
            raise EngineCallError(str(error), "unreachable") from error
        return report


def _with_more_memory(sample: Sample, leak: float) -> Sample:
    """The sample of an engine whose process has leaked a share of its limit."""
    gauges = sample.gauges
    if not leak or gauges.host is None:
        return sample
    ratio = min(1.0, gauges.memory_ratio + leak)
    return replace(sample, gauges=replace(gauges, memory_ratio=ratio, host=replace(gauges.host, ratio=ratio)))


def _faulty(sample: Sample, fault: str) -> Sample:
    match fault:
        case "partial":
            return replace(sample, windows={"short": sample.windows["short"]})
        case "not finite":
            return replace(sample, gauges=replace(sample.gauges, waiting=math.nan))
        case "young":
            return replace(sample, coverage_s=5.0)
        case "duplicated":
            twice = {name: Counts.total([counts, counts]) for name, counts in sample.windows.items()}
            return replace(sample, windows=twice)
        case _:
            return sample
