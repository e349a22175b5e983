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
from kvpilot_operator.tuning.reasons import REASONS, SPEC_INVALID

Json = Mapping[str, Any]

_MEANING = {reason.name: reason.meaning for reason in REASONS}

_DIAGNOSED = frozenset({"Started", "Recommended", "Proposed", "ScaledOut"})
"""Outcomes that follow from the diagnosis in their record, as in ``local/report.html``."""

_VERBS = {
    "Started": "Tries",
    "Promoted": "Changed",
    "Reverted": "Tried and reverted",
    "Aborted": "Tried and aborted",
    "Recommended": "Recommends",
    "Proposed": "Would change",
    "Withdrawn": "No longer proposes",
    "Reset": "Changed",
    "Harmful": "Found harmful",
    "Recycled": "Replaced",
}
"""What an outcome did with the knobs of its record."""


@dataclass(frozen=True)
class Action:
    """One decision; ``details`` only if its whole record is kept."""

    id: str
    at: str
    rule: str
    outcome: str
    summary: str
    details: tuple[str, ...] = ()


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
            lines.append(f"      {action.summary}")
            lines += [f"      {detail}" for detail in action.details]
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
        details=() if entry.record is None else tuple(_details(entry.record)),
    )


def _details(record: Json) -> Iterable[str]:
    changes = [
        f"{c['knob']} {_value(c['before'])} -> {_value(c['after'])}" for c in record.get("changes") or ()
    ]
    if changes:
        verb = _VERBS.get(str(record["outcome"]), "Changed")
        yield f"{verb}: {', '.join(changes)}{_generation(record)}."
    if replicas := record.get("replicas"):
        yield f"Replicas: {replicas[0]} -> {replicas[1]}."
    diagnosis = record.get("diagnosis")
    if diagnosis and record["outcome"] in _DIAGNOSED:
        yield f"Because: {_sentence(diagnosis.get('message') or diagnosis['reason'])}"
        if shares := _shares(diagnosis.get("stages") or ()):
            yield f"Stages: {shares}."
    if record.get("canary"):
        controls = ", ".join(record.get("controls") or ()) or "its own past"
        yield f"Canary {record['canary']}, compared with {controls}."
    for rejected in record.get("rejected") or ():
        yield f"Rejected: {rejected['rule']}: {_sentence(rejected.get('message') or rejected['reason'])}"


def _generation(record: Json) -> str:
    if (generation := record.get("generation")) is None:
        return ""
    kept = record["outcome"] not in {"Reverted", "Aborted"}
    return f" (generation {generation})" if kept else f" (back to generation {generation})"


def _shares(stages: Iterable[Json]) -> str:
    largest = sorted(stages, key=lambda stage: -float(stage["share"]))[:3]
    return ", ".join(
        f"{s['stage'].replace('_', ' ')} {float(s['share']):.0%}" for s in largest if s["share"] > 0
    )


def _present(status: Status, name: str) -> Iterable[str]:
    for state, phrase in (("Breached", "breached"), ("Infeasible", "out of reach")):
        for item in status.objectives:
            if item.state == state:
                yield f"{item.name} is {phrase} since {to_rfc3339(item.since)}."
    if met := [item.name for item in status.objectives if item.state == "Met"]:
        yield f"Met: {', '.join(met)}."
    change = status.tuning.change if status.tuning else None
    if change is not None:
        knobs = ", ".join(f"{c.knob} {_value(c.before)} -> {_value(c.after)}" for c in change.values)
        where = f" on canary {change.canary.name}" if change.canary else ""
        since = f"since {to_rfc3339(change.started_at)}"
        yield f"In flight: {change.id} tries {knobs}{where} for {change.objective}, {since}."
    for held in status.tuning.pending if status.tuning else ():
        until, command = to_rfc3339(held.expires), f"kvpilot approve {name} {held.id}"
        yield f"{held.id} ({held.rule}) waits for an approval until {until}: {command}."
    if status.config and status.config.overlay:
        knobs = ", ".join(
            f"{o.knob} {_value(o.value)} (base {_value(o.based_on)}, by {o.decision})"
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
        yield f"The spec is invalid: {_sentence(ready.message)}"
    elif ready and ready.status == "False":
        since = to_rfc3339(ready.last_transition_time)
        yield f"Replicas are not ready since {since}: {_sentence(ready.message)}"
    if mode == "Off":
        yield "spec.tuning.mode is Off: kvpilot measures and changes nothing."
    elif mode == "Recommend":
        yield "spec.tuning.mode is Recommend: kvpilot recommends changes and makes none."
    elif mode == "Approve":
        yield "spec.tuning.mode is Approve: kvpilot makes the changes that somebody approves."
    yield from _obstacles(status, now)


def _obstacles(status: Status, now: float) -> Iterable[str]:
    tuning = status.tuning
    holds = [hold for hold in tuning.holds if hold.reason != SPEC_INVALID] if tuning else []
    for hold in holds:
        meaning = hold.message or _MEANING.get(hold.reason, "")
        yield f"{hold.reason} since {to_rfc3339(hold.since)}: {_sentence(meaning)}"
    paused = status.condition("Paused")
    if paused and paused.status == "True" and not any(hold.reason == "Paused" for hold in holds):
        yield _sentence(paused.message)
    for kind in ("FieldManagerConflict", "Infeasible", "EngineStalled"):
        item = status.condition(kind)
        if item and item.status == "True":
            yield f"{kind}: {_sentence(item.message)}"
    slo = status.condition("SLOMet")
    if slo and tuning and tuning.change is None and not holds:
        if slo.status == "True":
            yield "Every objective that can be judged is met: there is nothing to cure."
        elif slo.status == "Unknown":
            yield _sentence(slo.message)
    if tuning and tuning.cooldown_until and tuning.phase.value == "Cooldown":
        yield f"The last change is cooling down until {to_rfc3339(tuning.cooldown_until)}."
    for blocked in tuning.blocked_values if tuning else ():
        if blocked.until > now:
            what = f"{blocked.knob} {_value(blocked.value)}"
            yield f"{what} harmed or did not help: blocked until {to_rfc3339(blocked.until)}."


def _value(value: Any) -> str:
    if value is None:
        return "default"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."
