"""Phases of a change: Canary -> Settle -> Verify -> Promote or Revert -> Cooldown.

Every step is level-triggered: it follows from the status, the ConfigMap and the configuration that engines
report, so a crash at any point loses nothing. The replicas of both arms are fixed when the change begins.
"""

from __future__ import annotations

from dataclasses import replace

from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.assess.objectives import MIN_JUDGED, backlog_gone
from kvpilot_operator.tuning.configuration import candidate, runs, value
from kvpilot_operator.tuning.context import Context, Draft
from kvpilot_operator.tuning.decision import WriteConfig
from kvpilot_operator.tuning.experiment.capacity_verdict import is_calm, judge_capacity, load_is_elsewhere
from kvpilot_operator.tuning.experiment.ends import STANDING, TRIED, abort, accept, enter, finish, give_up
from kvpilot_operator.tuning.experiment.evidence import CAPACITY, MEMORY
from kvpilot_operator.tuning.experiment.measure_verdict import (
    judge_measure,
    judge_memory,
    with_interval,
    with_scatter,
)
from kvpilot_operator.tuning.experiment.verdict import OPEN, Verdict, arms, overdue
from kvpilot_operator.tuning.observation import NO_COUNTS, ObservedReplica
from kvpilot_operator.tuning.pace import MIN_SCRAPES
from kvpilot_operator.tuning.state import Change, Phase, ReplicaRef

SETTLE_LIMIT = 3
"""The canary's backlog, and a larger quota that it fills, prolong settling up to so many times its length."""

FILLED = 0.9
"""Share of its budget that a cache holds once it is full: it holds whole blocks, and frees some ahead."""

LIFE_LIMIT = 8
"""An experiment that cannot be observed is given up so many verify times after its start."""

FIRST_PUSH = 1.5
"""A candidate that runs its change within so many ticks took the first push."""

PUSH_LIMIT = 4
"""Engines have so many settle times to take a configuration."""

CROSSOVER_INTERVALS = 6
"""Two replicas swap their arms after so many intervals without a verdict."""


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
            return give_up(context, draft, Verdict(reasons.CANARY_STALLED, text))
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
            since = context.now if change.widened else _pushed_at(context, change)
            return enter(context, draft, replace(change, measured_from=since), Phase.VERIFY)
        return enter(context, draft, change, Phase.SETTLE)
    if context.now - change.phase_since > PUSH_LIMIT * context.policy.pace.settle:
        message = f"{', '.join(behind)} did not take the configuration"
        return abort(context, draft, reasons.PUSH_FAILED, message)
    return draft


def _pushed_at(context: Context, change: Change) -> float:
    """When the candidate began to run the change, s since the epoch: with the decision, if the first push
    took; what it worked in the moment before can only hide a part of the gain."""
    at_once = context.now - change.phase_since < FIRST_PUSH * context.policy.pace.tick
    return change.phase_since if at_once else context.now


def _settled(context: Context, draft: Draft, change: Change) -> Draft:
    """Verify from a clean start: the canary's backlog is gone, and what its cache may hold more is filled."""
    elapsed, settle = context.now - change.phase_since, context.policy.pace.settle
    if elapsed < settle:
        return draft
    canary = next(replica for replica in context.everyone if replica.uid == change.canary_uid)
    busy = canary.engine is None or canary.engine.converging
    workers = value(candidate(context.config, change.values), "numWorkers")
    queued = canary.sample is None or not backlog_gone(canary.sample.gauges.waiting, 1, workers)
    if (busy or queued or _fills(change, canary)) and elapsed < SETTLE_LIMIT * settle:
        return draft
    return enter(context, draft, replace(change, measured_from=context.now), Phase.VERIFY)


def _fills(change: Change, canary: ObservedReplica) -> bool:
    """True while a larger quota is not filled: it cannot show its hits before.

    The pool is full once it evicts again, the host tier once nearly all that may be held is. Nothing that was
    held before is lost by the change, so the controls, which stay full, need not start anew.
    """
    leading, sample = change.values[0], canary.sample
    grows = leading.knob in {"maxTokens", "hostMemoryMb"} and leading.after > leading.before
    if not grows or sample is None:
        return False
    if leading.knob == "maxTokens":
        return sample.windows.get("short", NO_COUNTS).evicted_pages == 0
    held = sample.gauges.host or sample.gauges  # beside a device the pool is no part of the host's
    return held.cached_bytes < FILLED * held.budget_bytes


def _verified(context: Context, draft: Draft, change: Change) -> Draft:
    change, verdict = judge_change(context, change)
    draft = draft.with_state(change=change)
    if change.widened and change.others:
        return _verified_widely(context, draft, change, verdict)
    if verdict.name == OPEN:
        return _spread(context, draft, change) or _crossed(context, draft, change)
    if verdict.name != reasons.PROMOTED:
        return give_up(context, draft, verdict)
    if not change.widened and (half := _half(context, change)):
        return enter(context, draft, replace(change, widened=half, measured_from=0.0), Phase.CANARY)
    return accept(context, draft, change, verdict)


def _verified_widely(context: Context, draft: Draft, change: Change, verdict: Verdict) -> Draft:
    """On half of the controls a change is not asked again whether it helps, only whether it harms."""
    if verdict.name in {reasons.HARMFUL, reasons.TOO_FEW_REQUESTS}:
        return give_up(context, draft, verdict)
    if not verdict.evidence or context.now - change.measured_from < _stage_s(context):
        return draft
    return accept(context, draft, change, replace(verdict, name=reasons.PROMOTED, aborted=False))


def judge_change(context: Context, change: Change) -> tuple[Change, Verdict]:
    """The change with what its verification shows by now, and its verdict."""
    if not _measured(context, change):
        late = Verdict(reasons.TOO_FEW_REQUESTS, "the arms could not be measured in time", aborted=True)
        return change, late if overdue(context, change) else Verdict(OPEN, "")
    change = with_scatter(context, change)
    if change.measure == MEMORY:
        change = with_interval(context, change)
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
    return enter(context, draft, everywhere, Phase.CANARY)


def _crossed(context: Context, draft: Draft, change: Change) -> Draft:
    """Swap the arms of two replicas once, so that what their machines differ by falls out of the mean."""
    swaps = len(change.controls) == 1 and change.measure != MEMORY  # a pool takes its time to shrink
    if change.crossed_at or not swaps or change.tally.count < CROSSOVER_INTERVALS:
        return draft
    swapped = replace(
        change,
        canary=change.controls[0],
        controls=(change.canary,) if change.canary is not None else (),
        crossed_at=context.now,
        measured_from=0.0,
    )
    return enter(context, draft, swapped, Phase.CANARY)


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


def _promoted(context: Context, draft: Draft, change: Change) -> Draft:
    """Push to all replicas, then write the ConfigMap; done when that is observed."""
    promoted = context.observation.promoted
    if promoted is None:
        return draft
    if promoted.generation == change.generation:
        return finish(context, draft, change, overlaid=True)
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
    return draft if pending and not late else finish(context, draft, change, overlaid=False)


def _runs(context: Context, change: Change, replica: ObservedReplica) -> bool:
    return replica.engine is not None and runs(
        replica.engine, change.generation, candidate(context.config, change.values)
    )
