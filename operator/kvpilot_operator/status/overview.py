"""``kvpilot status``: the present state of a resource in a row of a table, or in a few lines. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic.alias_generators import to_camel

from kvpilot_engine.contract.wording import counted
from kvpilot_operator.resource.times import moment
from kvpilot_operator.status.model import ChangeStatus, PendingStatus, Status, value_text
from kvpilot_operator.status.overrides import name_of, overrides_of
from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.state import PIN

Json = Mapping[str, Any]


GOES_ON = ("bounds", "schedules", "boosts", "pins", "rollbacks")
"""What acts while the kill switch keeps tuning off."""


@dataclass(frozen=True)
class SwitchedOff:
    """The kill switch keeps tuning off.

    Attributes:
        since: RFC 3339.
        why: the option or the ConfigMap that says so, and who wrote it, where that is known.
        goes_on: what acts all the same.
    """

    since: str
    why: str
    goes_on: tuple[str, ...] = GOES_ON

    @property
    def text(self) -> str:
        """For people, after ``tuning is``."""
        *first, last = self.goes_on
        return f"off since {self.since}: {self.why}; {', '.join(first)} and {last} go on"


@dataclass(frozen=True)
class Override:
    """An override of the resource, in force or not."""

    name: str
    kind: str
    in_force: bool
    expires_at: str
    by: str
    reason: str
    message: str


@dataclass(frozen=True)
class Overview:
    """The present state of one resource.

    Attributes:
        off: by whom and why the kill switch keeps tuning off; None while tuning is not switched off.
        objectives: state (Met, Breached, Infeasible, Unknown) by name.
        change: the change in flight in words; "" without one.
        holds: reasons why no change begins, with their messages.
        pending: remedies that wait for an approval, in words.
        differs: knobs that differ from the user's base values, in words.
        last: the last decision in words; "" without one.
        ended: the local run that reconciled it has ended.
    """

    name: str
    namespace: str
    mode: str
    state: str
    off: SwitchedOff | None
    objectives: Mapping[str, str]
    ready: int
    replicas: int
    generation: int | None
    change: str
    pending: tuple[str, ...]
    holds: Mapping[str, str]
    overrides: tuple[Override, ...]
    differs: tuple[str, ...]
    last: str
    ended: bool = False

    def having(self, state: str) -> list[str]:
        """Names of the objectives in a state."""
        return [name for name, found in self.objectives.items() if found == state]

    @property
    def other_holds(self) -> list[str]:
        """Reasons of the holds besides the kill switch."""
        return [reason for reason in self.holds if reason != reasons.KILL_SWITCH]

    @property
    def objectives_text(self) -> str:
        """``3/4 met, p95 breached``."""
        judged = [name for name, state in self.objectives.items() if state != "Unknown"]
        if not judged:
            return "nothing judged"
        parts = [f"{len(self.having('Met'))}/{len(judged)} met"]
        for state, phrase in (("Breached", "breached"), ("Infeasible", "out of reach")):
            if names := self.having(state):
                parts.append(f"{', '.join(names)} {phrase}")
        return ", ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """For ``-o json``: camelCase."""
        plain = asdict(self)
        off = None if self.off is None else _camel(plain["off"])
        return plain | {"off": off, "overrides": [_camel(item) for item in plain["overrides"]]}

    def lines(self) -> Iterator[str]:
        """For people: everything."""
        if self.ended:
            yield f"The run of {self.name} has ended. Its last state:"
        yield f"{self.name} in {self.namespace}: mode {self.mode}, state {self.state}"
        generation = "none yet" if self.generation is None else str(self.generation)
        rows = [
            ("Tuning", [self.off.text] if self.off else []),
            ("Objectives", [self.objectives_text]),
            ("Replicas", [f"{self.ready} of {self.replicas} ready"]),
            ("Generation", [generation]),
            ("Differs", list(self.differs)),
            ("Change", [self.change] if self.change else []),
            ("Pending", [f"{item}: kvpilot approve {self.name} {item.split()[0]}" for item in self.pending]),
            ("Holds", [f"{reason}: {self.holds[reason]}" for reason in self.other_holds]),
            ("Overrides", [_override_text(item) for item in self.overrides]),
            ("Last", [self.last] if self.last else []),
        ]
        for label, values in rows:
            for index, value in enumerate(values):
                yield f"  {label if index == 0 else '':<11} {value}"


def _camel(plain: dict[str, Any]) -> dict[str, Any]:
    return {to_camel(key): value for key, value in plain.items()}


def _override_text(item: Override) -> str:
    who = f" by {item.by}" if item.by else ""
    why = f" ({item.reason})" if item.reason else ""
    state = f"until {item.expires_at}" if item.in_force else "not in force"
    limit = "" if item.in_force and item.message.startswith("in force") else f": {item.message}"
    return f"{item.kind} {state}{who}{why}, {item.name}{limit}"


def overview_of(manifest: Json, overrides: Iterable[Json], now: float, *, ended: bool = False) -> Overview:
    """The present state.

    Args:
        manifest: the whole object, status included.
        overrides: those of its namespace.
        now: s since the epoch.
    """
    spec, metadata = manifest.get("spec") or {}, manifest.get("metadata") or {}
    status = Status.model_validate(manifest.get("status") or {})
    tuning, last = status.tuning, status.decisions[-1:]
    return Overview(
        name=str(metadata.get("name", "")),
        namespace=str(metadata.get("namespace", "default")),
        mode=str((spec.get("tuning") or {}).get("mode", "Auto")),
        state=tuning.phase.value if tuning else "not reconciled yet",
        off=_switched_off(status),
        objectives={item.name: item.state for item in status.objectives},
        ready=status.ready_replicas or 0,
        replicas=status.replicas or 0,
        generation=status.config.generation if status.config else None,
        change=change_text(tuning.change) if tuning and tuning.change else "",
        pending=tuple(_pending_text(item) for item in tuning.pending) if tuning else (),
        holds={hold.reason: hold.message for hold in tuning.holds} if tuning else {},
        overrides=_overrides(manifest, list(overrides), now),
        differs=tuple(
            f"{item.knob} {value_text(item.value)}, base {value_text(item.based_on)}, by "
            f"{item.decision.replace(PIN, 'override ')}"
            for item in (status.config.overlay if status.config else ())
        ),
        last="".join(f"{item.id} {item.outcome} at {moment(item.at)}: {item.summary}" for item in last),
        ended=ended,
    )


def _switched_off(status: Status) -> SwitchedOff | None:
    holds = status.tuning.holds if status.tuning else ()
    found = (SwitchedOff(moment(h.since), h.message) for h in holds if h.reason == reasons.KILL_SWITCH)
    return next(found, None)


def change_text(change: ChangeStatus) -> str:
    """A change in flight: ``d-0042 tries numWorkers 8 -> 16 on chat-0``."""
    knobs = ", ".join(f"{c.knob} {value_text(c.before)} -> {value_text(c.after)}" for c in change.values)
    return f"{change.id} tries {knobs}" + (f" on {change.canary.name}" if change.canary else " everywhere")


def _pending_text(item: PendingStatus) -> str:
    knobs = ", ".join(f"{c.knob} {value_text(c.before)} -> {value_text(c.after)}" for c in item.values)
    what = knobs or counted(item.replicas, "replica")
    who = f"approved by {item.approved_by}" if item.approved_by else f"waits until {moment(item.expires)}"
    return f"{item.id} ({item.rule}): {what}, {who}"


def _overrides(manifest: Json, items: list[Json], now: float) -> tuple[Override, ...]:
    name = str((manifest.get("metadata") or {}).get("name", ""))
    specs = {name_of(item): item["spec"] for item in items}
    return tuple(
        Override(
            name=verdict.name,
            kind=verdict.kind,
            in_force=verdict.in_force,
            expires_at=moment(verdict.expires_at),
            by=str(specs[verdict.name].get("by", "")),
            reason=str(specs[verdict.name].get("reason", "")),
            message=verdict.message,
        )
        for verdict in overrides_of(items, name, manifest, now).verdicts
    )
