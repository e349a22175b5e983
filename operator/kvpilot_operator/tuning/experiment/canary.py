"""The life of a change: Canary -> Settle -> Verify -> Promote or Revert -> Cooldown.

Every step is level-triggered: what to do follows from status, ConfigMap and what the engines say they run, so
a crash anywhere goes on from there. The pods of both arms are fixed when it begins.
"""

from __future__ import annotations

from dataclasses import replace

from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.configuration import candidate, overlay_with, runs, value
from kvpilot_operator.tuning.decision import Outcome, WriteConfig
from kvpilot_operator.tuning.evidence import arm
from kvpilot_operator.tuning.guards import DAY, MOST_BARRED, MOST_REVERSALS
from kvpilot_operator.tuning.look import Draft, Look, Plan, Proposal, told_changes
from kvpilot_operator.tuning.objectives import backlog_gone, rates
from kvpilot_operator.tuning.observation import Pod
from kvpilot_operator.tuning.state import Barred, Change, Measure, Phase, Reversal, TuningState
from kvpilot_operator.tuning.verdict import EXPOSURE_LIMIT, Verdict, judge_change

TRIED = frozenset({Phase.CANARY, Phase.SETTLE, Phase.VERIFY})
"""Phases in which a change can still be called off without having been judged."""

SETTLE_LIMIT = 3
"""The canary's backlog may prolong settling up to so many times its length."""

PUSH_LIMIT = 4
"""Engines get so many settle times to take a configuration."""


def start(look: Look, draft: Draft, proposal: Proposal, plan: Plan) -> Draft:
    """Begin an experiment on one pod; the state names everything that the coming looks need."""
    canary = min(look.ready, key=lambda pod: (pod.restarts, pod.name))
    controls = tuple(pod for pod in look.ready if pod.uid != canary.uid)
    state = draft.state
    before = _before(look, canary, proposal.objective) if not controls else ()
    change = Change(
        id=draft.next_id,
        rule=proposal.rule,
        values=proposal.values,
        epoch=state.epoch + 1,
        generation=state.last_generation + 1,
        started_at=look.now,
        phase_since=look.now,
        canary_uid=canary.uid,
        control_uids=tuple(pod.uid for pod in controls),
        restarts=sum(pod.restarts for pod in look.ready),
        objective=proposal.objective,
        predicted_gain=proposal.predicted_gain,
        before=before,
        why=proposal.message,
    )
    against = ", ".join(pod.name for pod in controls) or "its own past (one replica, unproven)"
    return draft.recorded(
        look,
        rule=proposal.rule,
        outcome="Started",
        summary=f"{_sentence(proposal.message)}; trying {proposal.told} on {canary.name} against {against}; "
        f"predicted gain {proposal.predicted_gain:.0%}.",
        changes=proposal.values,
        generation=change.generation,
        canary_uid=canary.uid,
        control_uids=change.control_uids,
        rejected=plan.rejected,
    ).with_state(phase=Phase.CANARY, change=change, epoch=change.epoch, last_generation=change.generation)


def enough_exposure(look: Look) -> bool:
    """True when enough requests come to one pod to judge a change within the time allowed."""
    arrivals = rates(look.observation, "long")[0] / len(look.ready)
    pace = look.policy.pace
    return arrivals * EXPOSURE_LIMIT * pace.verify >= pace.requests_per_arm


def advance(look: Look, draft: Draft) -> Draft:  # noqa: PLR0911 - one return per phase
    """Take the change in flight one step further."""
    change = draft.state.change
    if change is None:
        return draft
    if draft.state.phase in TRIED and (why := _interruption(look, change, draft.state.phase)) is not None:
        return abort(look, draft, *why)
    match draft.state.phase:
        case Phase.CANARY:
            return _pushed(look, draft, change)
        case Phase.SETTLE:
            return _settled(look, draft, change)
        case Phase.VERIFY:
            return _verified(look, draft, change)
        case Phase.REVERT:
            return _reverted(look, draft, change)
        case _:
            return _promoted(look, draft, change)


def abort(look: Look, draft: Draft, reason: str, message: str) -> Draft:
    """Call the change in flight off: nothing was proven, so nothing is barred."""
    return _give_up(look, draft, Verdict(reason, message, aborted=True))


def _interruption(  # noqa: PLR0911 - one return per reason
    look: Look, change: Change, phase: Phase
) -> tuple[str, str] | None:
    observation, pods = look.observation, {pod.uid: pod for pod in look.ready}
    arms = (change.canary_uid, *change.control_uids)
    if look.policy.mode != "Auto":
        return reasons.MODE_CHANGED, f"the mode is {look.policy.mode}"
    if observation.paused_by:
        return reasons.PAUSED, f"override {observation.paused_by} is in force"
    if observation.rolling_out:
        return reasons.ROLLING_OUT, "the workload replaces its pods"
    if change.canary_uid not in pods:
        return reasons.CANARY_LOST, "the canary went away"
    if any(uid not in pods for uid in change.control_uids):
        return reasons.CONTROL_LOST, "a control went away"
    if sum(pods[uid].restarts for uid in arms) > change.restarts:
        return reasons.POD_RESTARTED, "a pod of the experiment restarted"
    engine = pods[change.canary_uid].engine
    if phase is not Phase.CANARY and engine is not None and engine.generation != change.generation:
        return reasons.POD_RESTARTED, "the canary fell back to its old configuration"
    return None


def _pushed(look: Look, draft: Draft, change: Change) -> Draft:
    canary = next(pod for pod in look.ready if pod.uid == change.canary_uid)
    if _runs(look, change, canary):
        return _enter(look, draft, change, Phase.SETTLE)
    if look.now - change.phase_since > PUSH_LIMIT * look.policy.pace.settle:
        return abort(look, draft, reasons.PUSH_FAILED, f"{canary.name} did not take the configuration")
    return draft


def _settled(look: Look, draft: Draft, change: Change) -> Draft:
    """Judge from a clean start: not before the canary has worked off the backlog it began with."""
    elapsed, settle = look.now - change.phase_since, look.policy.pace.settle
    if elapsed < settle:
        return draft
    canary = next(pod for pod in look.ready if pod.uid == change.canary_uid)
    busy = canary.engine is None or canary.engine.converging
    workers = value(candidate(look.config, change.values), "numWorkers")
    queued = canary.sample is None or not backlog_gone(canary.sample.gauges.waiting, 1, workers)
    if (busy or queued) and elapsed < SETTLE_LIMIT * settle:
        return draft
    return _enter(look, draft, change, Phase.VERIFY)


def _verified(look: Look, draft: Draft, change: Change) -> Draft:
    verdict = judge_change(look, change)
    if verdict is None:
        return draft
    if verdict.name != reasons.PROMOTED:
        return _give_up(look, draft, verdict)
    canary = next(pod for pod in look.ready if pod.uid == change.canary_uid)
    unproven = " (before/after on one replica, unproven)" if change.before else ""
    text = (
        f"{_clause(change.why)}{told_changes(change.values)} on canary {canary.name}; {verdict.effect}; "
        f"promoted as generation {change.generation}{unproven}."
    )
    draft = _tell(look, draft, change, verdict, outcome="Promoted", text=text)
    return _enter(look, draft, replace(change, verdict=verdict.name), Phase.PROMOTE)


def _give_up(look: Look, draft: Draft, verdict: Verdict) -> Draft:
    """Take the change back; only what was proven to harm or not to help is barred."""
    change = draft.state.change
    if change is None or draft.state.phase is Phase.REVERT:
        return draft
    told = told_changes(change.values)
    if verdict.aborted:
        text = f"{told} was called off ({verdict.name}: {verdict.effect}); back to generation {_known(look)}."
        draft = _tell(look, draft, change, verdict, outcome="Aborted", text=text)
        named = f"Aborted({verdict.name})"
    else:
        text = f"{told} was taken back ({verdict.name}): {verdict.effect}; back to generation {_known(look)}."
        draft = _tell(look, draft, change, verdict, outcome="Reverted", text=text)
        named = verdict.name
        draft = _remember_failure(look, draft, change, verdict.name)
    return _enter(look, draft, replace(change, verdict=named), Phase.REVERT)


def _remember_failure(look: Look, draft: Draft, change: Change, verdict: str) -> Draft:
    state, leading = draft.state, change.values[0]
    reversals = (*state.reversals, Reversal(leading.knob, look.now))[-MOST_REVERSALS:]
    draft = draft.with_state(reversals=reversals)
    if verdict not in {reasons.HARMFUL, reasons.NO_GAIN}:
        return draft
    barred = (*state.barred, Barred(leading.knob, leading.after, look.now + DAY))[-MOST_BARRED:]
    return draft.with_state(barred=barred)


def _promoted(look: Look, draft: Draft, change: Change) -> Draft:
    """Everywhere first, then the ConfigMap, and only when that is seen, done."""
    promoted = look.observation.promoted
    if promoted is None:
        return draft
    if promoted.generation == change.generation:
        return _finish(look, draft, change, overlaid=True)
    late = look.now - change.phase_since > PUSH_LIMIT * look.policy.pace.settle
    behind = [pod for pod in look.ready if not _runs(look, change, pod)]
    if any(pod.engine is not None or not late for pod in behind):
        if not late:
            return draft
        names = ", ".join(pod.name for pod in behind)
        return abort(look, draft, reasons.PUSH_FAILED, f"{names} did not take the configuration")
    return draft.acting(WriteConfig(change.generation, candidate(promoted.config, change.values)))


def _reverted(look: Look, draft: Draft, change: Change) -> Draft:
    """Done when no engine that answers runs the candidate any more."""
    late = look.now - change.phase_since > PUSH_LIMIT * look.policy.pace.settle
    open_pods = [
        pod for pod in look.ready if pod.engine is None or pod.engine.generation == change.generation
    ]
    if any(pod.engine is not None or not late for pod in open_pods):
        return draft
    return _finish(look, draft, change, overlaid=False)


def _finish(look: Look, draft: Draft, change: Change, *, overlaid: bool) -> Draft:
    """The change is over: promoted values join the overlay, and a cooldown begins."""
    state = draft.state
    if overlaid:
        base = look.observation.base
        if _turns_back(state, change, look):
            back = Reversal(change.values[0].knob, look.now)
            state = replace(state, reversals=(*state.reversals, back)[-MOST_REVERSALS:])
        overlay = overlay_with(base, state.overlay, change.values, change.id)
        state = replace(state, overlay=overlay)
    until = look.now + look.policy.pace.cooldown
    return replace(draft, state=replace(state, change=None, phase=Phase.COOLDOWN, cooldown_until=until))


def _turns_back(state: TuningState, change: Change, look: Look) -> bool:
    """True when a promotion moves a knob back where an earlier one came from: it counts as a reversal."""
    leading = change.values[0]
    entry = next((item for item in state.overlay if item.knob == leading.knob), None)
    if entry is None or isinstance(leading.after, bool) or not isinstance(leading.after, int | float):
        return entry is not None and not isinstance(leading.after, int | float)
    user = entry.based_on if entry.based_on is not None else value({}, leading.knob)
    if user is None:
        return False
    return bool((entry.value - user) * (leading.after - leading.before) < 0)


def _enter(look: Look, draft: Draft, change: Change, phase: Phase) -> Draft:
    return draft.with_state(phase=phase, change=replace(change, phase_since=look.now))


def _runs(look: Look, change: Change, pod: Pod) -> bool:
    return pod.engine is not None and runs(
        pod.engine, change.generation, candidate(look.config, change.values)
    )


def _before(look: Look, pod: Pod, objective: str) -> tuple[Measure, ...]:
    """What a change on the only replica is compared with: the breach as it was.

    Only what it shall cure and the errors are tested for harm, as the load moves all else along. The short
    window shows it best, unless it holds too few requests for a verdict.
    """
    wanted = look.policy.objectives
    window = "short" if look.short.judged >= look.policy.pace.requests_per_arm else "long"
    measured = arm(look.observation, window, frozenset({pod.uid}), wanted)
    return tuple(
        item for name, item in measured.measures.items() if name == objective or name not in wanted.latency
    )


def _tell(
    look: Look, draft: Draft, change: Change, verdict: Verdict, *, outcome: Outcome, text: str
) -> Draft:
    return draft.recorded(
        look,
        id=change.id,
        rule=change.rule,
        outcome=outcome,
        summary=text,
        changes=change.values,
        generation=change.generation if outcome == "Promoted" else _known(look),
        canary_uid=change.canary_uid,
        control_uids=change.control_uids,
        evidence={"verdict": verdict.name, **verdict.evidence},
    )


def _known(look: Look) -> int:
    """The generation that stays in force when a change is taken back."""
    return look.observation.promoted.generation if look.observation.promoted is not None else 0


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _clause(why: str) -> str:
    return f"{_sentence(why)}; " if why else ""
