"""``decide``: the whole of a decision, as a list of verbs. Pure, and the same everywhere.

The operator, local mode, the simulations and the property tests call this one function.
"""

from __future__ import annotations

from dataclasses import replace

from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.adoption import adopt_edit, remember
from kvpilot_operator.tuning.canary import advance, enough_exposure, start
from kvpilot_operator.tuning.configuration import (
    candidate,
    runs,
    to_push,
    value,
)
from kvpilot_operator.tuning.decision import Decision, Objective, Push
from kvpilot_operator.tuning.diagnosis import diagnose
from kvpilot_operator.tuning.emergency import relieve
from kvpilot_operator.tuning.guards import SIX_HOURS, distrust, no_traffic, stalled_pods
from kvpilot_operator.tuning.look import (
    IN_FLIGHT,
    TOLD_COOLDOWNS,
    Draft,
    Look,
    Plan,
    Proposal,
    told_value,
)
from kvpilot_operator.tuning.objectives import backlog_gone, ceiling, judge
from kvpilot_operator.tuning.observation import Observation, Pod
from kvpilot_operator.tuning.policy import Policy
from kvpilot_operator.tuning.rules import consider
from kvpilot_operator.tuning.scaling import size, why_not_more
from kvpilot_operator.tuning.state import Change, Hold, Phase, Told, TuningState

MET_AGAIN = 3
"""Looks in a row with every latency objective met and no backlog that mean "met again"."""

INFEASIBLE = "infeasible"
"""Key under which it is remembered that the infeasible target was told."""


def decide(observation: Observation, state: TuningState, policy: Policy, now: float) -> Decision:
    """What to do now, given what was observed and what is remembered.

    Level-triggered and idempotent: an observation that shows the effect of the last actions leads on, one
    that does not asks for them again, and one with nothing to do changes nothing.
    """
    look = examine(observation, policy, now)
    draft = remember(look, Draft(state))
    draft = forget(look, draft)
    draft = hold(look, draft)
    draft = advance(look, draft)
    draft = adopt_edit(look, draft)
    draft = relieve(look, draft)
    plan = consider(look, draft.state) if look.untrusted is None else Plan()
    draft = size(look, draft, plan)
    draft = propose(look, draft, plan)
    draft = converge(look, draft)
    return conclude(look, draft, state)


def examine(observation: Observation, policy: Policy, now: float) -> Look:
    """Judge what was observed: can it be trusted, what is breached, and why."""
    found = distrust(observation, policy)
    untrusted = None if found is None else Hold(*found, since=now)
    objectives = judge(observation, policy.objectives, trusted=untrusted is None)
    idle = untrusted is None and no_traffic(observation)
    stalled = stalled_pods(observation) if untrusted is None else ()
    trusted = observation if untrusted is None else replace(observation, pods=())
    return Look(
        observation=observation,
        policy=policy,
        now=now,
        untrusted=untrusted,
        traffic="NoTraffic" if idle else "Stalled" if stalled else "Busy",
        objectives=objectives,
        diagnosis=diagnose(trusted, objectives, policy.objectives.signal, idle=idle),
        stalled=f"requests arrive at {', '.join(stalled)} and none ends" if stalled else "",
        infeasible=_infeasible(observation, policy, objectives),
    )


def _infeasible(observation: Observation, policy: Policy, objectives: tuple[Objective, ...]) -> str:
    if not any(item.state == "Infeasible" for item in objectives):
        return ""
    top = ceiling(observation.counts("long")) or 0.0
    # Rounded to 5 points, so that the sentence stands still.
    return (
        f"hitRate: {policy.objectives.hit_rate:.0%} is asked for, and an infinite cache would reach about "
        f"{round(top * 20) / 20:.0%} with this traffic; lower the target"
    )


def forget(look: Look, draft: Draft) -> Draft:
    """Drop what has expired."""
    state, now = draft.state, look.now
    return draft.with_state(
        barred=tuple(item for item in state.barred if item.until > now),
        reversals=tuple(item for item in state.reversals if item.at > now - SIX_HOURS),
        told=tuple(item for item in state.told if _still_told(item, look)),
    )


def _still_told(item: Told, look: Look) -> bool:
    """What cannot be cured is told once for as long as it stands; advice is repeated now and then."""
    if item.key == INFEASIBLE:
        hit_rate = next((one.state for one in look.objectives if one.name == "hitRate"), "Unknown")
        return hit_rate in {"Infeasible", "Unknown"}
    return item.at > look.now - TOLD_COOLDOWNS * look.policy.pace.cooldown


def hold(look: Look, draft: Draft) -> Draft:
    """Say why nothing new may begin."""
    observation = look.observation
    if look.untrusted is not None:
        draft = draft.held(look, look.untrusted.reason, look.untrusted.message)
    if look.stalled:
        draft = draft.held(look, reasons.STALLED, look.stalled)
    if observation.rolling_out:
        draft = draft.held(look, reasons.ROLLING_OUT, "the workload replaces its pods")
    if observation.paused_by:
        draft = draft.held(look, reasons.PAUSED, f"override {observation.paused_by} is in force")
    return draft


def propose(look: Look, draft: Draft, plan: Plan) -> Draft:  # noqa: PLR0911 - one return per reason
    """Begin the cheapest experiment that promises relief, or say why none is begun."""
    policy, state = look.policy, draft.state
    blocking = [item for item in draft.holds if item.reason != reasons.ACTUATOR_CONFLICT]
    if policy.mode == "Off" or state.change is not None or blocking:
        return draft
    if look.now < state.cooldown_until:
        return draft.held(look, reasons.COOLDOWN, "the last change ended a short while ago")
    if draft.acted:
        return draft
    if look.diagnosis.stage and look.draining:
        # What ends in the short window after that has waited in the backlog as well.
        draft = draft.with_state(cooldown_until=look.now + policy.pace.short)
        return draft.held(look, reasons.DRAINING, "the backlog is being worked off, and goes by itself")
    if plan.proposal is None:
        return _no_remedy(look, draft, plan)
    alone = len(look.ready) == 1 and policy.single_replica == "Recommend"
    if policy.mode == "Recommend" or alone:
        draft = _recommend(look, draft, plan.proposal, plan)
        if policy.mode == "Recommend":
            return draft
        message = (
            "one replica has nothing to be compared with; spec.tuning.singleReplica: BeforeAfter allows it"
        )
        return draft.held(look, reasons.SINGLE_REPLICA, message)
    if plan.proposal.objective != "memory" and not enough_exposure(look):
        least = policy.pace.requests_per_arm
        return draft.held(
            look,
            reasons.TOO_LITTLE_EXPOSURE,
            f"fewer than {least} requests per engine come in time for a verdict",
        )
    return start(look, draft, plan.proposal, plan)


def _recommend(look: Look, draft: Draft, proposal: Proposal, plan: Plan) -> Draft:
    values = ",".join(f"{item.knob}={told_value(item.after)}" for item in proposal.values)
    return draft.told_once(
        look,
        f"{proposal.rule}:{values}",
        rule=proposal.rule,
        outcome="Recommended",
        summary=f"{proposal.message[:1].upper()}{proposal.message[1:]}; {proposal.told} is recommended, "
        f"predicted gain {proposal.predicted_gain:.0%}.",
        changes=proposal.values,
        rejected=plan.rejected,
    )


def _no_remedy(look: Look, draft: Draft, plan: Plan) -> Draft:
    """Tell why a breach is left alone."""
    if look.infeasible:
        draft = draft.told_once(
            look, INFEASIBLE, rule="cache-quota-up", outcome="Infeasible", summary=f"{look.infeasible}."
        )
    if not any(item.state == "Breached" for item in look.objectives):
        return draft
    for item in plan.rejected:
        if item.reason == reasons.FLAP_BUDGET:
            draft = draft.held(look, reasons.FLAP_BUDGET, item.message)
    silent = {reasons.NOT_AT_FAULT, reasons.NOT_EFFECTIVE}
    told = [f"{item.rule}: {item.reason}" for item in plan.rejected if item.reason not in silent]
    told = [*told, why] if look.serving_badly and (why := why_not_more(look)) else told
    stage = look.diagnosis.stage or look.diagnosis.objective
    more = f" ({'; '.join(told)})" if told else ""
    return draft.held(look, reasons.NO_REMEDY, f"no rule promises relief for {stage}{more}")


def converge(look: Look, draft: Draft) -> Draft:
    """Push to every ready engine that does not run what it should."""
    promoted, state = look.observation.promoted, draft.state
    if promoted is None:
        return draft
    for pod in look.ready:
        if pod.engine is None:
            continue
        generation, config = promoted.generation, dict(promoted.config)
        if state.change is not None and _tries(pod, state.change, state.phase):
            generation, config = state.change.generation, candidate(config, state.change.values)
        if not runs(pod.engine, generation, config):
            values = to_push(pod.engine, config)
            draft = draft.acting(Push(pod.uid, generation, state.epoch, values))
    return draft


def _tries(pod: Pod, change: Change, phase: Phase) -> bool:
    """True when the pod shall run the candidate."""
    if phase in {Phase.PROMOTE, Phase.EMERGENCY}:
        return True
    return phase is not Phase.REVERT and pod.uid == change.canary_uid


def conclude(look: Look, draft: Draft, before: TuningState) -> Decision:
    """The phase, the holds and the count of looks without a breach; all else is as the steps left it."""
    state = draft.state
    if state.change is None:
        blocked = [item for item in draft.holds if item.reason in BLOCKING]
        waiting = look.now < state.cooldown_until
        phase = Phase.HOLD if blocked else Phase.COOLDOWN if waiting else Phase.OBSERVE
        state = replace(state, phase=phase)
    if state.cooldown_until <= look.now and state.change is None:
        state = replace(state, cooldown_until=0.0)
    state = replace(state, holds=draft.holds[:5], met_ticks=_met_ticks(look, state.met_ticks))
    return Decision(
        state=state,
        actions=draft.actions,
        records=draft.records,
        objectives=look.objectives,
        diagnosis=look.diagnosis,
        again=bool(draft.actions) and state.phase is not before.phase and state.phase in IN_FLIGHT,
        infeasible=look.infeasible,
        stalled=look.stalled,
    )


def _met_ticks(look: Look, before: int) -> int:
    """Looks in a row whose short window meets every latency objective, with the backlog gone; 3 at most."""
    latency = [item for item in look.objectives if item.name in look.policy.objectives.latency]
    measured = [(item.measured_short, item.target) for item in latency if item.measured_short is not None]
    if len(measured) < len(latency) or not latency:
        return before
    held = all(short >= target for short, target in measured)
    calm = backlog_gone(look.waiting, len(look.ready), value(look.config, "numWorkers"))
    return min(MET_AGAIN, before + 1) if held and calm else 0


BLOCKING = frozenset(
    {
        reasons.NOT_ROLLED_OUT, reasons.NO_PODS_READY, reasons.METRICS_UNAVAILABLE, reasons.SCRAPE_TOO_SLOW,
        reasons.METRICS_MISSING, reasons.METRICS_STALE, reasons.METRICS_PARTIAL, reasons.ENGINE_UNREACHABLE,
        reasons.STALLED, reasons.ROLLING_OUT, reasons.PAUSED,
    }
)  # fmt: skip
"""Holds under which the phase is Hold; the others leave it at Observe or Cooldown."""
