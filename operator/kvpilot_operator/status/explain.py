"""What was done to a resource, why, and why nothing is done now, in sentences.

Pure, and the same in a cluster and in local mode.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvpilot_operator.spec.status_model import Status
from kvpilot_operator.spec.times import from_rfc3339, to_rfc3339
from kvpilot_operator.tuning.reasons import REASONS

Json = Mapping[str, Any]

_MEANING = {reason.name: reason.meaning for reason in REASONS}
_TAKEN = "(without a reason)"

_DIAGNOSED = frozenset({"Started", "Recommended", "ScaledOut"})
"""Outcomes that the diagnosis of their look led to, as in ``local/report.html``; the others have one too."""


@dataclass(frozen=True)
class Action:
    """One decision that was acted on, told or taken back; ``details`` only where the whole record is kept."""

    id: str
    at: str
    rule: str
    outcome: str
    summary: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """Everything that ``kvpilot explain`` tells.

    Attributes:
        actions: the last ones, oldest first.
        present: what is the case now: objectives, a change in flight, knobs that differ from the base.
        why_not: why nothing is done now, one sentence each; empty while something is being done.
        ended: nobody looks after the resource any more: all of this is how it was when that ended.
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
        who = f"The run of {who} has ended. When it ended" if self.ended else who
        told = [f"{who}: mode {self.mode}, state {self.state}."]
        told += [f"  {sentence}" for sentence in self.present]
        told += ["", "Last actions:" if self.actions else "No action so far."]
        for action in self.actions:
            told.append(f"  {action.at}  {action.id}  {action.outcome} by {action.rule or _TAKEN}")
            told.append(f"      {action.summary}")
            told += [f"      {detail}" for detail in action.details]
        if self.why_not:
            told += ["", f"Why nothing {'was done when it ended' if self.ended else 'is done now'}:"]
            told += [f"  {sentence}" for sentence in self.why_not]
        return told


def explain(
    manifest: Json, records: Sequence[Json] = (), last: int = 5, now: float = 0.0, *, ended: bool = False
) -> Explanation:
    """The explanation of a resource.

    Args:
        manifest: the whole object, status included.
        records: whole decision records, oldest first, as JSON holds them.
        last: how many actions are told.
        now: s since the epoch; what has ended by then is not told as an obstacle.
        ended: nobody looks after the resource any more, so that its status is told as the past.
    """
    spec, metadata = manifest.get("spec") or {}, manifest.get("metadata") or {}
    status = Status.model_validate(manifest.get("status") or {})
    mode = str((spec.get("tuning") or {}).get("mode", "Auto"))
    return Explanation(
        name=str(metadata.get("name", "")),
        namespace=str(metadata.get("namespace", "default")),
        mode=mode,
        state=status.tuning.state.value if status.tuning else "not looked at yet",
        actions=_actions(status, records)[-last:] if last > 0 else (),
        present=tuple(_present(status, ended)),
        why_not=tuple(_why_not(status, mode, now, ended)),
        ended=ended,
    )


def _actions(status: Status, records: Sequence[Json]) -> tuple[Action, ...]:
    """Whole records where they are kept, summaries of the status for the rest, by time."""
    found = {
        (item.id, item.outcome): (
            from_rfc3339(item.at),
            Action(item.id, item.at, item.rule, item.outcome, item.summary),
        )
        for item in status.decisions
    }
    for record in records:
        moment = float(record["at"])
        action = Action(
            id=str(record["id"]),
            at=to_rfc3339(int(moment)),
            rule=str(record.get("rule", "")),
            outcome=str(record["outcome"]),
            summary=str(record.get("summary", "")),
            details=tuple(_details(record)),
        )
        found[action.id, action.outcome] = (moment, action)
    return tuple(action for _, action in sorted(found.values(), key=lambda pair: pair[0]))


def _details(record: Json) -> Iterable[str]:
    changes = [
        f"{c['knob']} {_value(c['before'])} -> {_value(c['after'])}" for c in record.get("changes") or ()
    ]
    if changes:
        yield f"Changed: {', '.join(changes)}{_generation(record)}."
    if replicas := record.get("replicas"):
        yield f"Replicas: {replicas[0]} -> {replicas[1]}."
    diagnosis = record.get("diagnosis")
    if diagnosis and record["outcome"] in _DIAGNOSED:
        yield f"Because: {_sentence(diagnosis.get('message') or diagnosis['reason'])}"
        if shares := _shares(diagnosis.get("stages") or ()):
            yield f"Stages: {shares}."
    if record.get("canary_uid"):
        controls = len(record.get("control_uids") or ())
        yield f"Canary {record['canary_uid']}, compared with {controls} other {_plural(controls, 'engine')}."
    for rejected in record.get("rejected") or ():
        yield f"Not taken: {rejected['rule']}: {_sentence(rejected.get('message') or rejected['reason'])}"


def _generation(record: Json) -> str:
    return f" (generation {record['generation']})" if record.get("generation") is not None else ""


def _shares(stages: Iterable[Json]) -> str:
    largest = sorted(stages, key=lambda stage: -float(stage["share"]))[:3]
    return ", ".join(
        f"{s['stage'].replace('_', ' ')} {float(s['share']):.0%}" for s in largest if s["share"] > 0
    )


def _present(status: Status, ended: bool) -> Iterable[str]:
    for state, told in (("Breached", "breached"), ("Infeasible", "out of reach")):
        for item in status.objectives:
            if item.state == state:
                yield f"{item.name} {'was' if ended else 'is'} {told} since {item.since}."
    if met := [item.name for item in status.objectives if item.state == "Met"]:
        yield f"Met: {', '.join(met)}."
    change = status.tuning.change if status.tuning else None
    if change is not None:
        knobs = ", ".join(f"{c.knob} {c.before} -> {c.after}" for c in (*change.leading, *change.also))
        where = f" on canary {change.canary_uid}" if change.canary_uid else ""
        since = f"since {change.started_at}"
        tries = "tried" if ended else "tries"
        yield f"In flight: {change.id} {tries} {knobs}{where} for {change.objective}, {since}."
    if status.config and status.config.overlay:
        knobs = ", ".join(
            f"{o.knob} {o.value} (base {'default' if o.based_on == 'null' else o.based_on}, by {o.decision})"
            for o in status.config.overlay
        )
        yield f"{'Differed' if ended else 'Differs'} from the base: {knobs}."
    if status.overrides:
        yield f"Overrides in force: {', '.join(status.overrides)}."


def _why_not(status: Status, mode: str, now: float, ended: bool) -> Iterable[str]:
    conditions = {item.type: item for item in status.conditions}
    if status.tuning is None and not conditions:
        if ended:
            yield "kvpilot had not looked at this resource yet."
        else:
            yield "kvpilot has not looked at this resource yet: is the operator running?"
        return
    ready = conditions.get("Ready")
    if ready and ready.reason == "InvalidSpec":
        yield f"The spec {'could not' if ended else 'cannot'} be used: {_sentence(ready.message)}"
        return
    if mode == "Off":
        did = "was Off: kvpilot measured and tuned" if ended else "is Off: kvpilot measures and tunes"
        yield f"spec.tuning.mode {did} nothing."
    elif mode == "Recommend":
        did = "was Recommend: kvpilot said" if ended else "is Recommend: kvpilot says"
        yield f"spec.tuning.mode {did} what it would do and {'tuned' if ended else 'tunes'} nothing."
    yield from _obstacles(status, conditions, now, ended)


def _obstacles(status: Status, conditions: Mapping[str, Any], now: float, ended: bool) -> Iterable[str]:
    tuning = status.tuning
    holds = tuning.holds if tuning else ()
    for hold in holds:
        meaning = hold.message or _MEANING.get(hold.reason, "")
        yield f"{hold.reason} since {hold.since}: {_sentence(meaning)}"
    paused = conditions.get("Paused")
    if paused and paused.status == "True" and not any(hold.reason == "Paused" for hold in holds):
        yield _sentence(paused.message)
    for kind in ("ActuatorConflict", "Infeasible", "EngineStalled"):
        item = conditions.get(kind)
        if item and item.status == "True":
            yield f"{kind}: {_sentence(item.message)}"
    if tuning and tuning.change is None and not holds:
        slo = conditions.get("SLOMet")
        if slo and slo.status == "True":
            if ended:
                yield "Every objective that could be judged was met: there was nothing to cure."
            else:
                yield "Every objective that can be judged is met: there is nothing to cure."
        elif slo and slo.status == "Unknown":
            yield _sentence(slo.message)
    if tuning and tuning.cooldown_until and tuning.state.value == "Cooldown":
        yield f"The last change {'was' if ended else 'is'} cooling down until {tuning.cooldown_until}."
    for barred in tuning.barred if tuning else ():
        if from_rfc3339(barred.until) <= now:
            continue
        yield f"{barred.knob} {barred.value} did harm or no good: not tried again before {barred.until}."


def _value(value: Any) -> str:
    if value is None:
        return "default"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else f"{noun}s"
