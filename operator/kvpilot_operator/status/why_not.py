"""``kvpilot explain --why-not KNOB``: why a knob is not changed now, as a colleague would say it. Pure.

The operator keeps records of what it does, and not of what it leaves; that follows from the spec, the status
and the overrides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kvpilot_engine.contract import knob as catalogued
from kvpilot_engine.contract.wording import counted
from kvpilot_operator.resource.errors import ManifestError
from kvpilot_operator.resource.model import KVCacheDeployment, field_bounds
from kvpilot_operator.resource.resolve import policy_of
from kvpilot_operator.resource.times import moment
from kvpilot_operator.status.conditions import NOT_EXPORTED
from kvpilot_operator.status.history import Entry
from kvpilot_operator.status.model import Status
from kvpilot_operator.status.overrides import Overrides
from kvpilot_operator.status.story import listing, punctuated, story
from kvpilot_operator.tuning.configuration import KNOBS, value
from kvpilot_operator.tuning.context import format_value
from kvpilot_operator.tuning.observation import OPTIONAL_COUNTS
from kvpilot_operator.tuning.policy import KnobBounds, Policy
from kvpilot_operator.tuning.reasons import COOLDOWN, PAUSED, REASONS
from kvpilot_operator.tuning.rules.order import REMEDIES, Remedy
from kvpilot_operator.tuning.state import PIN

Json = Mapping[str, Any]

MAX_LINES = 20
SIX_HOURS = 6 * 3600.0

_MEANING = {reason.name: reason.meaning for reason in REASONS}


@dataclass(frozen=True)
class Known:
    """What the answer is drawn from.

    Attributes:
        entries: every known decision, oldest first.
        policy: None if the present spec is invalid; then ``fault`` says why.
        now: s since the epoch.
    """

    manifest: Json
    status: Status
    entries: tuple[Entry, ...]
    overrides: Overrides
    now: float
    policy: Policy | None
    fault: str = ""


def known_of(
    manifest: Json, status: Status, entries: tuple[Entry, ...], overrides: Overrides, now: float
) -> Known:
    """What is known of a resource."""
    try:
        policy, fault = policy_of(KVCacheDeployment.parse(manifest).spec), ""
    except ManifestError as error:
        policy, fault = None, "; ".join(error.lines)
    return Known(manifest, status, entries, overrides, now, policy, fault)


def why_not(known: Known, name: str) -> list[str]:
    """At most 20 sentences: the knob's value, and why it is not changed now, the strongest reason first.

    Raises:
        ValueError: there is no such knob; names those that there are.
    """
    if name not in KNOBS:
        raise ValueError(f"there is no knob {name}; there are: {', '.join(KNOBS)}")
    lines = [_present(known, name)]
    moving = list(_moving(known, name))
    reasons = [] if moving else [*_forbidden(known, name), *_waiting(known), *_tried(known, name)]
    lines += moving or reasons or [_nothing(known)]
    if not moving:
        lines += _rules(known, name)
    if len(lines) > MAX_LINES:
        rest = len(lines) - MAX_LINES + 1
        lines = [*lines[: MAX_LINES - 1], f"There are {rest} more reasons; the first ones decide."]
    return lines


def _present(known: Known, name: str) -> str:
    """Its value, and where it comes from."""
    config = known.status.config
    entries = [item for item in (config.overlay if config else ()) if item.knob == name]
    base = (((known.manifest.get("spec") or {}).get("engine") or {}).get("config")) or {}
    pinned = next((item for item in entries if item.decision.startswith(PIN)), None)
    tuned = next((item for item in entries if item is not pinned), None)
    if pinned is not None:
        there = value(base, name) if tuned is None else tuned.value
        return f"{name} is {format_value(pinned.value)} by a pin; without it, it is {format_value(there)}."
    if tuned is None:
        source = "as the spec says" if name in base else "the default"
        return f"{name} is {format_value(value(base, name))}, {source}."
    made = next((entry for entry in reversed(known.entries) if entry.id == tuned.decision), None)
    when = f" at {moment(made.at)}" if made else ""
    was = "unset" if tuned.based_on is None else format_value(tuned.based_on)
    return f"{name} is {format_value(tuned.value)}; {tuned.decision} set it{when}, the spec has it {was}."


def _moving(known: Known, name: str) -> Iterator[str]:
    """That it is being changed, or waits for an approval."""
    tuning, who = known.status.tuning, known.manifest["metadata"]["name"]
    change = tuning.change if tuning else None
    for one in change.values if change else ():
        if one.knob == name and change is not None:
            where = f"on {change.canary.name}" if change.canary else "on all replicas"
            tried = f"{format_value(one.before)} -> {format_value(one.after)}"
            yield f"It is being changed right now: {change.id} tries {tried} {where}, for {change.objective}."
    for item in tuning.pending if tuning else ():
        for one in item.values:
            if one.knob == name:
                yield (
                    f"A change to {format_value(one.after)} waits for an approval until "
                    f"{moment(item.expires)}: kvpilot approve {who} {item.id}."
                )


def _forbidden(known: Known, name: str) -> Iterator[str]:
    """What the user or the engine rules out: it stays so until somebody changes it."""
    if known.fault:
        yield f"The present spec is invalid, and the last valid one is in force: {known.fault}."
    mode = (known.manifest.get("spec", {}).get("tuning") or {}).get("mode", "Auto")
    if mode in {"Off", "Recommend"}:
        does = "only measures" if mode == "Off" else "recommends changes and makes none"
        yield f"spec.tuning.mode is {mode}: kvpilot {does}."
    elif mode == "Approve":
        yield "spec.tuning.mode is Approve: a change of it waits until somebody approves it."
    for pin in known.overrides.pins:
        if pin.knob == name:
            yield (
                f"Override {pin.name} pins it to {format_value(pin.value)} until "
                f"{moment(pin.expires_at)}; kvpilot unpin ends that."
            )
    bounds = known.policy.bounds.get(name) if known.policy else None
    if bounds is not None:
        yield from _bounded(known, bounds)


def _bounded(known: Known, bounds: KnobBounds) -> Iterator[str]:
    entry = catalogued(bounds.knob)
    if not bounds.tune:
        yield "spec.tuning.knobs says tune: false, which keeps kvpilot's hands off it."
        return
    if bounds.direction != "Both":
        way = "up" if bounds.direction == "UpOnly" else "down"
        yield f"spec.tuning.knobs lets it go {way} only."
    present = _number(known, bounds.knob)
    if present is not None and present == bounds.maximum:
        more = "; spec.tuning.knobs can allow more" if field_bounds(entry.name)[1] > present else ""
        yield f"It is at its upper bound of {present:g}, so it can only go down{more}."
    elif present is not None and present == bounds.minimum:
        yield f"It is at its lower bound of {present:g}, so it can only go up."


def _number(known: Known, name: str) -> float | None:
    config = known.status.config
    effective = (config.effective if config else None) or {}
    found = effective.get(name)
    return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else None


def _waiting(known: Known) -> Iterator[str]:
    """What holds every change for now."""
    if known.overrides.paused_by:
        yield f"Tuning is paused by override {known.overrides.paused_by}; kvpilot resume ends that."
    tuning = known.status.tuning
    if tuning is None:
        yield "The resource is not reconciled yet."
        return
    for hold in tuning.holds:
        if hold.reason not in {PAUSED, COOLDOWN}:
            text = (hold.message or _MEANING.get(hold.reason, "")).rstrip(".")
            yield f"Nothing has begun since {moment(hold.since)}: {text} ({hold.reason})."
    if tuning.change is not None:
        names = ", ".join(item.knob for item in tuning.change.values)
        yield f"One change at a time: {tuning.change.id} tries {names} first."
    if tuning.cooldown_until and tuning.cooldown_until > known.now:
        until = moment(tuning.cooldown_until)
        yield f"The last change ended a short while ago; the next one may begin at {until}."
    objectives = [item for item in known.status.objectives if item.state in {"Breached", "Infeasible"}]
    if objectives and all(item.state == "Infeasible" for item in objectives):
        names = listing([item.name for item in objectives])
        yield f"What is missed is out of reach, so no knob is moved for it: {names}."
    if not objectives and not tuning.holds and tuning.change is None:
        yield "No objective is breached, so there is nothing that it should cure."


def _tried(known: Known, name: str) -> Iterator[str]:
    """What was tried with it and taken back."""
    tuning = known.status.tuning
    if tuning is None:
        return
    lately = sorted(item.at for item in tuning.reversals if item.knob == name)
    recent = [at for at in lately if at > known.now - SIX_HOURS]
    budget = known.policy.reversals_per_knob_6h if known.policy else None
    if recent and budget is not None and len(recent) >= budget:
        free = moment(recent[len(recent) - budget] + SIX_HOURS) if budget else ""
        until = f"; it is free again at {free}" if free else ""
        times = f"{counted(len(recent), 'time')} in six hours, as often as is allowed"
        yield f"It was changed and taken back {times}{until}."
    for blocked in tuning.blocked_values:
        if blocked.knob == name and blocked.until > known.now:
            yield (
                f"The value {format_value(blocked.value)} did harm, did not help enough, or was rolled back; "
                f"it is not tried again before {moment(blocked.until)}."
            )


def _rules(known: Known, name: str) -> Iterator[str]:
    """The rules that could move it, and what each one said last."""
    for remedy in REMEDIES:
        if name in remedy.knobs:
            yield _last_word(known, remedy, name)


def _last_word(known: Known, remedy: Remedy, name: str) -> str:
    if known.policy is not None and remedy.name in known.policy.disabled_rules:
        return f"Rule {remedy.name} would change it, and spec.tuning.disabledRules leaves it out."
    trusted = known.status.condition("MetricsTrusted")
    if trusted is not None:
        absent = trusted.message.partition(NOT_EXPORTED)[2]
        for metric in dict.fromkeys(OPTIONAL_COUNTS[item] for item in remedy.reads):
            if metric in absent:
                return f"Rule {remedy.name} stands aside, since not every engine exports {metric}."
    for entry in reversed(known.entries):
        when = moment(entry.at)
        if entry.rule == remedy.name:
            return f"Rule {remedy.name} last acted at {when} ({entry.id}): {_in_short(entry)}"
        for item in (entry.record or {}).get("rejected") or ():
            if item.get("rule") == remedy.name:
                said = item.get("message") or _MEANING.get(str(item.get("reason")), "")
                return (
                    f"Rule {remedy.name} stood back when {entry.id} was decided at {when}: {punctuated(said)}"
                )
    way = next(move.way for move in remedy.moves if move.knob == name)
    flag = catalogued(name).kind == "flag"
    does = {"up": "turns it on" if flag else "raises it", "down": "turns it off" if flag else "lowers it"}[
        way
    ]
    return f"Rule {remedy.name} {does} against {listing(remedy.cures)}; it had no reason to so far."


def _in_short(entry: Entry) -> str:
    """What a decision did, in a sentence."""
    sentences = () if entry.record is None else story(entry.record)
    return (
        sentences[0]
        if sentences and entry.outcome not in {"Started", "Proposed"}
        else punctuated(entry.summary)
    )


def _nothing(known: Known) -> str:
    names = ", ".join(item.name for item in known.status.objectives if item.state == "Breached")
    breached = f" of {names}" if names else ""
    return f"Nothing stands in its way, but no rule sees it as the cure{breached} at the moment."
