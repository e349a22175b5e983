"""One look: what was observed and what was made of it; and the draft of the decision that follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from kvpilot_operator.tuning.decision import Action, Diagnosis, Objective, Record, Rejected
from kvpilot_operator.tuning.objectives import judged_window
from kvpilot_operator.tuning.observation import Counts, Observation, Pod
from kvpilot_operator.tuning.policy import Policy
from kvpilot_operator.tuning.state import Hold, KnobChange, Phase, Told, TuningState

Traffic = Literal["Busy", "NoTraffic", "Stalled"]


@dataclass(frozen=True)
class Look:
    """Everything that the steps of a decision share. ``untrusted`` is set while the data cannot be used."""

    observation: Observation
    policy: Policy
    now: float
    untrusted: Hold | None
    traffic: Traffic
    objectives: tuple[Objective, ...]
    diagnosis: Diagnosis
    stalled: str = ""
    infeasible: str = ""

    @property
    def ready(self) -> tuple[Pod, ...]:
        """Pods that serve."""
        return self.observation.ready

    @property
    def short(self) -> Counts:
        """The short window over all ready pods."""
        return self.observation.counts("short")

    @property
    def long(self) -> Counts:
        """The long window over all ready pods."""
        return self.observation.counts("long")

    @property
    def config(self) -> Mapping[str, Any]:
        """The last known good configuration."""
        return self.observation.promoted.config if self.observation.promoted is not None else {}

    @property
    def memory(self) -> float:
        """The highest memory ratio of any ready pod."""
        return max((p.sample.gauges.memory_ratio for p in self.ready if p.sample is not None), default=0.0)

    @property
    def waiting(self) -> float:
        """Requests in all admission queues."""
        return sum(p.sample.gauges.waiting for p in self.ready if p.sample is not None)

    @property
    def draining(self) -> bool:
        """True when the engines work off their queues, and at this rate will be done within a long window.

        Requests that end then have waited as long as the backlog was: they tell how it was, not how it is.
        """
        window = judged_window(self.observation)
        counts = [pod.sample.windows.get(window, Counts()) for pod in self.ready if pod.sample is not None]
        drained = sum((c.judged - c.arrivals) / c.pod_seconds for c in counts if c.pod_seconds > 0)
        return 0 < self.waiting <= drained * self.policy.pace.long

    def breached(self, name: str) -> bool:
        """True when both windows show a breach of that objective."""
        return any(item.name == name and item.state == "Breached" for item in self.objectives)

    @property
    def serving_badly(self) -> bool:
        """True when an objective is breached that requests feel."""
        return any(
            item.state == "Breached" and item.name not in {"memory", "hitRate"} for item in self.objectives
        )


@dataclass(frozen=True)
class Draft:
    """A decision in the making. Every step returns the next one."""

    state: TuningState
    actions: tuple[Action, ...] = ()
    records: tuple[Record, ...] = ()
    holds: tuple[Hold, ...] = ()
    again: bool = False

    def with_state(self, **changes: Any) -> Draft:
        """The draft with fields of the state replaced."""
        return replace(self, state=replace(self.state, **changes))

    def acting(self, *actions: Action) -> Draft:
        """The draft with more to do."""
        return replace(self, actions=(*self.actions, *actions))

    def held(self, look: Look, reason: str, message: str) -> Draft:
        """The draft with one more reason why nothing is done; a reason that goes on keeps its beginning."""
        if any(hold.reason == reason for hold in self.holds):
            return self
        since = next((hold.since for hold in self.state.holds if hold.reason == reason), look.now)
        return replace(self, holds=(*self.holds, Hold(reason, message, since)))

    @property
    def acted(self) -> bool:
        """True when this look already decided something: one action per look."""
        return bool(self.records)

    @property
    def next_id(self) -> str:
        """The identity that the next record gets."""
        return f"d-{self.state.next_decision:04d}"

    def recorded(self, look: Look, **fields: Any) -> Draft:
        """The draft with one more record. An ``id`` that is given continues an earlier decision."""
        given = "id" in fields
        record = Record(
            **{
                "id": self.next_id,
                "at": look.now,
                "diagnosis": look.diagnosis,
                "objectives": look.objectives,
                **fields,
            }
        )
        number = self.state.next_decision + (0 if given else 1)
        return replace(self, records=(*self.records, record)).with_state(next_decision=number)

    def told_once(self, look: Look, key: str, **fields: Any) -> Draft:
        """The draft with a record of something that is only advised, once per ten cooldowns."""
        if any(item.key == key for item in self.state.told):
            return self
        told = (*self.state.told, Told(key, look.now))[-MOST_TOLD:]
        return self.recorded(look, **fields).with_state(told=told)


MOST_TOLD = 16
TOLD_COOLDOWNS = 10
"""A recommendation that still stands is repeated after so many cooldowns."""


@dataclass(frozen=True)
class Proposal:
    """One candidate change.

    Attributes:
        values: the leading knob first.
        objective: what it shall cure; its measure is what the verdict compares.
        predicted_gain: relative fall of that measure, 0 to 1.
        message: one clause with figures, for the record.
    """

    rule: str
    values: tuple[KnobChange, ...]
    objective: str
    predicted_gain: float
    message: str

    @property
    def told(self) -> str:
        """The change in words: ``numWorkers 2 -> 8, batchSize 2 -> 8``."""
        return told_changes(self.values)


@dataclass(frozen=True)
class Plan:
    """What the rules say: the cheapest proposal that promises relief, and why the others do not."""

    proposal: Proposal | None = None
    rejected: tuple[Rejected, ...] = ()


def told_changes(values: tuple[KnobChange, ...]) -> str:
    """A change in words."""
    return ", ".join(f"{v.knob} {told_value(v.before)} -> {told_value(v.after)}" for v in values)


def told_value(value: Any) -> str:
    """A value as people write it."""
    if value is None:
        return "unset"
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


IN_FLIGHT = frozenset(
    {Phase.CANARY, Phase.SETTLE, Phase.VERIFY, Phase.PROMOTE, Phase.REVERT, Phase.EMERGENCY}
)
"""Phases that only a change in flight has."""
