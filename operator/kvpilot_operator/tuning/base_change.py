"""Changes that others ask for: the user's edit of the base, an override, and a status that was lost."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.configuration import (
    effective,
    kept_overlay,
    overlay_between,
    overlay_with,
    value,
)
from kvpilot_operator.tuning.context import Context, Draft, format_value, sentence
from kvpilot_operator.tuning.decision import DecisionOutcome, WriteConfig
from kvpilot_operator.tuning.experiment.ends import STANDING, abort, watch_of
from kvpilot_operator.tuning.experiment.watch import watch_of_edit
from kvpilot_operator.tuning.state import MAX_GENERATIONS, Generation, KnobChange, OverlayEntry, Watch


def remember(context: Context, draft: Draft) -> Draft:
    """Raise epoch and generation to those of engines and ConfigMap; rebuild a lost state from there.

    Nothing runs a generation that was reverted. Each change had its own epoch, and what else made a
    generation wrote it to the ConfigMap, so that none is beyond the promoted one and the epochs together.
    """
    promoted, state, seen = context.observation.promoted, draft.state, context.observation
    if promoted is None:
        return draft
    engines = [replica.engine for replica in context.observation.replicas if replica.engine is not None]
    epoch = max([state.epoch, *(engine.epoch for engine in engines)])
    last = max([state.last_generation, promoted.generation, *(engine.generation for engine in engines)])
    if state.last_generation:
        return draft.with_state(epoch=epoch, last_generation=last)
    draft = draft.with_state(
        epoch=epoch,
        last_generation=max(last, promoted.generation + epoch, seen.recorded_generation),
        next_decision=max(state.next_decision, seen.recorded_decision + 1),
    )
    if promoted.generation == 1 and not epoch:
        return draft
    pinned = {(pin.knob, pin.value) for pin in seen.pins}
    # An edit that nothing has adopted yet must not pass for a tuned value: ``adopt_edit`` finds it.
    base = seen.base if seen.recorded_base is None else seen.recorded_base
    overlay = tuple(
        entry for entry in overlay_between(base, promoted.config) if (entry.knob, entry.value) not in pinned
    )
    return draft.with_state(overlay=overlay, cooldown_until=context.now + context.policy.pace.cooldown)


def adopt_edit(context: Context, draft: Draft) -> Draft:
    """Promote the user's edit; drop overlay entries whose base value or bounds changed."""
    promoted, base = context.observation.promoted, context.observation.base
    if promoted is None or any(isinstance(action, WriteConfig) for action in draft.actions):
        return draft
    kept, dropped = kept_overlay(base, draft.state.overlay, context.policy.bounds)
    wanted = effective(base, kept)
    # A promotion that the ConfigMap shows has joined the overlay by now.
    if wanted == dict(promoted.config):
        # What is dropped had no effect: a pin was over it, or the user asks for the same value.
        return draft.with_state(overlay=kept) if dropped else draft
    before = draft
    if draft.state.change is not None:
        kept, dropped = kept_overlay(base, settled_overlay(context, draft), context.policy.bounds)
        wanted = effective(base, kept)
        draft = abort(context, draft, reasons.SPEC_CHANGED, "the user changed the configuration")
    latest = draft.state.last_generation
    if any(item.key == _key(latest, wanted) for item in draft.state.reported):
        return draft.acting(WriteConfig(latest, wanted))  # written a short while ago, and not observed yet
    generation = latest + 1
    gone = ", ".join(f"{item.knob} (tuned to {format_value(item.value)})" for item in dropped)
    back = f"; back to the user's value: {gone}" if gone else ""
    edited = sorted(
        name for name in {*wanted, *promoted.config} if wanted.get(name) != promoted.config.get(name)
    )
    summary = f"The user's configuration changed in {', '.join(edited)}{back}; generation {generation}."
    changed = tuple(KnobChange(name, promoted.config.get(name), wanted.get(name)) for name in edited)
    # A change of the tuner is taken back where it does harm, and an edit only reported: the guard goes first.
    guard = _watch_that_stays(context, before, wanted)
    seen = guard if guard is not None and guard.own else watch_of_edit(context, draft.next_id, changed)
    draft = draft.recorded(context, rule="user-edit", outcome="Reset", summary=summary, generation=generation)
    draft = draft.with_state(overlay=kept, last_generation=generation, watch=seen)
    return draft.reporting(context, _key(generation, wanted)).acting(WriteConfig(generation, wanted))


def settled_overlay(context: Context, draft: Draft) -> tuple[OverlayEntry, ...]:
    """The overlay as it will be: what interrupts a change that stands must not undo it.

    A take-back would leave what did harm, and an emergency fill the memory again.
    """
    change, overlay = draft.state.change, draft.state.overlay
    if change is None or change.verdict not in STANDING:
        return overlay
    values = tuple(item for item in change.values if not _edited(context, overlay, item.knob))
    return overlay_with(context.observation.base, overlay, values, change.id)


def _edited(context: Context, overlay: tuple[OverlayEntry, ...], knob: str) -> bool:
    """True if the user's value of a knob is another one than when the promoted configuration was made."""
    entry = next((entry for entry in overlay if entry.knob == knob), None)
    known = context.config.get(knob) if entry is None else entry.based_on
    return bool(context.observation.base.get(knob) != known)


def _watch_that_stays(context: Context, draft: Draft, wanted: Mapping[str, Any]) -> Watch | None:
    """The watch over what runs everywhere, or over an emergency that is interrupted, while it stays in force.

    It ends where another configuration changes what it watches; any other one must not remove it.
    """
    change, seen = draft.state.change, draft.state.watch
    if change is not None:
        seen = watch_of(context, change) if change.verdict == reasons.EMERGENCY else None
    stays = seen is not None and all(value(wanted, item.knob) == item.after for item in seen.values)
    return seen if stays else None


def replace_overlay(
    context: Context,
    draft: Draft,
    overlay: tuple[OverlayEntry, ...],
    *,
    rule: str,
    outcome: DecisionOutcome,
    why: str,
    interrupts: tuple[str, str, frozenset[str] | None],
) -> Draft:
    """Promote another overlay that an override asks for, as a new generation.

    Args:
        interrupts: reason and message with which a change in flight is aborted if the configuration changes,
            or if it changes one of the knobs; None for any.
    """
    promoted = context.observation.promoted
    assert promoted is not None, "callers check it"
    wanted = effective(context.observation.base, overlay)
    same = wanted == dict(promoted.config)
    reason, message, knobs = interrupts
    watched = _watch_that_stays(context, draft, wanted)
    if (change := draft.state.change) is not None:
        concerned = knobs is None or any(item.knob in knobs for item in change.values)
        if concerned or not same:
            draft = abort(context, draft, reason, message)
    number = draft.state.last_generation + (not same)
    suffix = "" if same else f"; generation {number}"
    draft = draft.with_state(overlay=overlay, watch=watched)
    if same:
        return draft.recorded(context, rule=rule, outcome=outcome, summary=f"{sentence(why)}.")
    tuned = {entry.knob: entry.value for entry in overlay if not entry.pinned}
    noted = Generation(number, context.now, draft.next_id, outcome, json.dumps(tuned, separators=(",", ":")))
    draft = draft.recorded(
        context, rule=rule, outcome=outcome, summary=f"{sentence(why)}{suffix}.", generation=number
    ).with_state(
        last_generation=number,
        cooldown_until=max(draft.state.cooldown_until, context.now + context.policy.pace.cooldown),
        generations=(*draft.state.generations, noted)[-MAX_GENERATIONS:],
    )
    return draft.reporting(context, _key(number, wanted)).acting(WriteConfig(number, wanted))


def _key(generation: int, config: Mapping[str, Any]) -> str:
    digest = zlib.crc32(json.dumps(config, sort_keys=True).encode())
    return f"edit:{generation}:{digest:08x}"
