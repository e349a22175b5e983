"""The last promoted configurations, and the way back to one of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.assess.guards import DAY
from kvpilot_operator.tuning.base_change import replace_overlay
from kvpilot_operator.tuning.configuration import KNOBS, effective, value, within
from kvpilot_operator.tuning.context import Context, Draft, format_value
from kvpilot_operator.tuning.decision import WriteConfig
from kvpilot_operator.tuning.experiment.ends import TAKEN_BACK
from kvpilot_operator.tuning.observation import Promoted, Rollback
from kvpilot_operator.tuning.permission.overrides import answerable, handle, refuse
from kvpilot_operator.tuning.policy import KnobBounds
from kvpilot_operator.tuning.state import (
    MAX_BLOCKED_VALUES,
    MAX_GENERATIONS,
    BlockedValue,
    Generation,
    OverlayEntry,
    TuningState,
)

ROLLED_BACK: Final = "RolledBack"
"""Verdict of a generation that an override went back to."""


def note_generation(context: Context, draft: Draft) -> Draft:
    """Keep the promoted configuration as a way back, with the decision that made it and its verdict."""
    promoted, kept = context.observation.promoted, draft.state.generations
    if promoted is None or any(item.number == promoted.generation for item in kept):
        return draft
    change = draft.state.change
    made = change if change is not None and change.generation == promoted.generation else None
    by = ("", "Found") if made is None else (made.id, made.verdict)
    noted = Generation(promoted.generation, context.now, *by, _tuned(context, draft, promoted))
    return draft.with_state(generations=(*kept, noted)[-MAX_GENERATIONS:])


def _tuned(context: Context, draft: Draft, promoted: Promoted) -> str:
    """The tuned knobs of the configuration as JSON; a pin is none."""
    config, base = dict(promoted.config), context.observation.base
    tuned = {entry.knob: entry.value for entry in draft.state.overlay if not entry.pinned}
    for entry in draft.state.overlay:
        if entry.pinned:
            config[entry.knob] = tuned.get(entry.knob, base.get(entry.knob))
    found = {
        name: config[name]
        for name in KNOBS
        if config.get(name) is not None and config[name] != base.get(name)
    }
    return json.dumps(found, separators=(",", ":"))


def roll_back(context: Context, draft: Draft) -> Draft:
    """Restore the tuned knobs of an earlier generation, once for each override that asks for it.

    It waits while a pin is written: two generations in one decision, and no engine would ever run the first.
    """
    asked = context.observation.rollback
    if asked is None or context.observation.promoted is None or not answerable(draft, asked.name):
        return draft
    tried = draft.state.change and draft.state.change.generation
    if any(isinstance(action, WriteConfig) and action.generation != tried for action in draft.actions):
        return draft
    target = next((item for item in draft.state.generations if item.number == asked.to), None)
    if target is None:
        numbers = ", ".join(str(item.number) for item in draft.state.generations)
        message = f"generation {asked.to} is not kept; these are: {numbers}"
        return refuse(context, draft, asked.name, asked.by, message)
    base, held = context.observation.base, draft.state.overlay
    pins = tuple(entry for entry in held if entry.pinned)
    found = restored(base, context.policy.bounds, target, draft.next_id)
    before = effective(base, (entry for entry in held if not entry.pinned))
    after = effective(base, found)
    if before == after and draft.state.change is None:
        message = f"the tuned knobs are those of generation {asked.to} already"
        return refuse(context, draft, asked.name, asked.by, message)
    draft = _blocked(context, draft, before, after)
    draft = replace_overlay(
        context,
        draft,
        (*found, *pins),
        rule="rollback",
        outcome=ROLLED_BACK,
        why=f"Back to the tuned knobs of generation {asked.to}, {_differences(before, after)}, {_by(asked)}",
        interrupts=(reasons.ROLLED_BACK, f"{_by(asked)} goes back to generation {asked.to}", None),
    )
    return handle(draft, asked.name)


def generation_before(
    state: TuningState, present: int, base: Mapping[str, Any], bounds: Mapping[str, KnobBounds]
) -> int | None:
    """The newest kept generation before the present one to which a rollback changes something.

    One that was taken back, or that someone rolled back from, is no way back.
    """

    def tuned(item: Generation) -> dict[str, Any]:
        return effective(base, restored(base, bounds, item, ""))

    standing: list[Generation] = []
    for item in state.generations:
        if item.verdict in {TAKEN_BACK, ROLLED_BACK} and standing:
            left = tuned(standing[-1])
            # Those since the one that it goes back to are left; without that one here, the last is.
            known = any(tuned(one) == tuned(item) for one in standing)
            while standing and tuned(standing[-1]) != tuned(item) and (known or tuned(standing[-1]) == left):
                standing.pop()
        standing.append(item)
    now = effective(base, (entry for entry in state.overlay if not entry.pinned))
    earlier = (item.number for item in standing if item.number < present and tuned(item) != now)
    return max(earlier, default=None)


def restored(
    base: Mapping[str, Any], bounds: Mapping[str, KnobBounds], target: Generation, decision: str
) -> tuple[OverlayEntry, ...]:
    """The overlay of a generation over the present base; what the bounds now exclude stays out."""
    knobs = json.loads(target.knobs)
    return tuple(
        OverlayEntry(knob, base.get(knob), item, decision)
        for knob, item in knobs.items()
        if base.get(knob) != item and within(bounds.get(knob), item)
    )


def _blocked(context: Context, draft: Draft, before: Mapping[str, Any], after: Mapping[str, Any]) -> Draft:
    """Block the values that are rolled away from for a day."""
    left = tuple(
        BlockedValue(knob, value(before, knob), context.now + DAY) for knob in _changed(before, after)
    )
    others = tuple(
        item
        for item in draft.state.blocked_values
        if (item.knob, item.value) not in {(one.knob, one.value) for one in left}
    )
    return draft.with_state(blocked_values=(*others, *left)[-MAX_BLOCKED_VALUES:])


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return [name for name in KNOBS if value(before, name) != value(after, name)]


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    found = (
        f"{name} {format_value(value(before, name))} -> {format_value(value(after, name))}"
        for name in _changed(before, after)
    )
    return ", ".join(found) or "which are in force"


def _by(asked: Rollback) -> str:
    return f"by override {asked.name}" + (f" of {asked.by}" if asked.by else "")
