"""The ends of a change: promoted, reverted or aborted, and what is remembered of it."""

from __future__ import annotations

from dataclasses import replace

from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.assess.guards import DAY
from kvpilot_operator.tuning.configuration import overlay_with, value
from kvpilot_operator.tuning.context import Context, Draft, format_changes, sentence
from kvpilot_operator.tuning.decision import DecisionOutcome, WriteConfig
from kvpilot_operator.tuning.experiment.evidence import CAPACITY
from kvpilot_operator.tuning.experiment.verdict import Verdict, deadline_of
from kvpilot_operator.tuning.state import (
    MAX_BLOCKED_VALUES,
    MAX_REVERSALS,
    BlockedValue,
    Change,
    Phase,
    Reversal,
    TuningState,
    Watch,
)

TRIED = frozenset({Phase.CANARY, Phase.SETTLE, Phase.VERIFY})
"""Phases in which a change can be aborted without a verdict."""

INCONCLUSIVE_COOLDOWNS = 10
"""A value that showed nothing, or that an engine did not take, is blocked for so many cooldowns."""

TAKEN_BACK = "TakenBack"
"""Verdict of a change that restores on all replicas what was before another one."""

STANDING = frozenset({TAKEN_BACK, reasons.EMERGENCY})
"""Verdicts of what stands on the replicas that took it: one that takes nothing keeps it from no other."""


def abort(context: Context, draft: Draft, reason: str, message: str) -> Draft:
    """Abort the change in flight: nothing was proven, so no value is blocked."""
    return give_up(context, draft, Verdict(reason, message, aborted=True))


def accept(context: Context, draft: Draft, change: Change, verdict: Verdict) -> Draft:
    """Begin to promote a proven change."""
    canary = next(replica for replica in context.everyone if replica.uid == change.canary_uid)
    unproven = " (before/after on one replica, unproven)" if not change.controls else ""
    text = (
        f"{_clause(change.why)}{format_changes(change.values)} on canary {canary.name}; {verdict.effect}; "
        f"promoted as generation {change.generation}{unproven}."
    )
    draft = _record(context, draft, change, verdict, outcome="Promoted", text=text)
    return enter(context, draft, replace(change, verdict=verdict.name), Phase.PROMOTE)


def give_up(context: Context, draft: Draft, verdict: Verdict) -> Draft:
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
    return enter(context, draft, replace(change, verdict=named), Phase.REVERT)


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


def finish(context: Context, draft: Draft, change: Change, *, overlaid: bool) -> Draft:
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
        scatter_before=change.scatter_before,
    )


def _turns_back(state: TuningState, change: Change, context: Context) -> bool:
    """True if a promotion moves a knob back towards the user's value: it counts as a reversal."""
    leading = change.values[0]
    entry = next((item for item in state.overlay if item.knob == leading.knob), None)
    if entry is None:
        return False
    user = entry.based_on if entry.based_on is not None else value({}, leading.knob)
    if isinstance(leading.after, bool):
        return bool(leading.after == user)
    if not isinstance(leading.after, int | float):
        return True
    if user is None:
        return False
    return bool((entry.value - user) * (leading.after - leading.before) < 0)


def enter(context: Context, draft: Draft, change: Change, phase: Phase) -> Draft:
    """The change at the beginning of a phase; the first verification gets its deadline."""
    if phase is Phase.VERIFY and not change.deadline:
        change = replace(change, deadline=deadline_of(context, context.now))
    return draft.with_state(phase=phase, change=replace(change, phase_since=context.now))


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
