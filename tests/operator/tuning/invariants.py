"""What must be true of every decision, whatever was observed: the properties of ``decide``.

They read observations, states and decisions only, so the histories of worlds, the real reconciler and the
planted mutants are all judged by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, inf
from typing import Any

from kvpilot_engine.contract.metrics import Stage
from kvpilot_operator.tuning.assess.guards import DAY, SIX_HOURS
from kvpilot_operator.tuning.assess.trust import trust
from kvpilot_operator.tuning.configuration import KNOBS
from kvpilot_operator.tuning.context import Context
from kvpilot_operator.tuning.decide import assess
from kvpilot_operator.tuning.decision import Decision, Push, Record, Scale, TakeOverReplicas, WriteConfig
from kvpilot_operator.tuning.experiment.canary import PUSH_LIMIT
from kvpilot_operator.tuning.experiment.ends import TAKEN_BACK
from kvpilot_operator.tuning.observation import Observation
from kvpilot_operator.tuning.policy import Policy
from kvpilot_operator.tuning.rules.order import REMEDIES
from kvpilot_operator.tuning.rules.signals import Move
from kvpilot_operator.tuning.sizing import needed_replicas
from kvpilot_operator.tuning.state import Phase, TuningState

TRYING = frozenset({Phase.CANARY, Phase.SETTLE, Phase.VERIFY})
TUNED = frozenset({"Started", "Emergency", "ScaledOut", "ScaledIn", "Promoted"})
"""Outcomes of what the tuner does by itself."""

DECLARED = {remedy.name: {move.knob: move.way for move in remedy.moves} for remedy in REMEDIES}
"""Knobs that each rule declares to move, and which way."""

CURES = {remedy.name: set(remedy.cures) for remedy in REMEDIES}

AT_FAULT = {
    Stage.ADMISSION_WAIT: "admission wait",
    Stage.PREEMPTED: "admission wait",
    Stage.BATCH_WAIT: "batch wait",
    Stage.TIER_LOAD: "tier load",
    Stage.PREFILL: "time in work",
    Stage.DECODE: "time in work",
}
"""The signal that is the worse where a stage is at fault."""

BY_OTHERS = frozenset({"replicas-bounds", "spec-replicas", "boost", "boost-decay"})
"""Rules that keep replicas where the user or an override wants them."""

RELIEVES = frozenset(remedy.name for remedy in REMEDIES if "memory" in remedy.cures)
"""Rules that need only trusted replicas that show the need."""

SURPLUS_PART = 0.5
"""At most this share of the surplus goes at once."""

EMERGENCY = 0.95
"""Memory ratio from which on something is made everywhere without a proof."""

NEEDED = needed_replicas
"""As it is, whatever a mutant makes of it."""


@dataclass(frozen=True)
class Step:
    """One decision and what it was made of."""

    observation: Observation
    before: TuningState
    policy: Policy
    decision: Decision

    def __deepcopy__(self, memo: dict[int, Any]) -> Step:
        """Nothing changes it, so the copies of a world share it."""
        return self


@dataclass
class Invariants:
    """Checks the decisions on one resource, one after the other.

    Attributes:
        steps: those of the last look-back, oldest first.
        configs: the configuration that each generation names.
        blocked: values that failed, and until when they may not be tried.
        reverted: knobs of reverted changes, and when.
        started: decisions that began an experiment.
    """

    steps: list[Step] = field(default_factory=list)
    configs: dict[int, dict[str, Any]] = field(default_factory=dict)
    blocked: dict[tuple[str, Any], float] = field(default_factory=dict)
    reverted: list[tuple[str, float]] = field(default_factory=list)
    started: set[str] = field(default_factory=set)
    tried_s: float = 0.0
    unseen_s: float = 0.0

    def forget(self) -> None:
        """The status was lost, and with it what was blocked. Numbers are not used again."""
        self.blocked.clear()
        self.reverted.clear()

    def check(self, step: Step) -> None:
        """Check one decision.

        Raises:
            AssertionError: it must not be.
        """
        self.steps = [one for one in self.steps if one.observation.at <= step.observation.at]
        keep = step.observation.at - 2 * step.policy.pace.idle
        self.steps = [*(one for one in self.steps if one.observation.at > keep), step]
        assert_state_grows(step)
        assert_one_change(step)
        assert_permitted(step)
        self._ends_in_time(step)
        assert_capacity_is_added(step)
        self._scales(step)
        self._pushes(step)
        self._values(step)

    def _ends_in_time(self, step: Step) -> None:
        """No candidate is tried for ever: four verify times, and four settle times for each of two pushes.

        While its arms cannot be observed it waits, but no longer than twice as long. A time in which nobody
        looks counts little.
        """
        change, pace = step.decision.state.change, step.policy.pace
        trying = change is not None and step.decision.state.phase in TRYING
        last = self.steps[-2].observation.at if len(self.steps) > 1 else step.observation.at
        known = change is not None and step.before.change is not None and step.before.change.id == change.id
        gap = min(max(0.0, step.observation.at - last), 2 * pace.short)
        unseen = change is not None and change.unseen_since > 0
        self.tried_s = self.tried_s + gap * (not unseen) if trying and known else 0.0
        self.unseen_s = self.unseen_s + gap * unseen if trying and known else 0.0
        assert self.tried_s <= 4 * pace.verify + 8 * pace.settle, "it is tried for too long"
        assert self.unseen_s <= 8 * pace.verify, "it is waited for too long"
        if unseen and change is not None and trying:
            seen = {replica.uid for replica in context_of(step).ready}
            few = 2 * len(seen & change.others) < len(change.others)
            assert few or not change.candidates <= seen, "its arms are observed"

    def _scales(self, step: Step) -> None:
        seen, scales = step.observation, [a for a in step.decision.actions if isinstance(a, Scale)]
        assert len(scales) <= 1
        for scale in scales:
            if step.policy.scaling is None:
                assert scale.replicas == seen.spec_replicas, "the user fixes the number"
                continue
            assert step.policy.scaling.minimum <= scale.replicas <= step.policy.scaling.maximum, "bounds"
            assert not seen.replicas_managed_by, "another manager writes them"
            if scale.replicas < seen.desired_replicas and scale.reason not in BY_OTHERS:
                self._scales_in(step, scale)
        for action in step.decision.actions:
            if isinstance(action, TakeOverReplicas):
                assert action.replicas == seen.desired_replicas and seen.replicas_managed_by

    def _scales_in(self, step: Step, scale: Scale) -> None:
        asked, idle = step.observation.desired_replicas, step.policy.pace.idle
        assert step.before.change is None and step.decision.state.change is None, "no scale-in meanwhile"
        assert asked == len(step.observation.ready), "no scale-in while the number is not there"
        back = [one for one in self.steps if one.observation.at > step.observation.at - idle]
        contexts = [context_of(one) for one in back]
        needs = [NEEDED(context, one.decision.state) for context, one in zip(contexts, back, strict=True)]
        for context in contexts:
            assert context.trust.too_few is None, "no scale-in without data, during the whole look-back"
            breached = [item.name for item in context.objectives if item.state == "Breached"]
            assert not breached, "no scale-in while an objective is breached"
        assert step.policy.scaling is not None
        most = max(step.policy.scaling.minimum, *needs, 1)
        assert most <= scale.replicas, "what was needed during the look-back stays"
        assert asked - scale.replicas <= ceil((asked - most) * SURPLUS_PART), "a part of the surplus"

    def _pushes(self, step: Step) -> None:
        promoted, state = step.observation.promoted, step.decision.state
        engines = [r.engine for r in step.observation.replicas if r.engine is not None]
        if promoted is not None:
            self._names(promoted.generation, promoted.config)
        for action in step.decision.actions:
            if isinstance(action, Push | WriteConfig):
                self._names(action.generation, action.values)
                # An engine that lags gets what the ConfigMap holds, also while that is being replaced.
                if promoted is None or action.generation != promoted.generation:
                    assert_in_bounds(step, action.values)
            if isinstance(action, WriteConfig):
                assert_ready_to_be_written(step, action)
            if isinstance(action, Push):
                assert action.epoch == state.epoch, "the epoch of the state"
                assert action.epoch >= max(engine.epoch for engine in engines), "no engine refuses it"
                assert_pushed_to_whom_it_concerns(step, action)

    def _names(self, generation: int, values: Mapping[str, Any]) -> None:
        """A generation names one configuration for ever."""
        known = self.configs.setdefault(generation, {})
        hot = {name: item for name, item in values.items() if name in KNOBS}
        differ = {name: (known[name], item) for name, item in hot.items() if known.get(name, item) != item}
        assert not differ, f"generation {generation} is used again: {differ}"
        known.update(hot)

    def _values(self, step: Step) -> None:
        now = step.observation.at
        for record in step.decision.records:
            if record.outcome == "Started":
                assert record.id not in self.started, f"{record.id} is used again"
                self.started.add(record.id)
            knob = record.changes[0].knob if record.changes else ""
            moved = {change.knob for change in record.changes}
            assert moved <= {*DECLARED.get(record.rule, moved)}, f"{record.rule} moves only what it declares"
            if record.outcome in {"Started", "Emergency"}:
                assert_moves_as_permitted(step, record)
            if record.outcome == "Started":
                tried = (knob, record.changes[0].after)
                assert self.blocked.get(tried, 0.0) <= now, f"{tried} failed less than a day ago"
                assert len(self._recent(knob, now)) < step.policy.reversals_per_knob_6h, "the flap budget"
            if record.outcome == "Reverted":
                self.reverted.append((knob, now))
                if record.evidence["verdict"] in {"Harmful", "NoGain"}:
                    self.blocked[knob, record.changes[0].after] = now + DAY

    def _recent(self, knob: str, now: float) -> list[float]:
        return [at for name, at in self.reverted if name == knob and now - SIX_HOURS < at <= now]


def context_of(step: Step) -> Context:
    """What the observation of a step shows."""
    return assess(step.observation, step.policy, step.observation.at)


def assert_state_grows(step: Step) -> None:
    """Numbers that fence and name never decrease; lists are bounded."""
    before, after = step.before, step.decision.state
    assert after.epoch >= before.epoch, "an epoch never decreases"
    assert after.last_generation >= before.last_generation, "a generation is never forgotten"
    assert after.next_decision >= before.next_decision
    assert len(after.holds) <= 5 and len(after.blocked_values) <= 16 and len(after.reversals) <= 16
    assert len(after.scale_down) <= 10 and len(after.reported) <= 16


def assert_one_change(step: Step) -> None:
    """One change in flight; a new one has its own epoch and generation."""
    before, after = step.before, step.decision.state
    started = [record for record in step.decision.records if record.outcome in {"Started", "Emergency"}]
    assert len(started) <= 1
    if after.change is None:
        assert after.phase not in {*TRYING, Phase.PROMOTE, Phase.REVERT, Phase.EMERGENCY}
        return
    assert after.change.generation <= after.last_generation
    assert after.change.epoch == after.epoch or step.before.change == after.change
    engines = [r.engine for r in step.observation.replicas if r.engine is not None]
    if before.change is None or before.change.generation != after.change.generation:
        assert after.epoch > before.epoch, "a new change fences off what an older one still pushes"
        assert after.epoch > max((engine.epoch for engine in engines), default=0), "no engine refuses it"
        assert after.change.generation > before.last_generation, "a new name"
        assert before.change is None or after.phase is Phase.EMERGENCY, "one change in flight"
        over = before.watch is None or before.watch.until <= step.observation.at
        own = after.change.verdict == TAKEN_BACK or after.phase is Phase.REVERT
        assert over or own or after.phase is Phase.EMERGENCY, "the last change is still watched"


def assert_permitted(step: Step) -> None:
    """Nothing is done by the tuner while it must not be."""
    seen, policy, after = step.observation, step.policy, step.decision.state
    found = trust(seen, policy)
    made = {record.outcome for record in step.decision.records if record.rule not in BY_OTHERS}
    if found.too_few is not None:
        assert "ScaledIn" not in made, "too few can be trusted"
        rules = {record.rule for record in step.decision.records if record.outcome == "Started"}
        assert rules <= RELIEVES, "too few can be trusted to tune"
    if "Promoted" in made and step.before.change is not None:
        trusted = {replica.uid for replica in found.trusted}
        others = step.before.change.others
        assert step.before.change.candidates <= trusted, "a candidate cannot be trusted"
        assert 2 * len(others & trusted) >= len(others), "most controls cannot be trusted"
    if found.nothing is not None or seen.paused_by or seen.spec_error:
        assert not made & TUNED, "no data, a pause or an invalid spec"
    approved = policy.mode == "Approve" and after.change is not None and bool(after.change.approved_by)
    if seen.paused_by or seen.spec_error or seen.rolling_out or not (policy.mode == "Auto" or approved):
        assert after.phase not in TRYING, "no candidate stays"
    if policy.mode == "Approve":
        assert "Started" not in made or approved, "nobody has approved it"
        asked = seen.approvals or any(item.approved_by for item in step.before.pending)
        assert not made & {"ScaledOut", "ScaledIn"} or asked, "nobody has approved the replicas"
    elif policy.mode != "Auto":
        assert not made & TUNED - {"Promoted"}, "the mode"
    if "Started" in made:
        assert step.before.cooldown_until <= seen.at, "the cooldown"
        started = next(record for record in step.decision.records if record.outcome == "Started")
        assert_has_a_cause(step, started)
    assert not policy.disabled_rules & {
        record.rule for record in step.decision.records if record.outcome in TUNED - {"Promoted"}
    }, "a disabled rule"
    if found.too_few is not None or seen.paused_by or seen.spec_error:
        assert after.holds, "nothing says why no change begins"
    since = {hold.reason: hold.since for hold in step.before.holds}
    for hold in after.holds:
        assert hold.since == since.get(hold.reason, seen.at), f"{hold.reason} holds since then"
    if "Emergency" in made:
        sampled = (replica.sample for replica in found.trusted)
        fullest = max(s.gauges.memory_ratio for s in sampled if s is not None)
        assert fullest >= EMERGENCY, "memory is not nearly exhausted"
    if step.before.change is not None and step.before.change.verdict == "Emergency":
        ends = {record.evidence.get("verdict") for record in step.decision.records}
        assert "PushFailed" not in ends, "an emergency stands where it was taken"


def assert_has_a_cause(step: Step, record: Record) -> None:
    """An experiment cures a breach; only waste needs none."""
    found = step.decision.diagnosis
    breached = [item.name for item in step.decision.objectives if item.state == "Breached"]
    assert breached or record.rule == "prefetch-down", record.summary
    if step.policy.mode != "Auto" or record.rule == "prefetch-down" or found is None:
        return  # approved, perhaps long after it was proposed
    signals = {AT_FAULT[Stage(found.stage)]} if found.stage else set()
    signals |= {"misses"} if "hitRate" in breached else set()
    signals |= {"memory"} if "memory" in breached else set()
    if "memory" in breached:
        leading = Move(record.changes[0].knob, DECLARED[record.rule][record.changes[0].knob])
        assert leading.effect("memory") <= 0, f"memory is over its limit: {record.summary}"
    assert signals & CURES[record.rule], f"{record.rule} cures nothing of {sorted(signals)}: {record.summary}"


def assert_moves_as_permitted(step: Step, record: Record) -> None:
    """A rule moves a knob the way that it declares, and only knobs that may be tuned that way."""
    for change in record.changes:
        limits = step.policy.bounds[change.knob]
        assert limits.tune, f"{change.knob} is excluded from tuning"
        if isinstance(change.after, str):
            continue
        before = inf if change.before is None else change.before  # without a limit
        way = "up" if change.after > before else "down"
        assert way == DECLARED[record.rule][change.knob], f"{record.rule} moves {change.knob} {way}"
        only = {"UpOnly": "up", "DownOnly": "down"}.get(limits.direction, way)
        assert way == only, f"{change.knob} may not go {way}"


def assert_capacity_is_added(step: Step) -> None:
    """While trusted replicas are saturated and serve badly, more are asked for: no other may forbid it."""
    seen, scaling, found = step.observation, step.policy.scaling, step.decision.diagnosis
    stopped = seen.paused_by or seen.spec_error or seen.fleet.off
    held = stopped or seen.replicas_managed_by or seen.metrics_problem
    if held or scaling is None or step.policy.mode != "Auto" or scaling.direction == "InOnly":
        return
    if found is None or not found.saturated or not found.stage or "replicas-up" in step.policy.disabled_rules:
        return
    inside = scaling.minimum <= seen.desired_replicas < scaling.maximum
    if not inside or seen.desired_replicas != len(seen.ready) or context_of(step).draining:
        return
    asked = [action.replicas for action in step.decision.actions if isinstance(action, Scale)]
    assert asked and asked[0] > seen.desired_replicas, "saturated, and nothing is added"


def assert_in_bounds(step: Step, values: Mapping[str, Any]) -> None:
    """What the tuner chose lies within the bounds; the user's own base and pins may lie outside."""
    pinned = {entry.knob: entry.value for entry in step.decision.state.overlay if entry.pinned}
    for name, limits in step.policy.bounds.items():
        item = values.get(name)
        others = (step.observation.base.get(name), pinned.get(name))
        if not isinstance(item, int | float) or item in others:
            continue
        assert limits.minimum is None or item >= limits.minimum, (name, item)
        assert limits.maximum is None or item <= limits.maximum, (name, item)


def assert_ready_to_be_written(step: Step, action: WriteConfig) -> None:
    """The ConfigMap gets a candidate only when every engine that answers runs it."""
    change = step.decision.state.change
    if change is None or action.generation != change.generation:
        return  # the user's edit, which the engines get afterwards
    assert step.decision.state.phase in {Phase.PROMOTE, Phase.EMERGENCY}, "promoted, or an emergency"
    running = {r.engine.generation for r in step.observation.ready if r.engine is not None}
    late = step.observation.at - change.phase_since > PUSH_LIMIT * step.policy.pace.settle
    stands = change.verdict in {TAKEN_BACK, "Emergency"} and late
    assert running <= {change.generation} or stands, "written before all run it"


def assert_pushed_to_whom_it_concerns(step: Step, action: Push) -> None:
    """The candidate goes to its canary, and from there on as it is proven; others get what is promoted."""
    change, phase, promoted = step.decision.state.change, step.decision.state.phase, step.observation.promoted
    if change is not None and action.generation == change.generation:
        if phase in TRYING:
            assert change.everywhere or action.uid in change.candidates, (
                "the candidate runs on the canary alone"
            )
        else:
            assert phase in {Phase.PROMOTE, Phase.EMERGENCY}
        return
    assert promoted is not None and action.generation == promoted.generation
    trying = change is not None and phase in TRYING
    assert not trying or change is None or not (change.everywhere or action.uid in change.candidates)
