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
from kvpilot_operator.tuning.experiment.ends import TAKEN_BACK
from kvpilot_operator.tuning.observation import Promoted
from kvpilot_operator.tuning.state import PIN, OverlayEntry, Phase, TuningState

if TYPE_CHECKING:
    from tests.operator.reconcile.deployment import Deployment

NEARLY_ALL = 0.9
"""Share of the ready replicas whose truth must be seen for a scale-in."""

SOON = 3
"""Reconciles that come through until what was asked for is done: one that decides, one that acts, one that
sees it."""

ASKED_FOR = frozenset({"RolledBack", "Pinned", "Unpinned"})
"""Outcomes of what an override asks for: they may replace every tuned value."""


class StateReader:
    """``state_of``, which reads the same status once, however often it is asked."""

    def __init__(self) -> None:
        self._last: tuple[Status | None, TuningState] = None, TuningState()

    def __call__(self, status: Status) -> TuningState:
        if status is not self._last[0]:
            self._last = status, state_of(status)
        return self._last[1]


class Effects:
    """Checks one deployment. The first failure is kept, and raised after the reconcile: nobody can catch it.

    Attributes:
        intent: the status that the operator goes by: what it read, or wrote after that.
        names: the tuned knobs that each generation names.
        lost: the status was lost since the operator last read it.
        least: the least epoch, generation and next decision of the first status after that one.
        tuned: the overlay of the last status, without pins, by knob.
        base: the user's base in the last decision whose status was written.
        rolled_out: the spec generation whose objects were applied last.
        managed_since: when the operator first saw the other manager of the replicas; None without one.
        overdue: for how many reconciles something has been owed.
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
        self.lost = False
        self.least = (0, 0, 0)
        self.tuned: dict[str, OverlayEntry] = {}
        self.base: Mapping[str, Any] = {}
        self.rolled_out = 0
        self.managed_since: float | None = None
        self.overdue: Counter[str] = Counter()
        self._unwritten = False
        self._state_of = StateReader()

    def raise_failure(self) -> None:
        """Raise what was found."""
        if self._failure is not None:
            raise self._failure

    def _that(self, holds: bool, message: str) -> None:
        if not holds and self._failure is None:
            self._failure = AssertionError(message)

    @property
    def _state(self) -> TuningState:
        """What the intent says."""
        return self._state_of(self.intent)

    # Decisions

    def read(self, snapshot: Snapshot) -> None:
        """The operator begins with what is there."""
        if self.lost:
            self.lost = False
            self._forget()
        self.intent = snapshot.status
        self._step = self._done = None
        self._unwritten = False

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
        self._remembers(step)
        self._managed(step)
        self._deployment.count(step)

    def _remembers(self, step: Step) -> None:
        """What was tuned outlives the status: the ConfigMap tells it."""
        before, after, seen = step.before, step.decision.state, step.observation
        kept = {entry.knob: entry.value for entry in after.overlay if not entry.pinned}
        asked = ASKED_FOR & {record.outcome for record in step.decision.records}
        if not before.last_generation and seen.promoted is not None and not asked:
            pinned = {pin.knob for pin in seen.pins}
            for knob, entry in self.tuned.items():
                stays = seen.base.get(knob) == entry.based_on and knob not in pinned
                holds = seen.promoted.config.get(knob) == entry.value
                if stays and holds and within(step.policy.bounds.get(knob), entry.value):
                    self._that(
                        kept.get(knob) == entry.value,
                        f"{knob}, tuned to {entry.value}, is forgotten with the status",
                    )
            for entry in (entry for entry in after.overlay if not entry.pinned):
                mine = entry.based_on != seen.base.get(entry.knob) or entry.based_on == self.base.get(
                    entry.knob
                )
                self._that(mine, f"{entry.knob}, edited by the user, is taken for a tuned value")
        self.tuned = {entry.knob: entry for entry in after.overlay if not entry.pinned}
        self.base = seen.base

    def _managed(self, step: Step) -> None:
        if not step.observation.replicas_managed_by:
            self.managed_since = None
        elif self.managed_since is None:
            self.managed_since = step.observation.at

    def _forget(self) -> None:
        """The status was lost: numbers that neither records nor engines nor ConfigMap tell are free again."""
        self.managed_since = None
        cluster = self._deployment.cluster
        decision, generation = last_numbers([asdict(record) for record in cluster.records])
        known = self._reachable()
        epoch = max((engine.epoch for engine in known), default=0)
        promoted = cluster.promoted.generation if cluster.promoted is not None else 0
        last = max([generation, promoted + epoch, *(engine.generation for engine in known)])
        self.least = (epoch, last, decision + 1)
        self.invariants.forget()
        names = self.invariants.configs
        self.invariants.configs = {number: held for number, held in names.items() if number <= last}
        self.names = {number: held for number, held in self.names.items() if number <= last}
        started = self.invariants.started
        self.invariants.started = {name for name in started if int(name.removeprefix("d-")) <= decision}

    # Effects

    def before(self, write: str, *given: Any) -> None:
        """Judge an effect that is about to be there."""
        self._that(not self._unwritten, f"{write} follows a status that was not written")
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
            if self.intent.tuning is not None:  # a refused spec leaves the rest of the status as it is
                self._begins_where_it_was(after)
            self._ends(before, after)
            self.committed()

    def _begins_where_it_was(self, after: TuningState) -> None:
        """After a lost status, numbers go on from what engines, ConfigMap and records tell."""
        numbers = (after.epoch, after.last_generation, after.next_decision)
        for name, least, number in zip(("epoch", "generation", "decision"), self.least, numbers, strict=True):
            self._that(number >= least, f"the {name} begins again at {number}, and was at {least}")
        self.least = (0, 0, 0)

    def _ends(self, before: TuningState, after: TuningState) -> None:
        """What began has an end that is told."""
        if (change := before.change) is None or before.phase in {
            Phase.REVERT,
            Phase.PROMOTE,
            Phase.EMERGENCY,
        }:
            return
        same = after.change is not None and after.change.id == change.id
        told = any(item.id == change.id and item.outcome != "Started" for item in self.intent.decisions)
        self._that(same or told, f"{change.id} is no longer in flight, and nothing tells why")

    def failed(self, write: str) -> None:
        """An effect is not there, or the operator cannot know it: then it must not act on it."""
        self._unwritten = self._unwritten or write == "write_status"

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
        if change is not None and change.generation == config.generation and change.verdict != TAKEN_BACK:
            off = self._deployment.off
            self._that(not off, f"{change.id} is written to the ConfigMap although the kill switch is on")
        if change is not None and change.generation == config.generation and state.phase is Phase.PROMOTE:
            ends = {(item.id, item.outcome) for item in self.intent.decisions}
            proven = {(change.id, "Promoted"), (change.id, "Reverted")} & ends
            self._that(bool(proven), f"{change.id} is promoted without a decision that tells why")

    def _before_roll_out(self, config: Promoted) -> None:
        """A ConfigMap that was lost comes back under a number of its own, or as what that number names."""
        if self._deployment.cluster.promoted is None:
            self._named(config.generation, config.config)

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
        if (step := self._done) is not None:
            since = step.observation.at if self.managed_since is None else self.managed_since
            waited = step.observation.at - since + 1  # the status counts whole seconds
            self._that(
                waited >= step.policy.pace.takeover,
                f"the replicas are taken over after {waited:.0f} s already",
            )

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
        cluster, step = deployment.cluster, self._done
        promoted = cluster.promoted
        if promoted is None:
            return
        self._that(
            step is not None or cluster.accepted is None, "nothing is decided, though a spec is accepted"
        )
        if step is None:
            return
        self._obeys_pins(step, promoted)
        if any(isinstance(action, WriteConfig) for action in step.decision.actions):
            return  # engines get it at the next reconcile
        self._obeys_the_spec(promoted, state)
        self._runs_what_it_should(promoted, state)
        self._stops(step, promoted, state)

    def _soon(self, holds: bool, debt: str, message: str) -> None:
        """Something is done within ``SOON`` reconciles from when it is owed."""
        self.overdue[debt] = 0 if holds else self.overdue[debt] + 1
        self._that(self.overdue[debt] < SOON, message)

    def _obeys_the_spec(self, promoted: Promoted, state: TuningState) -> None:
        """A valid spec is rolled out; the ConfigMap holds its configuration with what is tuned over it."""
        deployment = self._deployment
        if deployment.refused:
            return
        wanted = effective(deployment.base, state.overlay)
        differ = sorted(
            name for name in {*wanted, *promoted.config} if wanted.get(name) != promoted.config.get(name)
        )
        self._soon(not differ, "base", f"the user's {', '.join(differ)} is not in the ConfigMap")
        generation = deployment.cluster.snapshot().spec_generation
        self._that(
            self.rolled_out == generation, f"the objects of spec generation {generation} are not applied"
        )

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
        deployment, change = self._deployment, state.change
        unapproved = step.policy.mode == "Approve" and change is not None and not change.approved_by
        why = (
            ("the kill switch is on" if deployment.off else "")
            or ("tuning is paused" if deployment.asked().paused_by else "")
            or ("the spec is invalid" if deployment.refused else "")
            or (f"the mode is {step.policy.mode}" if unapproved or not step.policy.acts else "")
        )
        rolling = state.phase in {Phase.PROMOTE, Phase.EMERGENCY} and not deployment.off
        strays = [engine.name for engine in self._reachable() if engine.generation != promoted.generation]
        stays = state.phase in TRYING or (bool(strays) and not rolling)
        where = f" on {', '.join(strays)}" if strays else ""
        self._soon(not (why and stays), "stop", f"a candidate stays{where} although {why}")

    def _obeys_pins(self, step: Step, promoted: Promoted) -> None:
        """A pinned knob has its value soon, unless the pin was refused, and has it no longer when it ends."""
        state, pins = step.decision.state, self._deployment.asked().pins
        for pin in pins:
            held = value(promoted.config, pin.knob)
            obeyed = held == pin.value or pin.name in state.handled
            self._soon(obeyed, f"{PIN}{pin.name}", f"{pin.knob} is {held}, pinned at {pin.value}")
        names = {f"{PIN}{pin.name}" for pin in pins}
        ended = [entry for entry in state.overlay if entry.pinned and entry.decision not in names]
        told = ", ".join(f"{entry.knob} at {entry.value}" for entry in ended)
        self._soon(not ended, "unpin", f"a pin that has ended still holds {told}")

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
