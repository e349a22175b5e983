"""The life of a decision: gather, decide, write the intent, record, act.

``Loop.run_once`` is the table of contents. It is level-triggered: it may be called at any time, by a tick, an
event or an alert, and goes on from what status, ConfigMap and engines say. Callers hold one lock per key.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import structlog

from kvpilot_engine.contract import ConfigPatch
from kvpilot_operator import events
from kvpilot_operator.manifests.objects import MOST_RECORDS
from kvpilot_operator.ports import (
    Cluster,
    Conflict,
    EngineError,
    Engines,
    Key,
    Metrics,
    MetricsError,
    Replica,
    Snapshot,
)
from kvpilot_operator.spec.errors import ManifestError
from kvpilot_operator.spec.models import KVCacheDeployment
from kvpilot_operator.spec.resolve import base_config, policy_of
from kvpilot_operator.spec.status import invalid_status, state_from_status, status_of
from kvpilot_operator.spec.times import from_rfc3339
from kvpilot_operator.tuning.configuration import with_cold
from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.decision import Action, Decision, Push, Record, Scale, WriteConfig
from kvpilot_operator.tuning.observation import EngineView, Observation, Pod, Promoted, Sample
from kvpilot_operator.tuning.policy import Policy
from kvpilot_operator.tuning.state import Phase, TuningState

log = structlog.get_logger(__name__)

RIVAL_S = 600.0
"""A number of replicas that somebody else wrote is respected for this long, s."""

MOST_LOOKS = 12
"""Consecutive looks at one resource in one pass; a change needs four, so more is a loop that must yield."""


class Telemetry(Protocol):
    """Where the loop tells how it works."""

    def step(self, name: str, seconds: float) -> None:
        """One step of a pass took ``seconds``."""

    def looked(self, look: Look) -> None:
        """A resource was looked at."""


class Silent:
    """Telemetry that nobody reads."""

    def step(self, name: str, seconds: float) -> None:
        """Nothing."""

    def looked(self, look: Look) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Look:
    """One look at one resource: what was read, what was observed, what was decided."""

    key: Key
    snapshot: Snapshot
    policy: Policy
    observation: Observation
    decision: Decision


class Loop:
    """Looks at resources through three ports; holds no state that a restart would miss.

    Args:
        clock: seconds since the epoch.
        pace_scale: factor on every duration of the pace table, for tests.
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
    ) -> None:
        self._cluster = cluster
        self._metrics = metrics
        self._engines = engines
        self._clock = clock
        self._pace_scale = pace_scale
        self._telemetry = telemetry or Silent()
        self._rolled_out: dict[Key, Any] = {}
        self._unrecorded: dict[Key, tuple[Record, ...]] = {}
        self.refused: set[Key] = set()  # what stands in their way may go without an event of theirs

    async def run_once(self, key: Key) -> Look | None:
        """Look, act, and look again while the decision asks for it. None when the resource is gone or bad.

        Raises:
            Conflict: the resource changed during every look.
            Exception: whatever the cluster raises; nothing is lost, the next call goes on.
        """
        look = None
        for _ in range(MOST_LOOKS):
            try:
                look = await self._look(key)
            except Conflict:
                continue
            if look is None or not look.decision.again:
                return look
        if look is None:  # which would say that there is no such resource
            raise Conflict(f"{key} changed during each of {MOST_LOOKS} looks")
        return look

    def forget(self, key: Key) -> None:
        """Roll the owned objects out again at the next look: a full resync, or one of them is gone."""
        self._rolled_out.pop(key, None)

    async def _look(self, key: Key) -> Look | None:
        with self._timed("read"):
            snapshot = await self._cluster.read(key)
        if snapshot is None:
            self.forget(key)
            self.refused.discard(key)
            self._unrecorded.pop(key, None)
            return None
        self.refused.discard(key)
        try:
            resource = KVCacheDeployment.parse(snapshot.manifest)
            policy = policy_of(resource.spec, self._pace_scale)
            base = base_config(resource.spec).model_dump(**DUMP)
            with self._timed("roll_out"):
                snapshot = await self._roll_out(snapshot, resource, base)
        except ManifestError as error:
            self.refused.add(key)
            await self._refuse(snapshot, error)
            return None
        state = state_from_status(snapshot.manifest.get("status") or {})
        with self._timed("gather"):
            observation = await self._gather(snapshot, base, policy, state)
        with self._timed("decide"):
            decision = decide(observation, state, policy, observation.at)
        with self._timed("write_status"):
            snapshot = await self._write_status(snapshot, resource, policy, observation, decision)
        look = Look(key, snapshot, policy, observation, decision)
        self._telemetry.looked(look)
        with self._timed("record"):
            await self._record(snapshot, decision)
        with self._timed("act"):
            await self._act(snapshot, decision.actions)
        return look

    async def _refuse(self, snapshot: Snapshot, error: ManifestError) -> None:
        """Tell on the resource what is wrong with it, and leave what runs as it is."""
        before = snapshot.manifest.get("status") or {}
        after = invalid_status(snapshot, error, self._clock())
        if after != before:
            await self._cluster.write_status(snapshot, after)
            for event in events.transitions(before, after, ()):
                await self._cluster.event(snapshot, event.kind, event.reason, event.message)

    async def _roll_out(
        self, snapshot: Snapshot, resource: KVCacheDeployment, base: Mapping[str, Any]
    ) -> Snapshot:
        """Apply the owned objects once per generation of the spec, and when one of them is gone or not ours
        any more; replicas follow ``spec.replicas``."""
        seen = (snapshot.manifest["metadata"].get("uid"), snapshot.manifest["metadata"].get("generation"))
        lost = snapshot.promoted is None or snapshot.replicas is None or snapshot.token_lost
        if self._rolled_out.get(snapshot.key) != seen or lost:
            config = Promoted(1, base)
            if (promoted := snapshot.promoted) is not None:
                # Before the workload: a pod that it starts at once must find the new cold fields.
                config = replace(promoted, config=with_cold(promoted.config, base))
                if config != promoted:
                    await self._cluster.write_config(snapshot, config)
            self._rolled_out[snapshot.key] = seen  # before: what is deleted meanwhile is applied once more
            try:
                await self._cluster.roll_out(snapshot, config)
            except BaseException:
                self.forget(snapshot.key)
                raise
            snapshot = await self._cluster.read(snapshot.key) or snapshot
        wanted = resource.spec.replicas
        if wanted is not None and snapshot.replicas not in (None, wanted) and not snapshot.autoscaler:
            await self._cluster.scale(snapshot, wanted)
            snapshot = replace(snapshot, replicas=wanted)
        if snapshot.replicas_managed_by and not snapshot.autoscaler and self._rival_is_done(snapshot):
            await self._cluster.own_replicas(snapshot)
            snapshot = replace(snapshot, replicas_managed_by="")
        return snapshot

    def _rival_is_done(self, snapshot: Snapshot) -> bool:
        """Whether the present conflict began ``RIVAL_S`` ago. Who insists writes again, and begins one."""
        for condition in (snapshot.manifest.get("status") or {}).get("conditions") or ():
            if (condition["type"], condition["status"]) == ("ActuatorConflict", "True"):
                since = from_rfc3339(condition["lastTransitionTime"])
                return self._clock() - since >= RIVAL_S * self._pace_scale
        return False

    async def _gather(
        self, snapshot: Snapshot, base: Mapping[str, Any], policy: Policy, state: TuningState
    ) -> Observation:
        now = self._clock()
        windows = {"short": policy.pace.short, "long": policy.pace.long}
        if state.change is not None and state.change.phase_since and state.phase is Phase.VERIFY:
            windows["verify"] = max(now - state.change.phase_since, policy.pace.short)
        engines, (samples, problem) = await asyncio.gather(
            self._describe(snapshot.pods), self._measure(snapshot.key, windows)
        )
        return Observation(
            at=now,
            pods=tuple(_pod(pod, engines.get(pod.uid), samples.get(pod.uid)) for pod in snapshot.pods),
            base=base,
            promoted=snapshot.promoted,
            replicas=snapshot.replicas or 0,
            replicas_managed_by=snapshot.replicas_managed_by,
            metrics_problem=problem,
            paused_by=snapshot.paused_by,
            boosts=snapshot.boosts,
            rolling_out=snapshot.rolling_out,
        )

    async def _describe(self, pods: tuple[Replica, ...]) -> dict[str, EngineView]:
        async def ask(pod: Replica) -> EngineView | None:
            try:
                told = await self._engines.describe(pod)
            except EngineError as error:
                log.warning("engine_not_described", pod=pod.name, error=str(error))
                return None
            return EngineView(
                instance=told.instance,
                generation=told.generation,
                epoch=told.epoch,
                config=told.config.model_dump(**DUMP),
                converging=told.converging,
                ceilings=told.ceilings,
            )

        asked = [pod for pod in pods if pod.ready and not pod.terminating]
        views = await asyncio.gather(*(ask(pod) for pod in asked))
        return {pod.uid: view for pod, view in zip(asked, views, strict=True) if view is not None}

    async def _measure(self, key: Key, windows: Mapping[str, float]) -> tuple[dict[str, Sample], str]:
        try:
            return (await self._metrics.samples({key: windows})).get(key, {}), ""
        except MetricsError as error:
            return {}, str(error)

    async def _write_status(
        self,
        snapshot: Snapshot,
        resource: KVCacheDeployment,
        policy: Policy,
        observation: Observation,
        decision: Decision,
    ) -> Snapshot:
        """Write the intent before anything is done, and only when something changed."""
        before = snapshot.manifest.get("status") or {}
        after = status_of(snapshot, resource, policy, observation, decision, before)
        if after == before:
            return snapshot
        written = await self._cluster.write_status(snapshot, after)
        for event in events.transitions(before, after, decision.records):
            await self._cluster.event(written, event.kind, event.reason, event.message)
        return written

    async def _act(self, snapshot: Snapshot, actions: tuple[Action, ...]) -> None:
        """Take the actions. One that fails is logged; the next look decides on what is true then."""
        pods = {pod.uid: pod for pod in snapshot.pods}
        pushes = [action for action in actions if isinstance(action, Push) and action.uid in pods]
        await asyncio.gather(*(self._push(pods[action.uid], action) for action in pushes))
        for action in actions:
            match action:
                case WriteConfig(generation, values):
                    await self._cluster.write_config(snapshot, Promoted(generation, values))
                case Scale(replicas, reason):
                    log.info("scale", resource=str(snapshot.key), replicas=replicas, reason=reason)
                    await self._cluster.scale(snapshot, replicas)
                case Push():
                    pass

    async def _push(self, pod: Replica, push: Push) -> None:
        patch = ConfigPatch(epoch=push.epoch, generation=push.generation, values=dict(push.values))
        try:
            report = await self._engines.apply(pod, patch)
        except EngineError as error:
            log.warning("push_failed", pod=pod.name, generation=push.generation, error=str(error))
            return
        log.info(
            "pushed",
            pod=pod.name,
            generation=report.generation,
            changed=report.changed,
            blocks_kept=report.blocks_kept,
            blocks_lost=report.blocks_lost,
        )

    async def _record(self, snapshot: Snapshot, decision: Decision) -> None:
        """Before the actions, as one that fails ends the look: what was decided is told all the same.

        A record that cannot be kept now holds no action up, and is kept at a later look.
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
            self._unrecorded[snapshot.key] = tuple(waiting[-MOST_RECORDS:])

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._telemetry.step(name, time.perf_counter() - started)


DUMP: dict[str, Any] = {"by_alias": True, "exclude_unset": True, "mode": "json"}
"""How a configuration is written everywhere: camelCase, and only what was given."""


def _pod(replica: Replica, engine: EngineView | None, sample: Sample | None) -> Pod:
    return Pod(
        uid=replica.uid,
        name=replica.name,
        ready=replica.ready,
        terminating=replica.terminating,
        pending_reason=replica.pending_reason,
        created_at=replica.created_at,
        restarts=replica.restarts,
        engine=engine,
        sample=sample,
    )
