"""The ports of the reconciler over simulated engines: one resource, its workload, ConfigMap and status."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

from kvpilot_engine.contract import AdminConfig, ApplyReport, ConfigPatch
from kvpilot_operator.backtest.engine import SimulatedEngine
from kvpilot_operator.backtest.model import EngineModel
from kvpilot_operator.ports import Conflict, EngineCallError, MetricsError
from kvpilot_operator.status.codec import encode_status
from kvpilot_operator.status.events import Event
from kvpilot_operator.status.model import Status
from kvpilot_operator.status.overrides import Overrides
from kvpilot_operator.status.snapshot import AcceptedSpec, Key, Replica, Snapshot
from kvpilot_operator.tuning.decision import Record
from kvpilot_operator.tuning.observation import (
    Approval,
    Boost,
    Pin,
    Promoted,
    Rollback,
    Sample,
    SourceProblem,
)


class OperatorCrash(BaseException):
    """The operator dies; no ``except Exception`` may go on after it."""


class SimulatedCluster:
    """Implements ``Cluster``, ``Metrics`` and ``Engines`` for one resource.

    Args:
        start_s: from the creation of a pod until it is ready, s; ``start_spread`` is the standard deviation
            of its log.
        scrape: interval of the scrapes, s.
        seed: of start times, speeds and faults.

    Attributes:
        now: the clock, s since the epoch.
        engines: replicas that are wanted; ``draining`` ones finish their requests and get no more.
        drain_s: after which a draining replica is killed.
        scalings: time, and replicas before and after.
        status_writes: every status document written, with its time.
        schedulable: replicas that find a node; more stay pending.
        crash: asked before every effect; True ends the operator there, and the effect is lost.
    """

    def __init__(
        self,
        manifest: Mapping[str, Any],
        replicas: int,
        model: EngineModel,
        start_s: float,
        now: float,
        *,
        start_spread: float = 0.0,
        scrape: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.manifest = {**manifest, "metadata": {"resourceVersion": "1", **manifest["metadata"]}}
        metadata = self.manifest["metadata"]
        self.key = Key(metadata["namespace"], metadata["name"])
        self.now, self.model, self.start_s = now, model, start_s
        self.desired_replicas = replicas
        self.promoted: Promoted | None = None
        self.accepted: AcceptedSpec | None = None
        self.engines: list[SimulatedEngine] = []
        self.draining: list[tuple[float, SimulatedEngine]] = []
        self.drain_s = 600.0
        self.scalings: list[tuple[float, int, int]] = []
        self.boosts: tuple[Boost, ...] = ()
        self.paused_by, self.scaling_paused = "", False
        self.pins: tuple[Pin, ...] = ()
        self.approvals: tuple[Approval, ...] = ()
        self.rollback: Rollback | None = None
        self.metrics_problem: SourceProblem | None = None
        self.schedulable = 1000
        self.crash: Callable[[], bool] = lambda: False
        self.records: list[Record] = []
        self.events: list[Event] = []
        self.status_writes: list[tuple[float, dict[str, Any]]] = []
        self._start_spread, self._scrape = start_spread, scrape
        self._random = random.Random(seed * 7919 + 5)
        self._gone_s = 0.0
        self._made = 0
        self._crashed = False
        self._last: Snapshot | None = None

    def clock(self) -> float:
        """The simulated time, s since the epoch."""
        return self.now

    def edit(self, spec: Mapping[str, Any]) -> None:
        """Replace the spec, as a user does."""
        self._replace(spec=spec, generation=self.manifest["metadata"]["generation"] + 1)

    def lose_status(self) -> None:
        """Delete the status, as a restore from a backup does."""
        self._replace(status={})

    def restart_operator(self) -> None:
        """Let calls pass again after a crash."""
        self._crashed = False

    def snapshot(self) -> Snapshot:
        """The resource now; the same object while nothing changes, as it keeps what was parsed."""
        found = Snapshot(
            key=self.key,
            manifest=self.manifest,
            desired_replicas=None if self.promoted is None else self.desired_replicas,
            replicas=(
                *(self._replica(engine) for engine in self.engines),
                *(self._replica(engine, terminating=True) for _, engine in self.draining),
            ),
            promoted=self.promoted,
            accepted=self.accepted,
            overrides=Overrides(
                paused_by=self.paused_by,
                scaling_paused=self.scaling_paused,
                boosts=tuple(boost for boost in self.boosts if boost.expires_at > self.now),
                pins=tuple(pin for pin in self.pins if pin.expires_at > self.now),
                approvals=self.approvals,
                rollback=self.rollback,
            ),
        )
        if self._last is None or found != self._last:
            self._last = found
        return self._last

    def ready(self, at: float) -> list[SimulatedEngine]:
        """Engines that serve at a time."""
        return [engine for engine in self.engines if engine.ready_at <= at]

    def converge(self, ready_at: float) -> None:
        """Start or stop replicas until there are as many as the workload asks for."""
        assert self.promoted is not None, "pods start from the ConfigMap"
        surplus = self.engines[self.desired_replicas :]
        del self.engines[self.desired_replicas :]
        for engine in surplus:
            if engine.ready_at <= self.now and engine.inside:
                self.draining.append((self.now + self.drain_s, engine))
            else:
                self._remove(engine)
        while len(self.engines) < self.desired_replicas:
            self.engines.append(self._made_engine(ready_at))

    def _made_engine(self, ready_at: float) -> SimulatedEngine:
        assert self.promoted is not None
        spread = math.exp(self._random.gauss(0.0, self._start_spread)) if self._start_spread else 1.0
        at = self.now + (ready_at - self.now) * spread if len(self.engines) < self.schedulable else math.inf
        engine = SimulatedEngine(
            f"u{self._made}",
            f"{self.key.name}-{self._made}",
            self.promoted,
            self.model,
            at,
            asked_at=self.now,
            scrape=self._scrape,
            coin=self._random.random,
        )
        if self.model.noise:
            engine.slow = math.exp(self._random.gauss(0.0, self.model.noise))
        if at <= self.now:
            engine.warm()
        self._made += 1
        return engine

    def _remove(self, engine: SimulatedEngine) -> None:
        self._gone_s += self.now - engine.asked_at
        engine.close()

    def drained(self) -> list[SimulatedEngine]:
        """Take away the draining replicas that are empty or out of time, and return them."""
        done = [item for item in self.draining if item[1].inside == 0 or item[0] <= self.now]
        self.draining = [item for item in self.draining if item not in done]
        for _, engine in done:
            self._remove(engine)
        return [engine for _, engine in done]

    def wander(self) -> None:
        """Let the speed of each replica wander: correlated over a minute."""
        if not (noise := self.model.noise):
            return
        keep = math.exp(-self._scrape / 60.0)
        for engine in self.running():
            fresh = noise * math.sqrt(1 - keep**2) * self._random.gauss(0.0, 1.0)
            engine.slow = math.exp(keep * math.log(engine.slow) + fresh)

    def running(self) -> list[SimulatedEngine]:
        """Replicas that serve or drain now."""
        return [*self.ready(self.now), *(engine for _, engine in self.draining)]

    def paid_s(self) -> float:
        """Time for which replicas were paid: from the creation of a pod to its end, pending and draining
        included, s."""
        alive = [*self.engines, *(engine for _, engine in self.draining)]
        return self._gone_s + sum(self.now - engine.asked_at for engine in alive)

    def _replace(self, *, generation: int | None = None, **parts: Any) -> None:
        metadata = self.manifest["metadata"]
        version = str(int(metadata["resourceVersion"]) + 1)
        generation = generation or metadata["generation"]
        metadata = {**metadata, "resourceVersion": version, "generation": generation}
        self.manifest = {**self.manifest, **parts, "metadata": metadata}

    def _effect(self) -> None:
        """Called before each effect. A dead operator has no more effects."""
        self._crashed = self._crashed or self.crash()
        if self._crashed:
            raise OperatorCrash

    # Cluster

    async def keys(self) -> list[Key]:
        """The one resource."""
        return [self.key]

    async def read(self, key: Key) -> Snapshot:
        """The resource now."""
        return self.snapshot()

    def _replica(self, engine: SimulatedEngine, terminating: bool = False) -> Replica:
        return Replica(
            uid=engine.uid,
            name=engine.name,
            ready=engine.ready_at <= self.now,
            admin_url=f"http://{engine.name}",
            admin_token="",
            terminating=terminating,
            pending_reason="Unschedulable" if engine.unschedulable else "",
            created_at=engine.asked_at,
            start_s=engine.ready_at - engine.asked_at if engine.ready_at <= self.now else 0.0,
            restarts=engine.restarts,
        )

    async def roll_out(self, snapshot: Snapshot, config: Promoted) -> None:
        """Make ConfigMap and workload where there are none."""
        self._effect()
        if self.promoted is None:
            self.promoted = config
            self.converge(self.now)

    async def write_status(self, snapshot: Snapshot, status: Status) -> Snapshot:
        """Replace the status.

        Raises:
            Conflict: the resource changed since it was read.
        """
        self._effect()
        if snapshot.manifest["metadata"] != self.manifest["metadata"]:
            raise Conflict(f"{self.key} changed since it was read")
        document = encode_status(status)
        self._replace(status=document)
        self.status_writes.append((self.now, document))
        return replace(snapshot, manifest=self.manifest)

    async def write_config(self, snapshot: Snapshot, config: Promoted) -> None:
        """Replace the content of the ConfigMap."""
        self._effect()
        self.promoted, self.accepted = config, snapshot.accepted

    async def scale(self, snapshot: Snapshot, replicas: int) -> None:
        """Change the number of replicas."""
        self._effect()
        self.resize(replicas)

    async def prefer_removal(self, snapshot: Snapshot, uids: Sequence[str]) -> None:
        """Let these replicas go first: the last ones of the list go."""
        self._effect()
        self.engines.sort(key=lambda engine: engine.uid in uids)

    async def recycle(self, snapshot: Snapshot, uid: str) -> None:
        """Replace one replica by a new one."""
        self._effect()
        self.engines = [engine for engine in self.engines if engine.uid != uid]
        self.converge(self.now + self.start_s)

    def resize(self, replicas: int) -> None:
        """Ask the workload for a number of replicas."""
        if replicas != self.desired_replicas:
            self.scalings.append((self.now, self.desired_replicas, replicas))
        self.desired_replicas = replicas
        self.converge(self.now + self.start_s)

    def configure(self, values: Mapping[str, Any]) -> None:
        """Change knobs of all replicas and of those to come, without any proof."""
        assert self.promoted is not None, "pods start from the ConfigMap"
        self.promoted = Promoted(self.promoted.generation + 1, {**self.promoted.config, **values})
        for engine in self.ready(self.now):
            engine.config = {**engine.config, **values}
            engine.generation = self.promoted.generation

    async def take_over_replicas(self, snapshot: Snapshot, replicas: int) -> None:
        """There is no other field manager here."""
        self._effect()

    async def record(self, snapshot: Snapshot, record: Record) -> None:
        """Keep a decision record."""
        self._effect()
        self.records.append(record)

    async def recorded(self, snapshot: Snapshot) -> Sequence[Mapping[str, Any]]:
        """The records so far."""
        return [asdict(record) for record in self.records]

    async def event(
        self, snapshot: Snapshot, kind: Literal["Normal", "Warning"], reason: str, message: str
    ) -> None:
        """Keep an Event."""
        self._effect()
        self.events.append(Event(kind, reason, message))

    # Metrics

    def scrape_s(self, key: Key) -> float:
        """As the samples show it."""
        return 0.0

    async def samples(self, windows: Mapping[Key, Mapping[str, float]]) -> dict[Key, dict[str, Sample]]:
        """Samples of the running engines.

        Raises:
            MetricsError: the source is down.
        """
        return {self.key: self.measured(windows[self.key])}

    def measured(self, windows: Mapping[str, float]) -> dict[str, Sample]:
        """Samples of the running engines by uid, over windows of given lengths (s).

        Raises:
            MetricsError: the source is down.
        """
        if (problem := self.metrics_problem) is not None:
            raise MetricsError(problem.message, problem.reason)
        return {e.uid: e.sample(self.now, windows) for e in self.running() if not e.silent}

    # Engines

    async def describe(self, replica: Replica) -> AdminConfig:
        """What the engine reports.

        Raises:
            EngineCallError: it is gone or does not serve yet.
        """
        return self._engine(replica).describe()

    async def apply(self, replica: Replica, patch: ConfigPatch) -> ApplyReport:
        """Change an engine's configuration.

        Raises:
            EngineCallError: it is gone, does not serve yet, refuses it, or has seen a newer epoch.
        """
        self._effect()
        engine = self._engine(replica)
        if engine.refuses:
            raise EngineCallError(f"{replica.name} refuses the configuration", "refused")
        if patch.epoch < engine.epoch:
            raise EngineCallError(f"epoch {patch.epoch} is older than {engine.epoch}", "stale_epoch")
        return engine.apply(patch)

    def _engine(self, replica: Replica) -> SimulatedEngine:
        for engine in self.ready(self.now):
            if engine.uid == replica.uid:
                return engine
        raise EngineCallError(f"{replica.name} does not answer", "unreachable")
