"""Phases of a change: Canary -> Settle -> Verify -> Promote or Revert -> Cooldown.

Every step is level-triggered: it follows from the status, the ConfigMap and the configuration that engines
report, so a crash at any point loses nothing. The replicas of both arms are fixed when the change begins.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import replace

from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.assess.guards import DAY
from kvpilot_operator.tuning.assess.objectives import MIN_JUDGED, backlog_gone, rates
from kvpilot_operator.tuning.configuration import candidate, overlay_with, runs, value
from kvpilot_operator.tuning.context import Context, Draft, Proposal, format_changes, sentence
from kvpilot_operator.tuning.decision import DecisionOutcome, Rejected, WriteConfig
from kvpilot_operator.tuning.experiment.capacity_verdict import (
    is_calm,
    judge_capacity,
    load_is_elsewhere,
    rates_before,
)
from kvpilot_operator.tuning.experiment.evidence import CAPACITY, FAULTS, MEMORY, WORK, arm
from kvpilot_operator.tuning.experiment.measure_verdict import (
    difference_before,
    judge_measure,
    judge_memory,
    with_interval,
)
from kvpilot_operator.tuning.experiment.verdict import (
    EXPOSURE_LIMIT,
    OPEN,
    Verdict,
    arms,
    deadline_of,
    overdue,
)
from kvpilot_operator.tuning.observation import ObservedReplica
from kvpilot_operator.tuning.pace import MIN_SCRAPES
from kvpilot_operator.tuning.state import (
    MAX_BLOCKED_VALUES,
    MAX_CONTROLS,
    MAX_REVERSALS,
    BlockedValue,
    Change,
    Measure,
    Phase,
    ReplicaRef,
    Reversal,
    TuningState,
    Watch,
)

TRIED = frozenset({Phase.CANARY, Phase.SETTLE, Phase.VERIFY})
"""Phases in which a change can be aborted without a verdict."""

SETTLE_LIMIT = 3
"""The canary's backlog prolongs settling up to so many times its length."""

INCONCLUSIVE_COOLDOWNS = 10
"""A value that showed nothing, or that an engine did not take, is blocked for so many cooldowns."""

LIFE_LIMIT = 8
"""An experiment that cannot be observed is given up so many verify times after its start."""

PUSH_LIMIT = 4
"""Engines have so many settle times to take a configuration."""

TAKEN_BACK = "TakenBack"
"""Verdict of a change that restores on all replicas what was before another one."""

STANDING = frozenset({TAKEN_BACK, reasons.EMERGENCY})
"""Verdicts of what stands on the replicas that took it: one that takes nothing keeps it from no other."""

CROSSOVER_INTERVALS = 6
"""Two replicas swap their arms after so many intervals without a verdict."""


def start(context: Context, draft: Draft, proposal: Proposal, rejected: tuple[Rejected, ...]) -> Draft:
    """Begin an experiment on one replica; the state keeps everything that later decisions need."""
    seed = zlib.crc32(f"{draft.next_id}:{context.now:.3f}".encode())
    canary, controls = _drawn(context.ready, seed)
    others = frozenset(replica.uid for replica in controls)
    before = _before(context, canary, proposal.objective) if not controls else ()
    measure = proposal.measure or (CAPACITY if proposal.ratio else proposal.objective)
    errors = errors_of(context)
    rate, differ = rates_before(context, proposal.values, canary.uid, others)
    longer = None
    if measure != CAPACITY:
        differ = difference_before(context, measure, canary.uid, others)
        longer = difference_before(context, WORK, canary.uid, others)
    change = draft.new_change(
        context,
        proposal,
        canary=ReplicaRef(canary.uid, canary.name),
        controls=tuple(ReplicaRef(replica.uid, replica.name) for replica in controls),
        restarts=sum(replica.restarts for replica in (canary, *controls)),
        before=before,
        why=proposal.message,
        measure=measure,
        seed=seed,
        rate_before=rate,
        errors_before=errors.share or 0.0,
        judged_before=errors.of,
        difference_before=differ,
        work_before=longer,
    )
    against = ", ".join(replica.name for replica in controls) or "its own past (one replica, unproven)"
    return draft.recorded(
        context,
        rule=proposal.rule,
        outcome="Started",
        summary=f"{proposal.sentence}; trying {proposal.summary} on {canary.name} against {against}; "
        f"predicted gain {proposal.predicted_gain:.0%}.",
        changes=proposal.values,
        generation=change.generation,
        canary=canary.name,
        controls=tuple(item.name for item in change.controls),
        rejected=rejected,
        evidence={
            "seed": seed,
            "measure": measure,
            "why": proposal.message,
            "predictedGain": round(proposal.predicted_gain, 4),
            "predictedRatio": round(proposal.ratio, 3),
        },
    ).beginning(Phase.CANARY, change)


def _drawn(
    replicas: tuple[ObservedReplica, ...], seed: int
) -> tuple[ObservedReplica, tuple[ObservedReplica, ...]]:
    """The canary and its controls, drawn at random so that no name is favoured.

    The canary is one of the replicas with the fewest restarts. The controls are all others, or MAX_CONTROLS.
    """
    draw, fewest = random.Random(seed), min(replica.restarts for replica in replicas)
    by_uid = sorted(replicas, key=lambda replica: replica.uid)
    canary = draw.choice([replica for replica in by_uid if replica.restarts == fewest])
    if len(replicas) <= MAX_CONTROLS + 1:
        return canary, tuple(replica for replica in replicas if replica.uid != canary.uid)
    return canary, tuple(draw.sample([r for r in by_uid if r.uid != canary.uid], MAX_CONTROLS))


def errors_of(context: Context) -> Measure:
    """Requests of the long window that failed by a fault of the engine, of those that were not shed."""
    return Measure(FAULTS, context.long.errors, context.long.admitted)


def enough_exposure(context: Context) -> bool:
    """True if one replica gets enough requests for a verdict within the time allowed."""
    arrivals = rates(context.measured, "long")[0] / len(context.ready)
    pace = context.policy.pace
    return arrivals * EXPOSURE_LIMIT * pace.verify >= pace.requests_per_arm


def advance(context: Context, draft: Draft) -> Draft:  # noqa: PLR0911 - one return per phase
    """Move the change in flight one phase on, or abort it."""
    change = draft.state.change
    if change is None:
        return draft
    if draft.state.phase in TRIED and (why := _interruption(context, change, draft.state.phase)) is not None:
        return abort(context, draft, *why)
    if draft.state.phase in {Phase.SETTLE, Phase.VERIFY}:
        if _stalled(context, change):
            text = "requests arrive at the candidate and none is completed"
            return _give_up(context, draft, Verdict(reasons.CANARY_STALLED, text))
        change = _seen(context, change)
        draft = draft.with_state(change=change)
        if change.unseen_since:
            return _unobserved(context, draft, change)
    match draft.state.phase:
        case Phase.CANARY:
            return _pushed(context, draft, change)
        case Phase.SETTLE:
            return _settled(context, draft, change)
        case Phase.VERIFY:
            return _verified(context, draft, change)
        case Phase.REVERT:
            return _reverted(context, draft, change)
        case _:
            return _promoted(context, draft, change)


def abort(context: Context, draft: Draft, reason: str, message: str) -> Draft:
    """Abort the change in flight: nothing was proven, so no value is blocked."""
    return _give_up(context, draft, Verdict(reason, message, aborted=True))


def _interruption(  # noqa: PLR0911 - one return per reason
    context: Context, change: Change, phase: Phase
) -> tuple[str, str] | None:
    observation, replicas = context.observation, {replica.uid: replica for replica in context.everyone}
    arms = (change.canary_uid, *change.control_uids)
    if observation.spec_error:
        return reasons.SPEC_INVALID, observation.spec_error
    if observation.paused_by:
        return reasons.PAUSED, f"override {observation.paused_by} is in force"
    if observation.rolling_out:
        return reasons.ROLLING_OUT, "the workload replaces its pods"
    if change.canary_uid not in replicas:
        return reasons.CANARY_LOST, "the canary is gone"
    if any(uid not in replicas for uid in change.control_uids):
        return reasons.CONTROL_LOST, "a control is gone"
    if sum(replicas[uid].restarts for uid in arms) > change.restarts:
        return reasons.REPLICA_RESTARTED, "a replica of the experiment restarted"
    engine = replicas[change.canary_uid].engine
    if phase is not Phase.CANARY and engine is not None and engine.generation != change.generation:
        return reasons.REPLICA_RESTARTED, "the canary runs its old configuration again"
    return None


def _stalled(context: Context, change: Change) -> bool:
    """True if the candidate has completed nothing for a long window of its verification, and others have.

    A replica that hangs cannot be trusted, so it is looked at whether it can be or not.
    """
    if not change.measured_from or context.now - change.measured_from < context.policy.pace.long:
        return False
    seen = context.observation
    tried = seen.counts("verify", change.candidates)
    others = seen.counts("verify", change.others).completed if change.others else MIN_JUDGED
    return tried.arrivals >= MIN_JUDGED and not tried.completed and others >= MIN_JUDGED


def _seen(context: Context, change: Change) -> Change:
    """The change with the time in which its arms cannot be observed left out of its verification."""
    observed = {replica.uid for replica in context.ready}
    if change.candidates <= observed and 2 * len(observed & change.others) >= len(change.others):
        lost = context.now - change.unseen_since if change.unseen_since and change.deadline else 0.0
        return replace(change, deadline=change.deadline + lost, unseen_since=0.0)
    return replace(change, unseen_since=change.unseen_since or context.now)


def _unobserved(context: Context, draft: Draft, change: Change) -> Draft:
    """Wait for what can be observed, but not for ever."""
    if context.now - change.started_at < LIFE_LIMIT * context.policy.pace.verify:
        return draft
    found = context.trust.nothing or context.trust.too_few
    clauses = (f"{item.name}: {item.clause}" for item in context.trust.distrusted)
    why = found[1] if found is not None else "; ".join(clauses) or "its replicas are not compared"
    return abort(context, draft, reasons.UNOBSERVED, f"it could not be measured: {why}")


def _pushed(context: Context, draft: Draft, change: Change) -> Draft:
    """Measure once every candidate runs it and no control does, as after a swap of the arms."""
    behind = [
        r.name for r in context.everyone if r.uid in change.candidates and not _runs(context, change, r)
    ]
    behind += [
        r.name
        for r in context.everyone
        if r.uid in change.others and r.engine is not None and r.engine.generation == change.generation
    ]
    if not behind:
        # A step rate has no memory, so there is nothing to settle; once widened, only harm is looked for.
        if change.measure == CAPACITY or change.widened:
            return _enter(context, draft, replace(change, measured_from=context.now), Phase.VERIFY)
        return _enter(context, draft, change, Phase.SETTLE)
    if context.now - change.phase_since > PUSH_LIMIT * context.policy.pace.settle:
        message = f"{', '.join(behind)} did not take the configuration"
        return abort(context, draft, reasons.PUSH_FAILED, message)
    return draft


def _settled(context: Context, draft: Draft, change: Change) -> Draft:
    """Verify from a clean start: the canary's backlog from before the change must be gone."""
    elapsed, settle = context.now - change.phase_since, context.policy.pace.settle
    if elapsed < settle:
        return draft
    canary = next(replica for replica in context.everyone if replica.uid == change.canary_uid)
    busy = canary.engine is None or canary.engine.converging
    workers = value(candidate(context.config, change.values), "numWorkers")
    queued = canary.sample is None or not backlog_gone(canary.sample.gauges.waiting, 1, workers)
    if (busy or queued) and elapsed < SETTLE_LIMIT * settle:
        return draft
    return _enter(context, draft, replace(change, measured_from=context.now), Phase.VERIFY)


def _verified(context: Context, draft: Draft, change: Change) -> Draft:
    change, verdict = judge_change(context, change)
    draft = draft.with_state(change=change)
    if change.widened and change.others:
        return _verified_widely(context, draft, change, verdict)
    if verdict.name == OPEN:
        return _spread(context, draft, change) or _crossed(context, draft, change)
    if verdict.name != reasons.PROMOTED:
        return _give_up(context, draft, verdict)
    if not change.widened and (half := _half(context, change)):
        return _enter(context, draft, replace(change, widened=half, measured_from=0.0), Phase.CANARY)
    return _accept(context, draft, change, verdict)


def _verified_widely(context: Context, draft: Draft, change: Change, verdict: Verdict) -> Draft:
    """On half of the controls a change is not asked again whether it helps, only whether it harms."""
    if verdict.name in {reasons.HARMFUL, reasons.TOO_FEW_REQUESTS}:
        return _give_up(context, draft, verdict)
    if not verdict.evidence or context.now - change.measured_from < _stage_s(context):
        return draft
    return _accept(context, draft, change, replace(verdict, name=reasons.PROMOTED, aborted=False))


def judge_change(context: Context, change: Change) -> tuple[Change, Verdict]:
    """The change with what its verification shows by now, and its verdict."""
    if not _measured(context, change):
        late = Verdict(reasons.TOO_FEW_REQUESTS, "the arms could not be measured in time", aborted=True)
        return change, late if overdue(context, change) else Verdict(OPEN, "")
    if change.measure == MEMORY:
        return change, judge_memory(context, change)
    if change.measure != CAPACITY:
        change = with_interval(context, change)
        return change, judge_measure(context, change)
    if not change.drained and is_calm(context, change):
        change = replace(change, drained=True)
    return change, judge_capacity(context, change)


def _measured(context: Context, change: Change) -> bool:
    """True if every candidate and at least half of the controls can be measured since the change."""
    found = {r.uid for r in context.ready if r.sample is not None and "verify" in r.sample.windows}
    return change.candidates <= found and 2 * len(found & change.others) >= len(change.others)


def _spread(context: Context, draft: Draft, change: Change) -> Draft | None:
    """Let all replicas run what the canary has no load to prove; None if it has.

    All, as the load would stay on those that do not; canary and controls are the ones that are measured. From
    then on their step rates are compared with those before the change, as those of a single replica are.
    """
    if change.measure != CAPACITY or not change.others or not load_is_elsewhere(context, change):
        return None
    _, control = arms(context, change)
    before = tuple(control.measures.values())
    everywhere = replace(change, widened=change.controls, before=before, measured_from=0.0, drained=False)
    return _enter(context, draft, everywhere, Phase.CANARY)


def _crossed(context: Context, draft: Draft, change: Change) -> Draft:
    """Swap the arms of two replicas once, so that what their machines differ by falls out of the mean."""
    if change.crossed_at or len(change.controls) != 1 or change.tally.count < CROSSOVER_INTERVALS:
        return draft
    swapped = replace(
        change,
        canary=change.controls[0],
        controls=(change.canary,) if change.canary is not None else (),
        crossed_at=context.now,
        measured_from=0.0,
    )
    return _enter(context, draft, swapped, Phase.CANARY)


def _half(context: Context, change: Change) -> tuple[ReplicaRef, ...]:
    """Half of the controls: they get a proven change before all do; () where the rest may follow at once.

    Replicas that are no controls wait with the other half: nobody would notice harm on them.
    """
    rest = len(change.controls)
    if rest < 2 or (rest == 2 and context.overloaded):
        return ()
    return change.controls[: rest // 2]


def _stage_s(context: Context) -> float:
    """How long half of the controls run a change before all do: shorter while the load outruns them."""
    return MIN_SCRAPES * context.policy.pace.scrape * (1 if context.overloaded else 3)


def _accept(context: Context, draft: Draft, change: Change, verdict: Verdict) -> Draft:
    canary = next(replica for replica in context.everyone if replica.uid == change.canary_uid)
    unproven = " (before/after on one replica, unproven)" if not change.controls else ""
    text = (
        f"{_clause(change.why)}{format_changes(change.values)} on canary {canary.name}; {verdict.effect}; "
        f"promoted as generation {change.generation}{unproven}."
    )
    draft = _record(context, draft, change, verdict, outcome="Promoted", text=text)
    return _enter(context, draft, replace(change, verdict=verdict.name), Phase.PROMOTE)


def _give_up(context: Context, draft: Draft, verdict: Verdict) -> Draft:
    """Revert the change and block its value for a while, unless it was aborted."""
    change = draft.state.change
    if change is None or draft.state.phase is Phase.REVERT:
        return draft
    draft = _without_promotion(draft, change)
    changed = format_changes(change.values)
    if verdict.aborted:
        text = (
            f"{changed} was aborted ({verdict.name}: {verdict.effect}); back to generation {_known(context)}."
        )
        draft = _record(context, draft, change, verdict, outcome="Aborted", text=text)
        named = f"Aborted({verdict.name})"
        if verdict.name == reasons.PUSH_FAILED:  # nor would the same push be taken a moment later
            draft = _blocked(context, draft, change, INCONCLUSIVE_COOLDOWNS * context.policy.pace.cooldown)
    else:
        text = (
            f"{changed} was reverted ({verdict.name}): {verdict.effect}; "
            f"back to generation {_known(context)}."
        )
        draft = _record(context, draft, change, verdict, outcome="Reverted", text=text)
        named = verdict.name
        draft = _remember_failure(context, draft, change, verdict.name)
    return _enter(context, draft, replace(change, verdict=named), Phase.REVERT)


def _without_promotion(draft: Draft, change: Change) -> Draft:
    """The draft without the write of the change, which a step before may have asked for."""
    kept = (
        a for a in draft.actions if not (isinstance(a, WriteConfig) and a.generation == change.generation)
    )
    return replace(draft, actions=tuple(kept))


def _remember_failure(context: Context, draft: Draft, change: Change, verdict: str) -> Draft:
    reversals = (*draft.state.reversals, Reversal(change.values[0].knob, context.now))[-MAX_REVERSALS:]
    # What showed nothing may show more under another load, but first it is the turn of the next remedy.
    proven = verdict in {reasons.HARMFUL, reasons.NO_GAIN}
    seconds = DAY if proven else INCONCLUSIVE_COOLDOWNS * context.policy.pace.cooldown
    return _blocked(context, draft.with_state(reversals=reversals), change, seconds)


def _blocked(context: Context, draft: Draft, change: Change, seconds: float) -> Draft:
    leading = change.values[0]
    blocked = BlockedValue(leading.knob, leading.after, context.now + seconds)
    return draft.with_state(blocked_values=(*draft.state.blocked_values, blocked)[-MAX_BLOCKED_VALUES:])


def _promoted(context: Context, draft: Draft, change: Change) -> Draft:
    """Push to all replicas, then write the ConfigMap; done when that is observed."""
    promoted = context.observation.promoted
    if promoted is None:
        return draft
    if promoted.generation == change.generation:
        return _finish(context, draft, change, overlaid=True)
    late = context.now - change.phase_since > PUSH_LIMIT * context.policy.pace.settle
    behind = [replica for replica in context.everyone if not _runs(context, change, replica)]
    if any(replica.engine is not None or not late for replica in behind):
        if not late:
            return draft
        if change.verdict in STANDING:  # ``converge`` goes on pushing
            return draft.acting(WriteConfig(change.generation, candidate(promoted.config, change.values)))
        names = ", ".join(replica.name for replica in behind)
        return abort(context, draft, reasons.PUSH_FAILED, f"{names} did not take the configuration")
    return draft.acting(WriteConfig(change.generation, candidate(promoted.config, change.values)))


def _reverted(context: Context, draft: Draft, change: Change) -> Draft:
    """Done when no engine runs the candidate; one that takes nothing is waited for as long as for a push."""
    late = context.now - change.phase_since > PUSH_LIMIT * context.policy.pace.settle
    pending = [
        replica
        for replica in context.everyone
        if replica.engine is None or replica.engine.generation == change.generation
    ]
    return draft if pending and not late else _finish(context, draft, change, overlaid=False)


def _finish(context: Context, draft: Draft, change: Change, *, overlaid: bool) -> Draft:
    """End the change: promoted values join the overlay, and a cooldown begins."""
    state = draft.state
    pace = context.policy.pace
    if overlaid:
        base = context.observation.base
        if change.verdict != TAKEN_BACK and _turns_back(state, change, context):
            back = Reversal(change.values[0].knob, context.now)
            state = replace(state, reversals=(*state.reversals, back)[-MAX_REVERSALS:])
        overlay = overlay_with(base, state.overlay, change.values, change.id)
        state = replace(state, overlay=overlay)
        if change.verdict in {reasons.PROMOTED, reasons.EMERGENCY}:
            state = replace(state, watch=watch_of(context, change))
    # After a change of capacity it is enough that the short window holds nothing from before it: a backlog
    # that drains holds the next change up, and the flap budget bounds the way back.
    until = context.now + (pace.short + pace.scrape if change.measure == CAPACITY else pace.cooldown)
    return replace(draft, state=replace(state, change=None, phase=Phase.COOLDOWN, cooldown_until=until))


def watch_of(context: Context, change: Change) -> Watch:
    """The watch over a change that runs on all replicas from now on."""
    memory = next((item.bad for item in change.before if change.verdict == reasons.EMERGENCY), 0.0)
    pace = context.policy.pace
    return Watch(
        change.id,
        change.rule,
        change.values,
        context.now,
        context.now + (pace.settle if memory else pace.verify),
        change.rate_before,
        change.errors_before,
        change.judged_before,
        ratio=change.ratio,
        memory_before=memory,
    )


def _turns_back(state: TuningState, change: Change, context: Context) -> bool:
    """True if a promotion moves a knob back towards the user's value: it counts as a reversal."""
    leading = change.values[0]
    entry = next((item for item in state.overlay if item.knob == leading.knob), None)
    if entry is None or isinstance(leading.after, bool) or not isinstance(leading.after, int | float):
        return entry is not None and not isinstance(leading.after, int | float)
    user = entry.based_on if entry.based_on is not None else value({}, leading.knob)
    if user is None:
        return False
    return bool((entry.value - user) * (leading.after - leading.before) < 0)


def _enter(context: Context, draft: Draft, change: Change, phase: Phase) -> Draft:
    if phase is Phase.VERIFY and not change.deadline:
        change = replace(change, deadline=deadline_of(context, context.now))
    return draft.with_state(phase=phase, change=replace(change, phase_since=context.now))


def _runs(context: Context, change: Change, replica: ObservedReplica) -> bool:
    return replica.engine is not None and runs(
        replica.engine, change.generation, candidate(context.config, change.values)
    )


def _before(context: Context, replica: ObservedReplica, objective: str) -> tuple[Measure, ...]:
    """What a change on the only replica is compared with: the measures during the breach.

    Only the measure that it should cure and the errors are tested for harm, as load changes all others.
    The short window is used, unless it holds too few requests for a verdict.
    """
    wanted = context.policy.objectives
    window = "short" if context.short.judged >= context.policy.pace.requests_per_arm else "long"
    measured = arm(context.measured, window, frozenset({replica.uid}), wanted)
    return tuple(
        item for name, item in measured.measures.items() if name == objective or name not in wanted.latency
    )


def _record(
    context: Context, draft: Draft, change: Change, verdict: Verdict, *, outcome: DecisionOutcome, text: str
) -> Draft:
    return draft.recorded(
        context,
        id=change.id,
        rule=change.rule,
        outcome=outcome,
        summary=text,
        changes=change.values,
        generation=change.generation if outcome == "Promoted" else _known(context),
        canary="" if change.canary is None else change.canary.name,
        controls=tuple(item.name for item in change.controls),
        evidence={"verdict": verdict.name, "effect": verdict.effect, **verdict.evidence},
    )


def _known(context: Context) -> int:
    """The generation that stays in force when a change is reverted."""
    return context.observation.promoted.generation if context.observation.promoted is not None else 0


def _clause(why: str) -> str:
    return f"{sentence(why)}; " if why else ""
