"""The reconciler: read, gather, decide, write the status, record, act.

``Reconciler.run_once`` is level-triggered: a tick, an event or an alert may call it at any time, and it
continues from what status, ConfigMap and engines show. Callers hold one lock per key.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import structlog

from kvpilot_engine.contract import ConfigPatch
from kvpilot_operator.manifests.objects import MAX_RECORDS
from kvpilot_operator.ports import Cluster, Conflict, EngineCallError, Engines, Metrics, MetricsError
from kvpilot_operator.reconcile.fleet import Fleet
from kvpilot_operator.resource.errors import ManifestError
from kvpilot_operator.resource.model import KVCacheDeployment
from kvpilot_operator.resource.resolve import base_config, policy_of
from kvpilot_operator.status import events
from kvpilot_operator.status.codec import state_of
from kvpilot_operator.status.history import last_numbers
from kvpilot_operator.status.model import Status
from kvpilot_operator.status.render import invalid_status, restored_config, status_of
from kvpilot_operator.status.snapshot import AcceptedSpec, Key, Replica, Snapshot
from kvpilot_operator.tuning.configuration import effective, with_cold
from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.decision import (
    Decision,
    Push,
    Record,
    Recycle,
    Scale,
    TakeOverReplicas,
    WriteConfig,
)
from kvpilot_operator.tuning.observation import (
    EngineProblem,
    EngineView,
    Observation,
    ObservedReplica,
    Promoted,
    Sample,
    SourceProblem,
)
from kvpilot_operator.tuning.policy import Policy
from kvpilot_operator.tuning.state import TuningState
from kvpilot_operator.tuning.windows import windows_of

log = structlog.get_logger(__name__)

MAX_PASSES = 12
"""Consecutive reconciles of one resource in one call; a change needs four, and others must get their turn."""


class Telemetry(Protocol):
    """Receives measurements of the reconciler."""

    def step(self, name: str, seconds: float) -> None:
        """One step of a reconcile took ``seconds``."""

    def reconciled(self, result: Reconciliation) -> None:
        """A resource was reconciled."""


class NullTelemetry:
    """Telemetry that drops everything."""

    def step(self, name: str, seconds: float) -> None:
        """Nothing."""

    def reconciled(self, result: Reconciliation) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Reconciliation:
    """One reconcile of one resource: what was read, observed and decided."""

    key: Key
    snapshot: Snapshot
    policy: Policy
    observation: Observation
    decision: Decision


class Reconciler:
    """Reconciles resources through three ports. It holds no state that a restart would miss.

    Args:
        clock: seconds since the epoch.
        pace_scale: factor on every duration of the pace table, for tests.
        fleet: limits over all resources; by default those that this reconciler sees.
    """

    def __init__(
        self,
        cluster: Cluster,
        metrics: Metrics,
        engines: Engines,
        *,
        clock: Callable[[], float] = time.time,
        pace_scale: float = 1.0,
        telemetry: Telemetry | None = None,
        fleet: Fleet | None = None,
    ) -> None:
        self._cluster = cluster
        self._metrics = metrics
        self._engines = engines
        self._clock = clock
        self._pace_scale = pace_scale
        self._telemetry = telemetry or NullTelemetry()
        self._fleet = fleet or Fleet(clock, pace_scale=pace_scale)
        self._rolled_out: dict[Key, Any] = {}
        self._scrape_s: dict[Key, float] = {}  # as it was seen
        self._unrecorded: dict[Key, tuple[Record, ...]] = {}
        self._cache_lost: dict[Key, float] = {}  # bytes that no status counts yet
        self.refused: set[Key] = set()  # their spec is refused; no event comes when the cause goes

    async def run_once(self, key: Key) -> Reconciliation | None:
        """Reconcile until the decision asks for no further reconcile.

        Returns None if the resource does not exist, or never had a valid spec.

        Raises:
            Conflict: the resource changed during every attempt.
            Exception: whatever the cluster raises; the next call continues and nothing is lost.
        """
        result = None
        for _ in range(MAX_PASSES):
            try:
                result = await self._reconcile(key)
            except Conflict:
                continue
            if result is None or not result.decision.again:
                return result
        if result is None:  # None would mean that the resource does not exist
            raise Conflict(f"{key} changed during each of {MAX_PASSES} reconciles")
        return result

    def forget(self, key: Key) -> None:
        """Apply the owned objects again at the next reconcile: at a full resync, or after one was deleted."""
        self._rolled_out.pop(key, None)

    async def _reconcile(self, key: Key) -> Reconciliation | None:
        with self._timed("read"):
            snapshot = await self._cluster.read(key)
        if snapshot is None:
            self.forget(key)
            self.refused.discard(key)
            self._unrecorded.pop(key, None)
            self._fleet.forget(key)
            self._cache_lost.pop(key, None)
            return None
        self.refused.discard(key)
        try:
            policy, base = self._resolve(snapshot)
            snapshot = await self._roll_out(snapshot, base)
        except ManifestError as error:
            self.refused.add(key)
            if snapshot.accepted is None:
                await self._refuse(snapshot, error)
                return None
            snapshot = replace(snapshot, spec_error="; ".join(error.lines))
            policy, base = self._resolve(snapshot)
        policy = self._paced(key, policy)
        state = state_of(snapshot.status)
        with self._timed("gather"):
            observation = await self._gather(snapshot, base, policy, state)
        with self._timed("decide"):
            # No await from here to ``note``: two resources must not see the same free slot.
            observation = replace(observation, fleet=self._fleet.limits(key, state))
            decision = decide(observation, state, policy, observation.at)
            blocked = self._fleet.note(key, decision)
        with self._timed("write_status"):
            snapshot = await self._write_status(snapshot, policy, observation, decision)
        self._cache_lost.pop(key, None)  # the status counts it now
        for rule in blocked:
            event = events.rule_blocked(rule)
            await self._cluster.event(snapshot, event.kind, event.reason, event.message)
        result = Reconciliation(key, snapshot, policy, observation, decision)
        self._telemetry.reconciled(result)
        with self._timed("record"):
            await self._record(snapshot, decision)
        with self._timed("act"):
            await self._act(snapshot, observation, decision)
        return result

    def _paced(self, key: Key, policy: Policy) -> Policy:
        """The policy with a pace that fits how often the source really scrapes."""
        # The source refuses windows that are too short for its configured interval.
        scrape_s = max(self._scrape_s.get(key, 0.0), self._metrics.scrape_s(key))
        fitted = policy.pace.fitted(scrape_s)
        if fitted is policy.pace:
            return policy
        return replace(policy, pace=fitted, stretched=fitted.short / policy.pace.short)

    async def _refuse(self, snapshot: Snapshot, error: ManifestError) -> None:
        """Write why the spec is invalid. No earlier spec is known, so nothing else happens."""
        await self._write(snapshot, invalid_status(snapshot, error, self._clock()))

    def _resolve(self, snapshot: Snapshot) -> tuple[Policy, dict[str, Any]]:
        """Policy and base configuration of the spec in force.

        Raises:
            ManifestError: the spec is invalid.
        """
        spec = snapshot.resource.spec
        return policy_of(spec, self._pace_scale), base_config(spec).model_dump(**DUMP)

    async def _roll_out(self, snapshot: Snapshot, base: Mapping[str, Any]) -> Snapshot:
        """Apply the owned objects once per spec generation, and again if one was deleted or edited.

        Raises:
            ManifestError: the API server refuses an object that follows from the spec.
        """
        seen = snapshot.resource.metadata.uid, snapshot.resource.metadata.generation
        lost = snapshot.promoted is None or snapshot.desired_replicas is None or snapshot.token_lost
        if self._rolled_out.get(snapshot.key) != seen or lost:
            if (promoted := snapshot.promoted) is None:
                config = await self._config_before(snapshot, base)
            else:
                # Before the workload: a pod that it starts at once must find the new cold fields.
                config = replace(promoted, config=with_cold(promoted.config, base))
                if config != promoted:
                    await self._cluster.write_config(snapshot, config)
            self._rolled_out[snapshot.key] = seen  # before: an object deleted meanwhile is applied again
            try:
                with self._timed("roll_out"):
                    await self._cluster.roll_out(snapshot, config)
            except BaseException:
                self.forget(snapshot.key)
                raise
            snapshot = await self._cluster.read(snapshot.key) or snapshot
        return snapshot

    async def _config_before(self, snapshot: Snapshot, base: Mapping[str, Any]) -> Promoted:
        """What a new ConfigMap holds: what the status says was promoted, or else the base.

        Without a status the base gets a number that no engine and no record knows: what they knew may have
        been another configuration.
        """
        if (known := restored_config(snapshot.status, base)) is not None:
            return known
        views = (await self._describe(snapshot.replicas)).values()
        ran = [view.generation + view.epoch for view in views if isinstance(view, EngineView)]
        _, recorded = last_numbers(await self._cluster.recorded(snapshot))
        return Promoted(max([recorded, *ran]) + 1, base)

    async def _gather(
        self, snapshot: Snapshot, base: Mapping[str, Any], policy: Policy, state: TuningState
    ) -> Observation:
        now, asked = self._clock(), snapshot.overrides
        windows = windows_of(state, policy.pace, now)
        engines, (samples, problem) = await asyncio.gather(
            self._describe(snapshot.replicas), self._measure(snapshot.key, windows)
        )
        self._see_scrapes(snapshot.key, samples)
        # A status that was lost, or that there never was: old records must keep their numbers.
        lost = snapshot.status.tuning is None
        decision, generation = last_numbers(await self._cluster.recorded(snapshot)) if lost else (0, 0)
        return Observation(
            name=snapshot.key.name,
            cache_lost_bytes=self._cache_lost.get(snapshot.key, 0.0),
            at=now,
            replicas=tuple(
                _observed(replica, engines.get(replica.uid), samples.get(replica.uid))
                for replica in snapshot.replicas
            ),
            base=base,
            promoted=snapshot.promoted,
            desired_replicas=snapshot.desired_replicas or 0,
            spec_replicas=None if snapshot.desired_replicas is None else snapshot.resource.spec.replicas,
            replicas_managed_by=snapshot.replicas_managed_by,
            autoscaler=snapshot.autoscaler,
            conflict_since=_conflict_since(snapshot),
            metrics_problem=problem,
            paused_by=asked.paused_by,
            scaling_paused=asked.scaling_paused,
            boosts=asked.boosts,
            pins=asked.pins,
            approvals=asked.approvals,
            rollback=asked.rollback,
            rolling_out=snapshot.rolling_out,
            spec_error=snapshot.spec_error,
            start_s=_start_s(snapshot.replicas),
            recorded_decision=decision,
            recorded_generation=generation,
            recorded_base=self._recorded_base(snapshot) if lost else None,
        )

    def _recorded_base(self, snapshot: Snapshot) -> dict[str, Any] | None:
        """The base of the accepted spec; None if there is none, or it is no longer valid."""
        if snapshot.accepted is None:
            return None
        try:
            manifest = {**snapshot.manifest, "spec": snapshot.accepted.spec}
            return base_config(KVCacheDeployment.parse(manifest).spec).model_dump(**DUMP)
        except ManifestError:
            return None

    def _see_scrapes(self, key: Key, samples: Mapping[str, Sample]) -> None:
        """Remember the usual interval of the scrapes, in coarse steps, so that windows do not wander."""
        seen = sorted(sample.scrape_s for sample in samples.values() if sample.scrape_s > 0)
        if not seen:
            return
        usual, known = seen[len(seen) // 2], self._scrape_s.get(key, 0.0)
        if not known or not 1 / SAME_INTERVAL <= usual / known <= SAME_INTERVAL:
            self._scrape_s[key] = usual

    async def _describe(self, replicas: tuple[Replica, ...]) -> dict[str, EngineView | EngineProblem]:
        async def ask(replica: Replica) -> EngineView | EngineProblem:
            try:
                config = await self._engines.describe(replica)
            except EngineCallError as error:
                log.warning("engine_not_described", replica=replica.name, error=str(error), code=error.code)
                return error.code
            return EngineView(
                instance=config.instance,
                generation=config.generation,
                epoch=config.epoch,
                config=config.config.model_dump(**DUMP),
                converging=config.converging,
                ceilings=config.ceilings,
            )

        asked = [replica for replica in replicas if replica.ready and not replica.terminating]
        views = await asyncio.gather(*(ask(replica) for replica in asked))
        return {replica.uid: view for replica, view in zip(asked, views, strict=True)}

    async def _measure(
        self, key: Key, windows: Mapping[str, float]
    ) -> tuple[dict[str, Sample], SourceProblem | None]:
        try:
            return (await self._metrics.samples({key: windows})).get(key, {}), None
        except MetricsError as error:
            return {}, error.problem

    async def _write_status(
        self, snapshot: Snapshot, policy: Policy, observation: Observation, decision: Decision
    ) -> Snapshot:
        """Write the intent before any action is taken."""
        return await self._write(
            snapshot, status_of(snapshot, policy, observation, decision), decision.records
        )

    async def _write(self, snapshot: Snapshot, after: Status, records: Sequence[Record] = ()) -> Snapshot:
        """Write a status if it differs from the present one, and report what changed as Events."""
        before = snapshot.status
        if after == before:
            return snapshot
        written = await self._cluster.write_status(snapshot, after)
        for event in events.transitions(before, after, records):
            await self._cluster.event(written, event.kind, event.reason, event.message)
        return written

    async def _act(self, snapshot: Snapshot, observation: Observation, decision: Decision) -> None:
        """Take the actions. A failed push is logged; the next reconcile decides on what it observes."""
        actions, wanted = decision.actions, effective(observation.base, decision.state.overlay)
        promoted = observation.promoted
        if promoted is not None and not any(isinstance(action, WriteConfig) for action in actions):
            accepting = _accepting(snapshot, promoted, wanted)
            if accepting.accepted != snapshot.accepted:
                await self._cluster.write_config(accepting, promoted)
        by_uid = {replica.uid: replica for replica in snapshot.replicas}
        pushes = [action for action in actions if isinstance(action, Push) and action.uid in by_uid]
        lost = await asyncio.gather(*(self._push(by_uid[action.uid], action) for action in pushes))
        held = {replica.uid: replica.sample for replica in observation.replicas}
        for push, share in zip(pushes, lost, strict=True):
            if share and (sample := held.get(push.uid)) is not None:
                more = share * sample.gauges.cached_bytes
                self._cache_lost[snapshot.key] = self._cache_lost.get(snapshot.key, 0.0) + more
        for action in actions:
            match action:
                case WriteConfig(generation, values):
                    config = Promoted(generation, values)
                    await self._cluster.write_config(_accepting(snapshot, config, wanted), config)
                case Scale(replicas, reason, first):
                    log.info("scale", resource=str(snapshot.key), replicas=replicas, reason=reason)
                    if first:
                        await self._cluster.prefer_removal(snapshot, first)
                    await self._cluster.scale(snapshot, replicas)
                case Recycle(uid):
                    log.info("recycle", resource=str(snapshot.key), replica=uid)
                    await self._cluster.recycle(snapshot, uid)
                case TakeOverReplicas(replicas):
                    log.info("take_over_replicas", resource=str(snapshot.key), replicas=replicas)
                    await self._cluster.take_over_replicas(snapshot, replicas)
                case Push():
                    pass

    async def _push(self, replica: Replica, push: Push) -> float:
        """Push a configuration; returns the share of the cached blocks that it dropped."""
        patch = ConfigPatch(epoch=push.epoch, generation=push.generation, values=dict(push.values))
        try:
            report = await self._engines.apply(replica, patch)
        except EngineCallError as error:
            log.warning("push_failed", replica=replica.name, generation=push.generation, error=str(error))
            return 0.0
        log.info(
            "pushed",
            replica=replica.name,
            generation=report.generation,
            changed=report.changed,
            blocks_kept=report.blocks_kept,
            blocks_lost=report.blocks_lost,
        )
        blocks = report.blocks_kept + report.blocks_lost
        return report.blocks_lost / blocks if blocks else 0.0

    async def _record(self, snapshot: Snapshot, decision: Decision) -> None:
        """Keep the records, before the actions: an action that fails ends the reconcile.

        A record that cannot be kept delays no action; a later reconcile keeps it.
        """
        for record in decision.records:
            log.info(
                "decision",
                resource=str(snapshot.key),
                id=record.id,
                rule=record.rule,
                outcome=record.outcome,
                summary=record.summary,
            )
        waiting = [*self._unrecorded.pop(snapshot.key, ()), *decision.records]
        try:
            while waiting:
                await self._cluster.record(snapshot, waiting[0])
                del waiting[0]
        except Exception as error:
            log.warning("decision_not_recorded", resource=str(snapshot.key), error=str(error))
            self._unrecorded[snapshot.key] = tuple(waiting[-MAX_RECORDS:])

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._telemetry.step(name, time.perf_counter() - started)


DUMP: dict[str, Any] = {"by_alias": True, "exclude_unset": True, "mode": "json"}
"""How a configuration is written: camelCase, explicitly set fields only."""


SAME_INTERVAL = 1.34
"""Intervals of scrapes that differ by no more than this factor are the same."""

START_S = 60.0
"""Time until a new replica serves while none was seen to start, s."""


def _accepting(snapshot: Snapshot, config: Promoted, wanted: Mapping[str, Any]) -> Snapshot:
    """The snapshot with the spec to keep beside ``config``: the present one as soon as it is in ``config``.

    A spec that cannot be rolled out must not become the one to go on from. And where the status is lost, the
    difference between ``config`` and the base of the spec beside it is what was tuned.
    """
    if snapshot.spec_error or dict(config.config) != wanted:
        return snapshot
    return replace(snapshot, accepted=AcceptedSpec(snapshot.spec_generation, snapshot.manifest["spec"]))


def _start_s(replicas: Iterable[Replica]) -> float:
    """How long a new replica takes until it serves, s: the slowest start of those that serve."""
    return max((r.start_s for r in replicas if r.ready and r.start_s > 0), default=START_S)


def _conflict_since(snapshot: Snapshot) -> float | None:
    """When the field-manager conflict began, s since the epoch; None without one."""
    conflict = snapshot.status.condition("FieldManagerConflict")
    return conflict.last_transition_time if conflict is not None and conflict.status == "True" else None


def _observed(
    replica: Replica, engine: EngineView | EngineProblem | None, sample: Sample | None
) -> ObservedReplica:
    described = engine if isinstance(engine, EngineView) else None
    return ObservedReplica(
        uid=replica.uid,
        name=replica.name,
        ready=replica.ready,
        terminating=replica.terminating,
        pending_reason=replica.pending_reason,
        created_at=replica.created_at,
        restarts=replica.restarts,
        engine=described,
        engine_problem=None if isinstance(engine, EngineView) else engine,
        sample=sample,
    )
