"""Pins: overrides that hold a knob at a value on all replicas while they are in force.

A pin is an entry of the overlay behind the tuned one of its knob, so the tuned value returns when it ends.
"""

from __future__ import annotations

from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.base_change import replace_overlay, settled_overlay
from kvpilot_operator.tuning.configuration import KNOBS, effective, is_valid, value
from kvpilot_operator.tuning.context import Context, Draft, at_text, format_value
from kvpilot_operator.tuning.observation import Pin
from kvpilot_operator.tuning.permission.overrides import refuse
from kvpilot_operator.tuning.state import PIN, OverlayEntry


def pin_of(context: Context, knob: str) -> Pin | None:
    """The pin of a knob in force: the first one where several contradict each other."""
    return next((pin for pin in context.observation.pins if pin.knob == knob), None)


def keep_pins(context: Context, draft: Draft) -> Draft:
    """Hold pinned knobs at their values, and give them back when their pins end."""
    if context.observation.promoted is None:
        return draft
    draft, pins = _obeyed(context, draft)
    base = context.observation.base
    wanted = tuple(OverlayEntry(pin.knob, base.get(pin.knob), pin.value, f"{PIN}{pin.name}") for pin in pins)
    held = tuple(entry for entry in draft.state.overlay if entry.pinned)
    if wanted == held:
        return draft
    tuned = tuple(entry for entry in draft.state.overlay if not entry.pinned)
    settled = tuple(entry for entry in settled_overlay(context, draft) if not entry.pinned)
    before, after = ({entry.knob: entry.value for entry in entries} for entries in (held, wanted))
    if before == after:
        return draft.with_state(overlay=(*tuned, *wanted))
    begun = [pin for pin in pins if before.get(pin.knob, pin) != pin.value]
    ended = [entry for entry in held if entry.knob not in after]
    there = effective(base, settled)
    parts = [
        f"{p.knob} is pinned at {format_value(p.value)} until {at_text(p.expires_at)} by override {p.name}"
        for p in begun
    ] + [
        f"the pin of {e.knob} by override {e.decision.removeprefix(PIN)} has ended, so it is "
        f"{format_value(value(there, e.knob))} again"
        for e in ended
    ]
    changed = frozenset({*(pin.knob for pin in begun), *(entry.knob for entry in ended)})
    return replace_overlay(
        context,
        draft,
        (*settled, *wanted),
        rule="pin",
        outcome="Pinned" if begun else "Unpinned",
        why="; ".join(parts),
        interrupts=(reasons.PINNED, f"{', '.join(sorted(changed))} is pinned", changed),
    )


def _obeyed(context: Context, draft: Draft) -> tuple[Draft, list[Pin]]:
    """The pins that can be obeyed, by knob; the others are refused once."""
    obeyed: dict[str, Pin] = {}
    for pin in context.observation.pins:
        if (why := _refused(context, pin, obeyed.get(pin.knob))) is not None:
            draft = refuse(context, draft, pin.name, "", why)
        elif pin.knob not in obeyed:
            obeyed[pin.knob] = pin
    return draft, [obeyed[knob] for knob in sorted(obeyed)]


def _refused(context: Context, pin: Pin, earlier: Pin | None) -> str | None:
    if earlier is not None and earlier.value != pin.value:
        return f"override {earlier.name} pins {pin.knob} to {format_value(earlier.value)}, which is obeyed"
    if pin.knob not in KNOBS:
        return f"{pin.knob} is no knob; set it in spec.engine.config"
    if not is_valid({**context.config, pin.knob: pin.value}):
        return f"{pin.knob} cannot be {format_value(pin.value)}"
    return None
