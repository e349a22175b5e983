"""``decide``: the steps of a decision. Pure.

The operator, local mode, the backtest and the property tests call this one function.
"""

from __future__ import annotations

from dataclasses import replace

from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.assess.capacity import max_work_s
from kvpilot_operator.tuning.assess.capacity import measured as capacity_of
from kvpilot_operator.tuning.assess.diagnosis import diagnose
from kvpilot_operator.tuning.assess.guards import SIX_HOURS
from kvpilot_operator.tuning.assess.objectives import ceiling, judge, judged_window
from kvpilot_operator.tuning.assess.outliers import outliers
from kvpilot_operator.tuning.assess.reachable import Unreachable, unreachable
from kvpilot_operator.tuning.assess.trust import is_stalled, no_traffic, trust
from kvpilot_operator.tuning.base_change import adopt_edit, remember
from kvpilot_operator.tuning.configuration import (
    candidate,
    runs,
    to_push,
)
from kvpilot_operator.tuning.context import (
    IN_FLIGHT,
    REPORT_COOLDOWNS,
    Context,
    Draft,
    Plan,
    Proposal,
)
from kvpilot_operator.tuning.decision import Decision, Objective, Push, Rejected, WriteConfig
from kvpilot_operator.tuning.experiment.canary import PUSH_LIMIT, advance
from kvpilot_operator.tuning.experiment.emergency import begin_emergency
from kvpilot_operator.tuning.experiment.start import enough_exposure, start
from kvpilot_operator.tuning.experiment.watch import watch
from kvpilot_operator.tuning.observation import OPTIONAL_COUNTS, Observation, ObservedReplica
from kvpilot_operator.tuning.permission.approval import review
from kvpilot_operator.tuning.permission.budgets import charge, overspent
from kvpilot_operator.tuning.permission.generations import note_generation, roll_back
from kvpilot_operator.tuning.permission.modes import carry_out, recommend, revoke
from kvpilot_operator.tuning.permission.overrides import forget_ended
from kvpilot_operator.tuning.permission.pins import keep_pins
from kvpilot_operator.tuning.permission.windows import closed, in_force
from kvpilot_operator.tuning.policy import Policy
from kvpilot_operator.tuning.replicas import BOOST_DECAY, keep_bounds, recycle_outlier, scale
from kvpilot_operator.tuning.results import measure_results
from kvpilot_operator.tuning.rules.memory import remember_longest
from kvpilot_operator.tuning.rules.order import consider
from kvpilot_operator.tuning.state import MAX_HOLDS, Change, Phase, Reported, TuningState

INFEASIBLE = "infeasible"
"""Key under which the state remembers that the infeasible target was reported."""

UNRELATED = frozenset({reasons.NOT_AT_FAULT, reasons.NOT_EFFECTIVE})
"""Rejections that do not explain why a breach stands."""


def decide(observation: Observation, state: TuningState, policy: Policy, now: float) -> Decision:
    """Decide what to do now.

    Level-triggered and idempotent: an observation that shows the effect of the last actions moves the state
    on, one that does not repeats the actions, and one with nothing to do changes nothing.
    """
    context = assess(observation, policy, now)
    draft = remember(context, Draft(state))
    draft = forget(context, draft)
    draft = remember_longest(context, draft)
    draft = hold(context, draft)
    draft = note_generation(context, draft)
    draft = revoke(context, draft)
    draft = advance(context, draft)
    draft = measure_results(context, draft)
    draft = watch(context, draft)
    draft = keep_pins(context, draft)
    draft = roll_back(context, draft)
    draft = adopt_edit(context, draft)
    draft = keep_bounds(context, draft)
    draft = propose(context, draft, consider(context, draft.state))
    draft = recycle_outlier(context, draft)
    draft = charge(context, draft)
    draft = converge(context, draft)
    return conclude(context, draft, state)


def assess(observation: Observation, policy: Policy, now: float) -> Context:
    """Assess the observation: which data can be trusted, what is breached, and why."""
    policy = in_force(policy, now)
    found = trust(observation, policy)
    trusted = _with_replicas(observation, {replica.uid for replica in found.trusted})
    # A replica that runs a candidate differs because of it.
    promoted = observation.promoted.generation if observation.promoted is not None else 0
    alike = [r for r in found.trusted if r.engine is not None and r.engine.generation == promoted]
    apart = outliers(alike, found.trusted, policy.objectives.memory)
    measured = _with_replicas(trusted, {r.uid for r in found.trusted} - {item.uid for item in apart})
    counts = measured.counts(judged_window(measured))
    capacity = capacity_of(measured)
    beyond = unreachable(counts, capacity, policy.objectives) if found.nothing is None else ()

    def judged(seen: Observation) -> tuple[Objective, ...]:
        return _with_unreachable(judge(seen, policy.objectives, trusted=found.nothing is None), beyond)

    objectives = judged(trusted)
    curable = judged(measured) if apart else objectives
    stalled = sorted(r.name for r in observation.ready if is_stalled(r)) if found.nothing is None else []
    idle = found.nothing is None and not stalled and no_traffic(trusted)
    return Context(
        observation=observation,
        measured=measured,
        capacity=capacity,
        max_work_s=max_work_s(policy.objectives, capacity, {item.name for item in beyond}),
        policy=policy,
        now=now,
        trust=found,
        outliers=apart,
        traffic="NoTraffic" if idle else "Stalled" if stalled else "Busy",
        objectives=objectives,
        curable=curable,
        diagnosis=diagnose(measured, curable, policy.objectives.signal, capacity, idle=idle),
        stalled=f"requests arrive at {', '.join(stalled)} and none ends" if stalled else "",
        infeasible=_infeasible(measured, policy, curable, beyond),
    )


def _with_replicas(observation: Observation, uids: set[str]) -> Observation:
    """The observation with these of its ready replicas; itself if they are all."""
    if len(uids) == len(observation.ready):
        return observation
    kept = (r for r in observation.replicas if not r.ready or r.terminating or r.uid in uids)
    return replace(observation, replicas=tuple(kept))


def _infeasible(
    observation: Observation,
    policy: Policy,
    objectives: tuple[Objective, ...],
    beyond: tuple[Unreachable, ...],
) -> str:
    """Which targets are out of reach, and what could be reached; rounded, so that it seldom changes."""
    parts = []
    states = {item.name: item.state for item in objectives}
    for item in beyond:
        if states.get(item.name) != "Infeasible":
            continue
        least = item.reachable_s
        reach = "" if least is None else f"; about {least * 1000:g} ms could be reached"
        parts.append(
            f"{item.name}: {item.edge_s * 1000:g} ms is asked for, and requests such as these take longer on "
            f"an engine that serves no other{reach}"
        )
    if states.get("hitRate") == "Infeasible":
        top = ceiling(observation.counts("long")) or 0.0
        parts.append(
            f"hitRate: {policy.objectives.hit_rate:.0%} is asked for, and an infinite cache would reach "
            f"about {round(top * 20) / 20:.0%} with this traffic"
        )
    return f"{'; '.join(parts)}; relax the target" if parts else ""


def _with_unreachable(
    objectives: tuple[Objective, ...], beyond: tuple[Unreachable, ...]
) -> tuple[Objective, ...]:
    """Breached latency objectives that no change could cure are infeasible."""
    names = {item.name for item in beyond}
    return tuple(
        replace(item, state="Infeasible", severity="")
        if item.name in names and item.state == "Breached"
        else item
        for item in objectives
    )


def forget(context: Context, draft: Draft) -> Draft:
    """Drop expired entries of the state."""
    draft = forget_ended(context, draft)
    state, now = draft.state, context.now
    return draft.with_state(
        blocked_values=tuple(item for item in state.blocked_values if item.until > now),
        reversals=tuple(item for item in state.reversals if item.at > now - SIX_HOURS),
        reported=tuple(item for item in state.reported if _still_reported(item, context)),
        strain=state.strain if state.strain is not None and state.strain.until > now else None,
    )


def _still_reported(item: Reported, context: Context) -> bool:
    """A recommendation is repeated after a time; an infeasible target is not while it stands."""
    if item.at > context.now - REPORT_COOLDOWNS * context.policy.pace.cooldown:
        return True
    return item.key == INFEASIBLE and (
        any(one.state == "Infeasible" for one in context.objectives)
        or all(one.state == "Unknown" for one in context.objectives)
    )


def hold(context: Context, draft: Draft) -> Draft:
    """Say why no change may begin."""
    for reason, message in context.blocks:
        draft = draft.held(context, reason, message)
    promoted = context.observation.promoted
    number = 0 if promoted is None else promoted.generation
    since = next((item.at for item in draft.state.generations if item.number == number), context.now)
    late = context.now - since > PUSH_LIMIT * context.policy.pace.settle
    if late and context.behind and draft.state.change is None:
        draft = _held_by_those_behind(context, draft)
    return draft


def _held_by_those_behind(context: Context, draft: Draft) -> Draft:
    """Arms must not differ by a push that one did not take, and no promotion would reach it."""
    names = ", ".join(sorted(replica.name for replica in context.behind))
    message = f"{names}: runs an older generation; the promoted one is pushed at every reconcile"
    return draft.held(context, reasons.REPLICA_BEHIND, message)


def propose(context: Context, draft: Draft, plan: Plan) -> Draft:
    """Carry out what the remedies propose: relief everywhere, then capacity, then an experiment."""
    draft = review(context, draft, plan)
    if plan.everywhere is not None and not draft.acted:
        draft = carry_out(context, draft, plan.everywhere, plan.rejected, begin_emergency, urgent=True)
    if plan.replicas is not None:
        decay = plan.replicas.rule == BOOST_DECAY
        draft = carry_out(context, draft, plan.replicas, plan.rejected, scale, urgent=decay)
    return _experiment(context, draft, plan)


def _experiment(context: Context, draft: Draft, plan: Plan) -> Draft:  # noqa: PLR0911 - one return per reason
    """Begin the cheapest experiment that promises relief, or say why none begins."""
    policy, state, proposal = context.policy, draft.state, plan.canary
    relieves = proposal is not None and proposal.objective == "memory"
    blocks = context.relief_blocks if relieves else context.blocks
    if policy.mode == "Off" or state.change is not None or blocks:
        return draft
    if state.watch is not None:
        return draft.held(context, reasons.WATCHING, "the last change is still compared with before")
    if context.now < state.cooldown_until:
        return draft.held(context, reasons.COOLDOWN, "the last change ended a short while ago")
    if context.behind:
        return _held_by_those_behind(context, draft)
    if policy.acts and not relieves and (why := closed(policy, context.now)):
        return draft.held(context, reasons.OUTSIDE_WINDOW, why)
    if draft.acted:
        return draft
    if context.diagnosis.stage and context.draining:
        # Requests that end during the next short window waited in the backlog as well.
        draft = draft.with_state(cooldown_until=context.now + policy.pace.short)
        message = "the backlog is draining; no change until it is empty"
        return draft.held(context, reasons.DRAINING, message)
    if proposal is None:
        return _no_remedy(context, draft, plan)
    if policy.acts and len(context.ready) == 1 and policy.single_replica == "Recommend":
        message = "one replica has no controls; spec.tuning.singleReplica: BeforeAfter allows a change"
        draft = recommend(context, draft, proposal, plan.rejected)
        return draft.held(context, reasons.SINGLE_REPLICA, message)
    if policy.acts and not relieves and not enough_exposure(context):
        message = f"fewer than {policy.pace.requests_per_arm} requests per replica come in time for a verdict"
        return draft.held(context, reasons.TOO_LITTLE_EXPOSURE, message)

    def begin(context: Context, draft: Draft, proposal: Proposal) -> Draft:
        waits = context.observation.fleet.waits or overspent(context, draft.state, proposal)
        if waits is not None:
            return draft.held(context, *waits)
        return start(context, draft, proposal, plan.rejected)

    return carry_out(context, draft, proposal, plan.rejected, begin)


def _no_remedy(context: Context, draft: Draft, plan: Plan) -> Draft:
    """Say why a breach is left alone."""
    if context.infeasible:
        draft = draft.report_once(
            context, INFEASIBLE, rule="objectives", outcome="Infeasible", summary=f"{context.infeasible}."
        )
    if not any(item.state == "Breached" for item in context.objectives):
        return draft
    if not any(item.state == "Breached" for item in context.curable):
        names = "; ".join(f"{item.name}: {item.clause}" for item in context.outliers)
        return draft.held(context, reasons.OUTLIER, f"no knob of all replicas cures one of them ({names})")
    for item in plan.rejected:
        if item.reason == reasons.FLAP_BUDGET:
            draft = draft.held(context, reasons.FLAP_BUDGET, item.message)
    causes = [_cause(item) for item in plan.rejected if item.reason not in UNRELATED]
    stage = context.diagnosis.stage_text or context.diagnosis.objective
    more = f" ({'; '.join(filter(None, causes))})" if any(causes) else ""
    return draft.held(
        context, reasons.NO_REMEDY, f"kvpilot knows no change that would help with {stage}{more}"
    )


def _cause(item: Rejected) -> str:
    """Why one remedy does not help, with its message where that holds no live figures."""
    if item.rule == "replicas-down":
        return ""
    steady = item.rule == "replicas-up" or item.reason == reasons.METRIC_ABSENT
    return f"{item.rule}: {item.reason}" + (f", {item.message}" if steady else "")


def converge(context: Context, draft: Draft) -> Draft:
    """Push to every ready replica that runs another configuration than it should.

    While a revert waits for the ConfigMap that is being written, engines are not sent the present one first:
    where an emergency was interrupted, that would undo it for a moment.
    """
    promoted, state = context.observation.promoted, draft.state
    written = any(isinstance(action, WriteConfig) for action in draft.actions)
    if promoted is None or (written and state.phase is Phase.REVERT):
        return draft
    for replica in context.everyone:
        if replica.engine is None:
            continue
        generation, config = promoted.generation, dict(promoted.config)
        if state.change is not None and _tries(replica, state.change, state.phase):
            generation, config = state.change.generation, candidate(config, state.change.values)
        if not runs(replica.engine, generation, config):
            values = to_push(replica.engine, config)
            draft = draft.acting(Push(replica.uid, generation, state.epoch, values))
    return draft


def _tries(replica: ObservedReplica, change: Change, phase: Phase) -> bool:
    """True if the replica should run the candidate."""
    if phase in {Phase.PROMOTE, Phase.EMERGENCY}:
        return True
    return phase is not Phase.REVERT and (change.everywhere or replica.uid in change.candidates)


def conclude(context: Context, draft: Draft, before: TuningState) -> Decision:
    """Set the phase and the holds; the steps before have set everything else."""
    state = draft.state
    if state.change is None:
        waiting = context.now < state.cooldown_until
        calm = Phase.COOLDOWN if waiting else Phase.OBSERVE if state.watch is None else Phase.WATCH
        phase = Phase.HOLD if context.blocks else calm
        state = replace(state, phase=phase)
    if state.cooldown_until <= context.now and state.change is None:
        state = replace(state, cooldown_until=0.0)
    rules = context.observation.fleet.rules_hash or state.rules_hash
    state = replace(state, holds=draft.holds[:MAX_HOLDS], rules_hash=rules)
    return Decision(
        state=state,
        actions=draft.actions,
        records=draft.records,
        objectives=context.objectives,
        diagnosis=context.diagnosis,
        again=bool(draft.actions) and state.phase is not before.phase and state.phase in IN_FLIGHT,
        infeasible=context.infeasible,
        stalled=context.stalled,
        outliers=tuple(f"{item.name}: {item.clause}" for item in context.outliers),
        partly_trusted="; ".join(f"{item.name}: {item.clause}" for item in context.trust.distrusted),
        absent=tuple(item for item in OPTIONAL_COUNTS if context.absent((item,))),
    )
