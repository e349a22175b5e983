"""``kvpilot explain``: what was done to a resource, why, and why no change is made now, in sentences.

Pure, and the same in a cluster and in local mode.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvpilot_operator.resource.times import to_rfc3339
from kvpilot_operator.status.history import Entry, history_of
from kvpilot_operator.status.model import Status
from kvpilot_operator.status.story import listing, punctuated, story
from kvpilot_operator.tuning.context import format_value
from kvpilot_operator.tuning.reasons import COOLDOWN, REASONS, SPEC_INVALID
from kvpilot_operator.tuning.state import PIN

Json = Mapping[str, Any]

_MEANING = {reason.name: reason.meaning for reason in REASONS}


@dataclass(frozen=True)
class Action:
    """One decision; ``story`` only if its whole record is kept."""

    id: str
    at: str
    rule: str
    outcome: str
    summary: str
    story: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """The content of ``kvpilot explain``.

    Attributes:
        actions: the last ones, oldest first.
        present: objectives, a change in flight, knobs that differ from the base.
        why_not: why no change is made now, one sentence each.
        ended: the run that reconciled the resource has ended; everything describes that moment.
    """

    name: str
    namespace: str
    mode: str
    state: str
    actions: tuple[Action, ...]
    present: tuple[str, ...]
    why_not: tuple[str, ...]
    ended: bool = False

    def as_json(self) -> dict[str, Any]:
        """For ``-o json``: camelCase."""
        plain = asdict(self)
        return {"whyNot" if key == "why_not" else key: value for key, value in plain.items()}

    def lines(self) -> list[str]:
        """For people."""
        who = f"{self.name} in {self.namespace}"
        lines = [f"The run of {who} has ended. Its last state:"] if self.ended else []
        lines += [f"{who}: mode {self.mode}, state {self.state}."]
        lines += [f"  {sentence}" for sentence in self.present]
        lines += ["", "Last actions:" if self.actions else "No action so far."]
        for action in self.actions:
            by = f" by {action.rule}" if action.rule else ""
            lines.append(f"  {action.at}  {action.id}  {action.outcome}{by}")
            lines += [f"      {sentence}" for sentence in action.story or (action.summary,)]
        if self.why_not:
            lines += ["", "Why no change is made:"]
            lines += [f"  {sentence}" for sentence in self.why_not]
        return lines


def explain(
    manifest: Json, records: Sequence[Json] = (), last: int = 5, now: float = 0.0, *, ended: bool = False
) -> Explanation:
    """The explanation of a resource.

    Args:
        manifest: the whole object, status included.
        records: whole decision records, oldest first, as JSON holds them.
        last: number of actions.
        now: s since the epoch; an obstacle that has expired by then is left out.
        ended: the run that reconciled the resource has ended.
    """
    spec, metadata = manifest.get("spec") or {}, manifest.get("metadata") or {}
    status = Status.model_validate(manifest.get("status") or {})
    mode = str((spec.get("tuning") or {}).get("mode", "Auto"))
    return Explanation(
        name=str(metadata.get("name", "")),
        namespace=str(metadata.get("namespace", "default")),
        mode=mode,
        state=status.tuning.phase.value if status.tuning else "not reconciled yet",
        actions=tuple(_action(entry) for entry in history_of(status, records)[-last:]) if last > 0 else (),
        present=tuple(_present(status, str(metadata.get("name", "")))),
        why_not=tuple(_why_not(status, mode, now, ended)),
        ended=ended,
    )


def _action(entry: Entry) -> Action:
    return Action(
        id=entry.id,
        at=to_rfc3339(entry.at if entry.record is None else int(entry.at)),
        rule=entry.rule,
        outcome=entry.outcome,
        summary=entry.summary,
        story=() if entry.record is None else story(entry.record),
    )


def _present(status: Status, name: str) -> Iterable[str]:
    for state, phrase in (("Breached", "Breached"), ("Infeasible", "Out of reach")):
        found = [item for item in status.objectives if item.state == state]
        if found:
            yield f"{phrase}: {', '.join(f'{item.name} since {to_rfc3339(item.since)}' for item in found)}."
    if met := [item.name for item in status.objectives if item.state == "Met"]:
        yield f"Met: {', '.join(met)}."
    change = status.tuning.change if status.tuning else None
    if change is not None:
        knobs = listing(
            [f"{c.knob} {format_value(c.before)} -> {format_value(c.after)}" for c in change.values]
        )
        where = f" on {change.canary.name}" if change.canary else " on all replicas"
        since = f"since {to_rfc3339(change.started_at)}"
        yield f"In flight {since}: {change.id} tries {knobs}{where}, for {change.objective}."
    for held in status.tuning.pending if status.tuning else ():
        until, command = to_rfc3339(held.expires), f"kvpilot approve {name} {held.id}"
        yield f"{held.id} ({held.rule}) waits for an approval until {until}: {command}."
    if status.config and status.config.overlay:
        knobs = ", ".join(
            f"{o.knob} {format_value(o.value)} (base {format_value(o.based_on)}, by "
            f"{o.decision.replace(PIN, 'override ')})"
            for o in status.config.overlay
        )
        yield f"Differs from the base: {knobs}."
    if status.overrides:
        yield f"Overrides in force: {', '.join(status.overrides)}."


def _why_not(status: Status, mode: str, now: float, ended: bool) -> Iterable[str]:
    if status.tuning is None and not status.conditions:
        yield "The resource is not reconciled yet" + ("." if ended else ": is the operator running?")
        return
    ready = status.condition("Ready")
    if ready and ready.reason == "InvalidSpec":
        yield f"The spec is invalid: {punctuated(ready.message)}"
    elif ready and ready.status == "False":
        since = to_rfc3339(ready.last_transition_time)
        yield f"Replicas are not ready since {since}: {punctuated(ready.message)}"
    if mode == "Off":
        yield "spec.tuning.mode is Off: kvpilot measures and changes nothing."
    elif mode == "Recommend":
        yield "spec.tuning.mode is Recommend: kvpilot recommends changes and makes none."
    elif mode == "Approve":
        yield "spec.tuning.mode is Approve: kvpilot makes the changes that somebody approves."
    yield from _obstacles(status, now)


def _obstacles(status: Status, now: float) -> Iterable[str]:
    tuning = status.tuning
    left = {SPEC_INVALID, COOLDOWN}  # what they follow from is shown
    holds = [hold for hold in tuning.holds if hold.reason not in left] if tuning else []
    for hold in holds:
        meaning = hold.message or _MEANING.get(hold.reason, "")
        yield f"{hold.reason} since {to_rfc3339(hold.since)}: {punctuated(meaning)}"
    paused = status.condition("Paused")
    if paused and paused.status == "True" and not any(hold.reason == "Paused" for hold in holds):
        yield punctuated(paused.message)
    for kind in ("FieldManagerConflict", "Infeasible", "EngineStalled"):
        item = status.condition(kind)
        if item and item.status == "True":
            yield f"{kind}: {punctuated(item.message)}"
    slo = status.condition("SLOMet")
    if slo and tuning and tuning.change is None and not tuning.holds:
        if slo.status == "True":
            yield "Every objective that can be judged is met: there is nothing to cure."
        elif slo.status == "Unknown":
            yield punctuated(slo.message)
    cooling = tuning is not None and (
        tuning.phase.value == "Cooldown" or any(hold.reason == COOLDOWN for hold in tuning.holds)
    )
    if tuning and tuning.cooldown_until and cooling:
        until = to_rfc3339(tuning.cooldown_until)
        yield f"The last change ended a short while ago; the next one may begin at {until}."
    for blocked in tuning.blocked_values if tuning else ():
        if blocked.until > now:
            what = f"{blocked.knob} {format_value(blocked.value)}"
            why = "it did harm, did not help enough, or was rolled back"
            yield f"{what} is blocked until {to_rfc3339(blocked.until)}: {why}."
