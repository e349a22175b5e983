"""What must be true of every effect of the operator, and of the deployment after every reconcile.

Decisions are held to ``tests.operator.tuning.invariants``. What is checked here needs the world: what is
written before what, what engines really run, and what a number or a promotion rests on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tests.operator.tuning.invariants import BY_OTHERS, TRYING, Invariants, Step

from kvpilot_engine.contract import ConfigPatch
from kvpilot_operator.status.codec import state_of
from kvpilot_operator.status.history import last_numbers
from kvpilot_operator.status.model import Status
from kvpilot_operator.status.snapshot import Replica, Snapshot
from kvpilot_operator.tuning.configuration import KNOBS, effective, value, within
from kvpilot_operator.tuning.decision import Record, Scale, WriteConfig
from kvpilot_operator.tuning.observation import Promoted
from kvpilot_operator.tuning.state import Phase, TuningState

if TYPE_CHECKING:
    from tests.operator.reconcile.deployment import Deployment

NEARLY_ALL = 0.9
"""Share of the ready replicas whose truth must be seen for a scale-in."""


class Effects:
    """Checks one deployment. The first failure is kept, and raised after the reconcile: nobody can catch it.

    Attributes:
        intent: the status that the operator goes by: what it read, or wrote after that.
        names: the tuned knobs that each generation names.
        lost: the status was lost since the operator last read it.
    """

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._failure: AssertionError | None = None
        self._step: Step | None = None
        self._done: Step | None = None
        self.invariants = Invariants()
        self.intent = Status()
        self.names: dict[int, dict[str, Any]] = {}
        self.recorded: set[tuple[str, str]] = set()
        self.stopped = 0
        self.lost = False
        self.pinned: Counter[str] = Counter()

    def raise_failure(self) -> None:
        """Raise what was found."""
        if self._failure is not None:
            raise self._failure

    def _that(self, holds: bool, message: str) -> None:
        if not holds and self._failure is None:
            self._failure = AssertionError(message)

    @property
    def _state(self) -> TuningState:
        return state_of(self.intent)

    # Decisions

    def read(self, snapshot: Snapshot) -> None:
        """The operator begins with what is there."""
        if self.lost:
            self.lost = False
            self._forget()
        self.intent = snapshot.status
        self._step = self._done = None

    def decided(self, step: Step) -> None:
        """It counts when its status is there."""
        self._step = step

    def committed(self) -> None:
        """The status of the last decision is there."""
        step, self._step = self._step, None
        if step is None:
            return
        self._done = step
        self.recorded |= {(record.id, record.outcome) for record in step.decision.records}
        try:
            self.invariants.check(step)
        except AssertionError as error:
            self._failure = self._failure or error
        self._deployment.count(step)

    def _forget(self) -> None:
        """The status was lost: numbers that neither records nor engines nor ConfigMap tell are free again."""
        cluster = self._deployment.cluster
        decision, generation = last_numbers([asdict(record) for record in cluster.records])
        known = self._reachable()
        epoch = max((engine.epoch for engine in known), default=0)
        promoted = cluster.promoted.generation if cluster.promoted is not None else 0
        last = max([generation, promoted + epoch, *(engine.generation for engine in known)])
        self.invariants.forget()
        names = self.invariants.configs
        self.invariants.configs = {number: held for number, held in names.items() if number <= last}
        self.names = {number: held for number, held in self.names.items() if number <= last}
        started = self.invariants.started
        self.invariants.started = {name for name in started if int(name.removeprefix("d-")) <= decision}

    # Effects

    def before(self, write: str, *given: Any) -> None:
        """Judge an effect that is about to be there."""
        if (check := getattr(self, f"_before_{write}", None)) is not None:
            check(*given)

    def after(self, write: str, *given: Any) -> None:
        """Note an effect that is there."""
        self._deployment.took[write] += 1
        if write == "write_status":
            before = self._state
            (self.intent,) = given
            after = self._state
            self._that(after.epoch >= before.epoch, "an epoch never decreases")
            self._that(after.last_generation >= before.last_generation, "a generation is never forgotten")
            self.committed()

    def _before_apply(self, replica: Replica, patch: ConfigPatch) -> None:
        """A push is announced by the status: its epoch, and whose candidate it is."""
        state, promoted = self._state, self._deployment.cluster.promoted
        change = state.change
        self._that(patch.epoch == state.epoch, f"pushed with epoch {patch.epoch}, announced is {state.epoch}")
        self._named(patch.generation, patch.values)
        if promoted is not None and patch.generation == promoted.generation:
            return
        announced = change is not None and change.generation == patch.generation
        self._that(announced, f"generation {patch.generation} is pushed, and no status announces it")
        if announced and change is not None and state.phase in TRYING:
            self._that(replica.uid in change.candidates, f"{replica.name} is no canary")

    def _before_write_config(self, config: Promoted) -> None:
        """The ConfigMap gets what the status announces, and a change of the tuner only with its evidence."""
        promoted, state = self._deployment.cluster.promoted, self._state
        if promoted is None:
            return
        self._that(config.generation >= promoted.generation, "the ConfigMap's generation never decreases")
        self._named(config.generation, config.config)
        if config.generation == promoted.generation:
            return
        self._that(
            config.generation in {state.last_generation, state.change and state.change.generation},
            f"generation {config.generation} is written, and no status announces it",
        )
        change = state.change
        if change is not None and change.generation == config.generation and state.phase is Phase.PROMOTE:
            ends = {(item.id, item.outcome) for item in self.intent.decisions}
            proven = {(change.id, "Promoted"), (change.id, "Reverted")} & ends
            self._that(bool(proven), f"{change.id} is promoted without a decision that tells why")

    def _before_scale(self, replicas: int) -> None:
        """Replicas are scaled from the number that there is, and in only while nearly all show the truth."""
        deployment, step = self._deployment, self._done
        cluster = deployment.cluster
        if step is None:
            self._that(False, "scaled without a decision")
            return
        scale = next(a for a in step.decision.actions if isinstance(a, Scale))
        seen = step.observation.desired_replicas
        self._that(
            seen == cluster.desired_replicas or deployment.resized, f"{seen} is not what is asked for now"
        )
        scalings = [record for record in step.decision.records if record.replicas is not None]
        self._that(
            all(item.replicas == (seen, replicas) for item in scalings if item.rule == scale.reason),
            f"scaled to {replicas}, which is not what was recorded",
        )
        if replicas < cluster.desired_replicas and scale.reason not in BY_OTHERS:
            ready = cluster.ready(cluster.now)
            shown = [engine for engine in ready if not deployment.hides(engine)]
            self._that(
                cluster.metrics_problem is None and len(shown) >= NEARLY_ALL * len(ready),
                f"scaled in while {len(shown)} of {len(ready)} replicas can be seen",
            )

    def _before_take_over_replicas(self, replicas: int) -> None:
        self._that(bool(self._deployment.other_manager), "there is nothing to take over")

    def _before_record(self, record: Record) -> None:
        """A record tells of what a status holds."""
        self._that(
            (record.id, record.outcome) in self.recorded, f"{record.id} is recorded before it is written"
        )
        if record.outcome == "Promoted":
            self._that(len(record.evidence) > 1, f"{record.id} is promoted without evidence")

    def _named(self, generation: int, values: Mapping[str, Any]) -> None:
        """A generation names one configuration of the knobs for ever."""
        known = self.names.setdefault(generation, {})
        hot = {name: item for name, item in values.items() if name in KNOBS}
        differ = {name: (known[name], item) for name, item in hot.items() if known.get(name, item) != item}
        self._that(not differ, f"generation {generation} names two configurations: {differ}")
        known.update(hot)

    # The deployment after a reconcile that failed nowhere

    def reconciled(self) -> None:
        """Judge what there is once the operator came through."""
        deployment, state = self._deployment, self._deployment.state
        promoted, step = deployment.cluster.promoted, self._done
        if promoted is None or step is None:
            return
        self._pinned(step, promoted)
        if any(isinstance(action, WriteConfig) for action in step.decision.actions):
            return  # engines get it at the next reconcile
        self._runs_what_it_should(promoted, state)
        self._stops(step, promoted, state)

    def _runs_what_it_should(self, promoted: Promoted, state: TuningState) -> None:
        """An engine that answers runs the ConfigMap's configuration, the candidate, or what is taken back."""
        change = state.change
        known = {promoted.generation, *((change.generation,) if change is not None else ())}
        for engine in self._reachable():
            self._that(
                engine.generation in known, f"{engine.name} runs generation {engine.generation} of {known}"
            )

    def _stops(self, step: Step, promoted: Promoted, state: TuningState) -> None:
        """A pause, a mode that does not act, an invalid spec or the kill switch leaves no candidate."""
        seen, change = step.observation, state.change
        unapproved = step.policy.mode == "Approve" and change is not None and not change.approved_by
        stop = seen.fleet.off or seen.paused_by or seen.spec_error or not step.policy.acts or unapproved
        self.stopped = self.stopped + 1 if stop else 0
        if self.stopped < 3:
            return
        rolling = state.phase in {Phase.PROMOTE, Phase.EMERGENCY} and not seen.fleet.off
        self._that(state.phase not in TRYING, "a candidate stays although tuning is stopped")
        if rolling:
            return
        for engine in self._reachable():
            self._that(
                engine.generation == promoted.generation,
                f"{engine.name} still runs a candidate although tuning is stopped",
            )

    def _pinned(self, step: Step, promoted: Promoted) -> None:
        """A pinned knob has its value soon, unless the pin was refused."""
        pins = [pin for pin in step.observation.pins if pin.name not in step.decision.state.handled]
        self.pinned = Counter({pin.name: self.pinned[pin.name] + 1 for pin in pins})
        for pin in pins:
            held = value(promoted.config, pin.knob)
            self._that(
                held == pin.value or self.pinned[pin.name] < 3, f"{pin.knob} is {held}, pinned at {pin.value}"
            )

    def _reachable(self) -> list[Any]:
        """Engines that were asked and take what is pushed."""
        deployment = self._deployment
        return [
            engine
            for engine in deployment.cluster.ready(deployment.cluster.now)
            if not deployment.fault_of(engine.uid, ("unreachable", "refuses"))
        ]

    def assert_settled(self) -> None:
        """At rest the ConfigMap holds the user's base with what is tuned over it, within the bounds."""
        deployment, step = self._deployment, self._done
        promoted, state = deployment.promoted, deployment.state
        assert effective(deployment.base, state.overlay) == promoted.config, (state.overlay, promoted)
        assert step is not None
        for entry in state.overlay:
            assert within(step.policy.bounds.get(entry.knob), entry.value), entry
        scaling, asked = step.policy.scaling, deployment.cluster.desired_replicas
        least, most = (scaling.minimum, scaling.maximum) if scaling is not None else (asked, asked)
        assert least <= asked <= most, f"{asked} replicas, allowed are {least} to {most}"
        if scaling is None:
            assert asked == deployment.spec["replicas"]
