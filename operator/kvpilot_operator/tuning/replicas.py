"""The number of replicas: up before the load needs them or where no knob helps, down by the look-back.

Replicas that are asked for count as capacity before they are ready, so a slow start never cascades.
"""

from __future__ import annotations

import math
from dataclasses import replace

from kvpilot_engine.contract.metrics import Stage
from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.assess.capacity import USE
from kvpilot_operator.tuning.assess.diagnosis import busy_share
from kvpilot_operator.tuning.assess.objectives import overflow
from kvpilot_operator.tuning.assess.outliers import COLD
from kvpilot_operator.tuning.context import Context, Draft, Found, Plan, Proposal
from kvpilot_operator.tuning.decision import Recycle, Scale, TakeOverReplicas
from kvpilot_operator.tuning.experiment.ends import TRIED, abort
from kvpilot_operator.tuning.experiment.evidence import CAPACITY
from kvpilot_operator.tuning.experiment.expectation import expect
from kvpilot_operator.tuning.observation import ObservedReplica
from kvpilot_operator.tuning.permission.modes import carry_out
from kvpilot_operator.tuning.policy import Scaling
from kvpilot_operator.tuning.price import price_of
from kvpilot_operator.tuning.sizing import (
    SCALED_IN,
    SCALED_OUT,
    foreseen_replicas,
    needed_replicas,
    planned_use,
    predicted_use,
    use_now,
)
from kvpilot_operator.tuning.state import MAX_MARKS, ReplicaMark, Strain, TuningState

SURPLUS_PART = 0.5
"""Share of the surplus that one scale-in removes, so that one low look-back cannot undo a peak's replicas."""

BOOST_DECAY = "boost-decay"
"""The rule that takes back what a boost added: no approval is needed for it."""

BOUNDS, FIXED = "replicas-bounds", "spec-replicas"
"""Rules that follow the user's bounds and ``spec.replicas``: they hold in every mode and are no tuning."""

RECYCLED = "outlier-recycle"
"""Key under which the state remembers that a replica was replaced."""

OVERFLOW = 1.05
"""Arrivals exceed completions by this factor in both windows: the queue grows or requests are shed."""

STRAIN_PART, MIN_USE, STRAINED = USE * USE, 0.4, 12
"""Where requests wait although the curve shows room, replicas are planned for this part of their present use,
but at least for that one, for so many look-backs."""

STEPS_PER_LOOK_BACK = 3
"""Scale-ins within one look-back, at most."""

GAP_PARTS, REPEAT_PARTS = 4, 8
"""Parts of the look-back: a gap between two marks of more than one of the first starts it again; the need is
marked once in each of the second."""


def keep_bounds(context: Context, draft: Draft) -> Draft:  # noqa: PLR0911 - one return per reason
    """Keep replicas where the user, an override or another field manager wants them, and mark the need."""
    scaling, seen = context.policy.scaling, context.observation
    draft = _take_over(context, draft)
    if scaling is None:
        return _follow_spec(context, _without_marks(draft))
    if seen.replicas_managed_by:
        message = f"{seen.replicas_managed_by} writes the replicas as well; kvpilot does not scale"
        return _without_marks(draft).held(context, reasons.FIELD_MANAGER_CONFLICT, message)
    if seen.scaling_paused:
        return draft
    if not scaling.minimum <= seen.desired_replicas <= scaling.maximum:
        above = seen.desired_replicas > scaling.maximum
        bound = scaling.maximum if above else scaling.minimum
        message = f"the {'maximum' if above else 'minimum'} is {bound}"
        message += f" ({scaling.limited_by})" if above and scaling.limited_by else ""
        return scale(context, draft, _sized(context, BOUNDS, bound, message))
    if context.policy.mode == "Off":
        return _without_marks(draft)
    floor = _floor(context, scaling)
    if floor > max(scaling.minimum, draft.state.boosted):
        draft = draft.with_state(boosted=floor)
    if seen.desired_replicas < floor:
        names = ", ".join(sorted(b.name for b in seen.boosts if b.min_replicas > scaling.minimum))
        boost = _sized(context, "boost", floor, f"override {names} asks for at least {floor}")
        return carry_out(context, draft, boost, (), scale, urgent=True)
    return _mark_need(context, draft, scaling, floor)


def replicas_up(context: Context, state: TuningState, plan: Plan) -> Found:
    """More replicas: the device is saturated, or the load outruns the deployment and no knob helps."""
    scaling, seen = context.policy.scaling, context.observation
    if scaling is None:
        return reasons.REPLICAS_FIXED, "spec.replicas fixes the number of replicas"
    if scaling.direction == "InOnly":
        return reasons.NOT_TUNABLE, "spec.scaling.direction is InOnly"
    if (moving := _moving(context, scaling)) is not None:
        return moving
    if seen.desired_replicas >= scaling.maximum:
        at_bound = reasons.AT_BOUND, f"the maximum is {scaling.maximum}"
        return (reasons.GPU_BUDGET, scaling.limited_by) if scaling.limited_by else at_bound
    knob_first = plan.canary is not None and plan.canary.ratio > 1
    foreseen = foreseen_replicas(context, state, knob_first=knob_first)
    if foreseen is not None and min(foreseen[0], scaling.maximum) > seen.desired_replicas:
        target, why = min(foreseen[0], scaling.maximum), foreseen[1]
        if context.serving_badly and context.diagnosis.saturated:
            why = f"{_saturation(context)}: {why}"
        return _tuned(context, state, "replicas-up", target, why)
    return _relieved(context, state, plan, scaling)


def _relieved(context: Context, state: TuningState, plan: Plan, scaling: Scaling) -> Found:
    """More replicas for a breach that no knob cures."""
    seen = context.observation
    if not context.serving_badly:
        return reasons.NOT_AT_FAULT, "no objective is breached that requests feel"
    if context.draining:
        return reasons.DRAINING, "the backlog is draining"
    ratio, use, strained = _overflow(context), 0.0, 0.0
    if context.diagnosis.saturated:
        why = _saturation(context)
    elif not _out_of_knobs(context, state, plan):
        return reasons.KNOBS_FIRST, "a knob promises relief or was changed a short while ago"
    elif ratio > OVERFLOW:
        why = f"arrivals are {ratio:.2f} times completions and no knob promises relief"
    elif context.diagnosis.stage in {Stage.ADMISSION_WAIT, Stage.BATCH_WAIT, Stage.PREEMPTED}:
        why = f"{context.diagnosis.message}, and no knob promises relief"
        use = _strained(context)
    else:
        return reasons.NOT_AT_FAULT, "completions keep up with arrivals and requests wait for no slot"
    # Sized by what the short window shows and compared with what is asked for: newer replicas are credited.
    ready = len(context.everyone) - sum(1 for replica in context.everyone if _is_new(context, replica))
    wanted = ratio / USE
    if use:
        strained = max(MIN_USE, STRAIN_PART * use)
        wanted = max(wanted, use / strained)
    target = min(math.ceil(ready * wanted - 1e-9), max(2 * ready, ready + 4), scaling.maximum)
    if target <= seen.desired_replicas:
        return reasons.REPLICAS_PENDING, "what the replicas that were asked for bring does not show yet"
    return replace(_tuned(context, state, "replicas-up", target, why), strained=strained)


def _strained(context: Context) -> float:
    """Share of the capacity that is in use while requests wait; 0 where that does not show.

    In a rise the mean is too low; and what ends within a short window after a backlog has waited in it, which
    the replicas had that are older than others.
    """
    ages = [item.sample.coverage_s for item in context.everyone if item.sample is not None]
    short = context.policy.pace.short
    drained = all(age >= 2 * short for age in ages)
    at_once = context.trust.all_new and max(ages) - min(ages) < short / 2
    return use_now(context) if not context.overloaded and (drained or at_once) else 0.0


def _is_new(context: Context, replica: ObservedReplica) -> bool:
    """True if it has served for less than a short window."""
    sample = replica.sample
    return sample is not None and sample.coverage_s < context.policy.pace.short


def _saturation(context: Context) -> str:
    busy = busy_share(context.short)
    return f"the device is saturated ({busy:.0%} of the time in steps, more rows gain little)"


def replicas_down(context: Context, state: TuningState, plan: Plan) -> Found:  # noqa: PLR0911 - per reason
    """One replica less when fewer were needed for the whole look-back, or a boost left one over."""
    scaling, marks = context.policy.scaling, state.scale_down
    if scaling is None:
        return reasons.REPLICAS_FIXED, "spec.replicas fixes the number of replicas"
    if (moving := _moving(context, scaling)) is not None:
        return moving
    if not marks:
        return reasons.NOT_AT_FAULT, "every replica is needed"
    if context.now < state.cooldown_until:
        return reasons.COOLDOWN, "the last change ended a short while ago"
    asked, floor = context.observation.desired_replicas, _floor(context, scaling)
    if floor == scaling.minimum and scaling.minimum < asked <= state.boosted:
        why = f"the boost has expired, and {marks[-1].replicas} would do for 1.15 times the load"
        return _tuned(context, state, BOOST_DECAY, asked - 1, why)
    idle, most = context.policy.pace.idle, max(mark.replicas for mark in marks)
    if context.now - marks[0].at < idle or most >= asked:
        return reasons.NOT_AT_FAULT, "every replica was needed a short while ago"
    why = f"{most} would have done for 1.15 times the load during the last {idle:g} s"
    target = max(most, asked - math.ceil((asked - most) * SURPLUS_PART))
    return _tuned(context, state, "replicas-down", target, why)


def scale(context: Context, draft: Draft, proposal: Proposal) -> Draft:
    """Ask for the proposed number; capacity goes before an experiment, which is aborted without a verdict."""
    if proposal.replicas is None:
        return draft
    asked, target = proposal.replicas
    if target > asked:
        draft = _without_marks(draft)
        change = draft.state.change
        # A change of capacity is proven in seconds and needs no fixed number of replicas.
        slow = change is not None and change.measure != CAPACITY
        if draft.state.phase in TRIED and slow:
            draft = abort(context, draft, reasons.SCALING_OUT, "capacity is added first")
    draft = draft.acting(Scale(target, proposal.rule, _first_to_go(context, asked - target)))
    draft = _with_strain(context, draft, proposal.strained)
    way, settle = SCALED_OUT if target > asked else SCALED_IN, context.policy.pace.settle
    key = f"{way}{asked}->{target}"
    if any(item.key == key and context.now - item.at < settle for item in draft.state.reported):
        return draft  # asked for a short while ago, and not observed yet
    draft = expect(context, draft, proposal, draft.next_id)
    return (
        draft.recorded(
            context,
            rule=proposal.rule,
            outcome="ScaledOut" if target > asked else "ScaledIn",
            summary=f"{proposal.sentence}; {proposal.summary}.",
            replicas=proposal.replicas,
            price=price_of(context, proposal),
            evidence={"why": proposal.message, **proposal.predicted},
        )
        .reporting(context, key)
        .with_state(cooldown_until=context.now + _pause(context, target > asked))
    )


def _with_strain(context: Context, draft: Draft, use: float) -> Draft:
    """Plan the replicas for no more than this use for a while."""
    if not use:
        return draft
    use = min(planned_use(draft.state), use)
    return draft.with_state(strain=Strain(use, context.now + STRAINED * context.policy.pace.idle))


def _first_to_go(context: Context, count: int) -> tuple[str, ...]:
    """Replicas whose loss costs least: outliers, those that cannot be measured, then the coldest."""
    apart = {item.uid for item in context.outliers}
    trusted = {replica.uid for replica in context.trust.trusted}

    def cost(replica: ObservedReplica) -> tuple[bool, bool, float]:
        held = replica.sample.gauges.cached_bytes if replica.sample is not None else 0.0
        return replica.uid not in apart, replica.uid in trusted, held

    return tuple(replica.uid for replica in sorted(context.everyone, key=cost)[: max(0, count)])


def recycle_outlier(context: Context, draft: Draft) -> Draft:
    """Replace one replica that differs by itself, where the user allows it; at most one per look-back.

    One with a cold cache is left to warm up: its replacement would be colder.
    """
    found = [item for item in context.outliers if item.clause != COLD]
    wanted = context.policy.recycle_outliers and context.policy.mode == "Auto" and found
    if not wanted or context.blocks or draft.state.change is not None or draft.acted:
        return draft
    if any(item.key == RECYCLED for item in draft.state.reported):
        return draft
    item = found[0]
    return (
        draft.acting(Recycle(item.uid))
        .recorded(
            context,
            rule="outlier-recycle",
            outcome="Recycled",
            summary=f"{item.name} is replaced: {item.clause}.",
        )
        .reporting(context, RECYCLED)
    )


def _pause(context: Context, out: bool) -> float:
    """Time after a scaling until the next one, s: until the windows show it; a scale-in lasts its drain."""
    pace = context.policy.pace
    return pace.short if out else pace.idle / STEPS_PER_LOOK_BACK


def _take_over(context: Context, draft: Draft) -> Draft:
    """Respect a number that another field manager wrote for a while, then own it, whatever it is by then."""
    seen = context.observation
    if not seen.replicas_managed_by or seen.autoscaler or seen.conflict_since is None:
        return draft
    if context.now - seen.conflict_since < context.policy.pace.takeover:
        return draft
    return draft.acting(TakeOverReplicas(seen.desired_replicas))


def _follow_spec(context: Context, draft: Draft) -> Draft:
    """``spec.replicas`` is obeyed in every mode and during a pause, but not against an autoscaler."""
    seen = context.observation
    if seen.spec_replicas is None or seen.spec_replicas == seen.desired_replicas or seen.autoscaler:
        return draft
    return draft.acting(Scale(seen.spec_replicas, FIXED))


def _floor(context: Context, scaling: Scaling) -> int:
    """The minimum, as boosts in force raise it."""
    boosts = [b.min_replicas for b in context.observation.boosts if b.expires_at > context.now]
    return min(scaling.maximum, max([scaling.minimum, *boosts]))


def _moving(context: Context, scaling: Scaling) -> tuple[str, str] | None:
    """Why the number is not chosen by need now, or None."""
    seen = context.observation
    if seen.replicas_managed_by:
        return reasons.FIELD_MANAGER_CONFLICT, f"{seen.replicas_managed_by} writes the replicas as well"
    if not _floor(context, scaling) <= seen.desired_replicas <= scaling.maximum:
        return reasons.REPLICAS_PENDING, "the number of replicas is being brought within its bounds"
    return None


def _sized(context: Context, rule: str, target: int, message: str) -> Proposal:
    return Proposal(rule, (), "", 0.0, message, replicas=(context.observation.desired_replicas, target))


def _tuned(context: Context, state: TuningState, rule: str, target: int, message: str) -> Proposal:
    """A number that the load asks for, and what should come of it."""
    prediction = predicted_use(context, state, target)
    return replace(_sized(context, rule, target, message), prediction=prediction)


def _out_of_knobs(context: Context, state: TuningState, plan: Plan) -> bool:
    """True if no knob promises relief, or none may be tried on the one replica there is."""
    if state.change is not None or context.now < state.cooldown_until:
        return False
    alone = len(context.ready) == 1 and context.policy.single_replica == "Recommend"
    return plan.canary is None or (alone and _overflow(context) > OVERFLOW)


def _overflow(context: Context) -> float:
    """Arrivals over what ends by itself, the smaller one of both windows; 1 at least.

    Replicas that have just begun to serve still have their first requests in flight: without a queue that is
    no overflow.
    """
    if context.trust.all_new and context.waiting <= len(context.ready):
        return 1.0
    return max(1.0, min(overflow(context.measured, window) for window in ("short", "long")))


def _mark_need(context: Context, draft: Draft, scaling: Scaling, floor: int) -> Draft:
    """Mark how many replicas are needed while fewer would do."""
    if context.blocks or scaling.direction == "OutOnly":
        return _without_marks(draft)
    seen = context.observation
    needed = min(scaling.maximum, max(floor, needed_replicas(context, draft.state)))
    disabled = "replicas-down" in context.policy.disabled_rules
    breached = any(item.state == "Breached" for item in context.objectives)
    if disabled or needed >= seen.desired_replicas or breached:
        boosted = draft.state.boosted if floor > scaling.minimum or breached else 0
        return _without_marks(draft).with_state(boosted=boosted)
    pending = len(context.everyone) != seen.desired_replicas
    if draft.state.change is not None or pending:
        return _without_marks(draft)
    return _marked(context, draft, needed)


def _marked(context: Context, draft: Draft, needed: int) -> Draft:
    """Remember the need, seldom enough that the status is not rewritten at every tick.

    A gap in the marks starts the look-back again: a time without observation was not idle. The newest mark
    that is older than the look-back stays, as it proves the beginning.
    """
    marks, idle = draft.state.scale_down, context.policy.pace.idle
    while len(marks) > 1 and marks[1].at <= context.now - idle:
        marks = marks[1:]
    if not marks or context.now - marks[-1].at > max(idle / GAP_PARTS, 2 * context.policy.pace.tick):
        return draft.with_state(scale_down=(ReplicaMark(context.now, needed),))
    last = marks[-1]
    if needed > last.replicas:
        marks = (*marks[:-1], replace(last, replicas=needed))
    elif context.now - last.at >= idle / REPEAT_PARTS:
        marks = (*marks, ReplicaMark(context.now, needed))
    return draft.with_state(scale_down=marks[-MAX_MARKS:])


def _without_marks(draft: Draft) -> Draft:
    return draft.with_state(scale_down=()) if draft.state.scale_down else draft
