"""Context of one decision, and the draft that its steps complete."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.assess.capacity import Capacity
from kvpilot_operator.tuning.assess.forecast import offered
from kvpilot_operator.tuning.assess.objectives import judged_window, overflow
from kvpilot_operator.tuning.assess.outliers import FULLER, Outlier
from kvpilot_operator.tuning.assess.trust import Trust
from kvpilot_operator.tuning.decision import Action, Diagnosis, Objective, Record, Rejected, WriteConfig
from kvpilot_operator.tuning.observation import (
    NO_COUNTS,
    OPTIONAL_COUNTS,
    Counts,
    Observation,
    ObservedReplica,
    gauges_of,
)
from kvpilot_operator.tuning.policy import Policy
from kvpilot_operator.tuning.state import (
    MAX_REPORTED,
    Change,
    Hold,
    KnobChange,
    Phase,
    Prediction,
    Reported,
    TuningState,
)

Traffic = Literal["Busy", "NoTraffic", "Stalled"]

OVERLOAD = 1.05
"""Overflow from which on queues grow for more than chance."""

Scope = Literal["everywhere", "canary", "replicas"]
"""Where a remedy acts: on all replicas at once, on a canary first, or on the number of replicas."""


@dataclass(frozen=True)
class Context:
    """Everything that the steps of a decision share.

    Attributes:
        measured: the observation with the replicas that can be compared: trusted ones without outliers.
        capacity: what a mean one of them completes; None without a curve of step time or without work.
        max_work_s: how long the work of a request may take by the latency limits within reach, s.
        now: s since the epoch.
        trust: which replicas can be trusted, and what that permits.
        outliers: replicas that differ from the others by themselves.
        objectives: of all trusted replicas; ``curable`` are those of the comparable ones.
        stalled: replicas at which requests arrive and none ends, as a clause; "" without one.
        infeasible: which target is out of reach and why; "" without one.
    """

    observation: Observation
    measured: Observation
    capacity: Capacity | None
    max_work_s: float
    policy: Policy
    now: float
    trust: Trust
    outliers: tuple[Outlier, ...]
    traffic: Traffic
    objectives: tuple[Objective, ...]
    curable: tuple[Objective, ...]
    diagnosis: Diagnosis
    stalled: str = ""
    infeasible: str = ""

    @property
    def everyone(self) -> tuple[ObservedReplica, ...]:
        """Replicas that serve, whether they can be measured or not."""
        return self.observation.ready

    @property
    def ready(self) -> tuple[ObservedReplica, ...]:
        """Replicas that serve and can be compared."""
        return self.measured.ready

    @property
    def behind(self) -> tuple[ObservedReplica, ...]:
        """Replicas that run an older configuration than the promoted one, though they answer."""
        known = 0 if self.observation.promoted is None else self.observation.promoted.generation
        return tuple(r for r in self.everyone if r.engine is not None and r.engine.generation < known)

    @property
    def current(self) -> tuple[ObservedReplica, ...]:
        """Trusted replicas that are not behind: on them shows what the configuration does."""
        behind = {replica.uid for replica in self.behind}
        return tuple(replica for replica in self.trust.trusted if replica.uid not in behind)

    @property
    def overloaded(self) -> bool:
        """True if more requests arrive than end by themselves in the short window, so that queues grow."""
        return overflow(self.measured, "short") > OVERLOAD

    @property
    def short(self) -> Counts:
        """The short window over all ready replicas."""
        return self.measured.counts("short")

    @property
    def long(self) -> Counts:
        """The long window over all ready replicas."""
        return self.measured.counts("long")

    @property
    def config(self) -> Mapping[str, Any]:
        """The promoted configuration."""
        return self.observation.promoted.config if self.observation.promoted is not None else {}

    @property
    def relievable(self) -> tuple[ObservedReplica, ...]:
        """Trusted replicas whose memory a knob of all may relieve: none that is fuller by itself."""
        apart = {item.uid for item in self.outliers if item.clause == FULLER}
        return tuple(replica for replica in self.trust.trusted if replica.uid not in apart)

    @property
    def memory(self) -> float:
        """The highest memory ratio of the current replicas that can be relieved, of all such if none is."""
        current = {replica.uid for replica in self.current}
        alike = self.relievable
        judged = [replica for replica in alike if replica.uid in current] or alike
        return max((item.memory_ratio for item in gauges_of(judged)), default=0.0)

    @property
    def waiting(self) -> float:
        """Requests in all admission queues."""
        return sum(item.waiting for item in gauges_of(self.ready))

    def offered(self, window: str) -> float:
        """Requests/s that arrive at the deployment in a window.

        A replica without metrics gets as many as the others, unless it is new and none were scraped yet.
        """
        counted = self.trust.counted
        known = {replica.uid for replica in counted}
        since = self.now - self.observation.start_s - self.policy.pace.long
        unmeasured = sum(1 for r in self.everyone if r.uid not in known and r.created_at < since)
        return offered(counted, window, unmeasured)

    @property
    def draining(self) -> bool:
        """True if the queues shrink and at this rate are empty within a long window.

        Requests that end meanwhile waited in the backlog: their latency shows how it was, not how it is.
        """
        window = judged_window(self.measured)
        counts = [
            replica.sample.windows.get(window, NO_COUNTS)
            for replica in self.ready
            if replica.sample is not None
        ]
        drained = sum((c.judged - c.arrivals) / c.replica_seconds for c in counts if c.replica_seconds > 0)
        return 0 < self.waiting <= drained * self.policy.pace.long

    def absent(self, counts: Iterable[str]) -> str:
        """The first metric of these counts that not every measured replica exports; "" if all do."""
        windows = (self.short, self.long)
        missing = (item for item in counts if any(getattr(window, item) is None for window in windows))
        return next((OPTIONAL_COUNTS[item] for item in missing), "")

    def breached(self, name: str) -> bool:
        """True if the comparable replicas breach that objective."""
        return any(item.name == name and item.state == "Breached" for item in self.curable)

    @property
    def serving_badly(self) -> bool:
        """True if an objective is breached that requests feel."""
        return any(item.state == "Breached" and item.kind.felt for item in self.curable)

    @property
    def blocks(self) -> tuple[tuple[str, str], ...]:
        """Why no change may begin now: reasons and messages, the most important one first."""
        seen = self.observation
        found = (
            (reasons.KILL_SWITCH, seen.fleet.off) if seen.fleet.off else None,
            self.trust.too_few,
            (reasons.ROLLING_OUT, "the workload replaces its pods") if seen.rolling_out else None,
            (reasons.PAUSED, f"override {seen.paused_by} is in force") if seen.paused_by else None,
            (reasons.SPEC_INVALID, seen.spec_error) if seen.spec_error else None,
        )
        return tuple(item for item in found if item is not None)

    @property
    def relief_blocks(self) -> tuple[tuple[str, str], ...]:
        """Why not even relief of memory may be tried: it needs only trusted replicas that show the need."""
        lifted = self.trust.too_few if self.trust.nothing is None else None
        return tuple(item for item in self.blocks if item != lifted)

    @property
    def urgent_blocks(self) -> tuple[tuple[str, str], ...]:
        """Why not even what needs no arms may be done: more capacity, and the emergency on all replicas."""
        return tuple(item for item in self.relief_blocks if item[0] != reasons.ROLLING_OUT)


@dataclass(frozen=True)
class Draft:
    """The decision as far as it is made. Every step returns the next draft."""

    state: TuningState
    actions: tuple[Action, ...] = ()
    records: tuple[Record, ...] = ()
    holds: tuple[Hold, ...] = ()
    deciding: str = ""
    """The earlier decision that the next record continues; "" without one."""

    def with_state(self, **changes: Any) -> Draft:
        """The draft with fields of the state replaced."""
        return replace(self, state=replace(self.state, **changes))

    def acting(self, *actions: Action) -> Draft:
        """The draft with more actions."""
        return replace(self, actions=(*self.actions, *actions))

    def held(self, context: Context, reason: str, message: str) -> Draft:
        """The draft with one more reason why no change is made; a reason that continues keeps its start."""
        if any(hold.reason == reason for hold in self.holds):
            return self
        since = next((hold.since for hold in self.state.holds if hold.reason == reason), context.now)
        return replace(self, holds=(*self.holds, Hold(reason, message, since)))

    @property
    def acted(self) -> bool:
        """True if this decision has a record or writes a configuration: one change per decision.

        What came of an earlier one is no change.
        """
        recorded = any(record.outcome != "Measured" for record in self.records)
        return recorded or any(isinstance(action, WriteConfig) for action in self.actions)

    @property
    def next_id(self) -> str:
        """The identity that the next record gets."""
        return self.deciding or f"d-{self.state.next_decision:04d}"

    def continuing(self, decision: str) -> Draft:
        """The draft whose next record continues an earlier decision."""
        return replace(self, deciding=decision)

    def new_change(self, context: Context, proposal: Proposal, **fields: Any) -> Change:
        """The change that a proposal becomes: the next decision, epoch and generation, from now on."""
        return Change(
            id=self.next_id,
            rule=proposal.rule,
            values=proposal.values,
            epoch=self.state.epoch + 1,
            generation=self.state.last_generation + 1,
            started_at=context.now,
            phase_since=context.now,
            objective=proposal.objective,
            predicted_gain=proposal.predicted_gain,
            ratio=proposal.ratio,
            **fields,
        )

    def beginning(self, phase: Phase, change: Change) -> Draft:
        """The draft with a new change in flight."""
        return self.with_state(
            phase=phase, change=change, epoch=change.epoch, last_generation=change.generation
        )

    def recorded(self, context: Context, **fields: Any) -> Draft:
        """The draft with one more record. A given ``id`` continues an earlier decision."""
        given = "id" in fields or self.deciding
        record = Record(
            **{
                "id": self.next_id,
                "at": context.now,
                "diagnosis": context.diagnosis,
                "objectives": context.objectives,
                **fields,
            }
        )
        number = self.state.next_decision + (0 if given else 1)
        deciding = self.deciding if "id" in fields else ""
        draft = replace(self, records=(*self.records, record), deciding=deciding)
        return draft.with_state(next_decision=number)

    def reporting(self, context: Context, key: str) -> Draft:
        """The draft that remembers that ``key`` was reported now."""
        others = (item for item in self.state.reported if item.key != key)
        return self.with_state(reported=(*others, Reported(key, context.now))[-MAX_REPORTED:])

    def report_once(self, context: Context, key: str, **fields: Any) -> Draft:
        """The draft with a record without an action, unless ``key`` was reported (see ``decide.forget``)."""
        if any(item.key == key for item in self.state.reported):
            return self
        return self.recorded(context, **fields).reporting(context, key)


REPORT_COOLDOWNS = 10
"""A recommendation that still stands is repeated after so many cooldowns."""


@dataclass(frozen=True)
class Proposal:
    """One candidate change, of knobs or of the number of replicas.

    Attributes:
        values: the leading knob first; () for replicas.
        objective: what it should cure; the verdict compares its measure. "" for replicas.
        predicted_gain: relative fall of that measure, 0 to 1.
        message: one clause with figures, for the record.
        replicas: their number before and after; None for knobs.
        ratio: predicted step rate over the present one, above 1 for what adds capacity; below 1 the least
            that is left by what gives some up; 0 for what should leave it as it is.
        measure: what the arms are compared by, if that is not capacity or the objective's own measure.
        prediction: what should come of an action without arms; None for what is tried on a canary, and where
            nothing is known.
        strained: share of the replicas' capacity that was in use when requests waited all the same; 0 if they
            did not, or that is unknown.
    """

    rule: str
    values: tuple[KnobChange, ...]
    objective: str
    predicted_gain: float
    message: str
    replicas: tuple[int, int] | None = None
    ratio: float = 0.0
    measure: str = ""
    strained: float = 0.0
    prediction: Prediction | None = None

    @property
    def predicted(self) -> Mapping[str, Any]:
        """The prediction for the record of an action without arms; empty without one."""
        return {} if self.prediction is None else self.prediction.evidence

    @property
    def summary(self) -> str:
        """The change in words: ``numWorkers 2 -> 8, batchSize 2 -> 8`` or ``replicas 3 -> 4``."""
        if self.replicas is not None:
            return f"replicas {self.replicas[0]} -> {self.replicas[1]}"
        return format_changes(self.values)

    @property
    def promise(self) -> str:
        """What it should do, as the end of a clause."""
        return f"should gain {self.predicted_gain:.0%}" if self.predicted_gain else "should help"

    @property
    def sentence(self) -> str:
        """The message as the beginning of a sentence."""
        return sentence(self.message)


Found = Proposal | tuple[str, str]
"""What a remedy finds: a proposal, or the reason and the message of its rejection."""


@dataclass(frozen=True)
class Plan:
    """What the remedies propose: the first proposal of each scope that stands, and why the others do not.

    Attributes:
        everywhere: made on all replicas at once.
        canary: proven on a canary first.
        replicas: another number of replicas.
    """

    everywhere: Proposal | None = None
    canary: Proposal | None = None
    replicas: Proposal | None = None
    rejected: tuple[Rejected, ...] = ()

    def with_proposal(self, scope: Scope, proposal: Proposal) -> Plan:
        """The plan with the proposal of one scope."""
        match scope:
            case "everywhere":
                return replace(self, everywhere=proposal)
            case "canary":
                return replace(self, canary=proposal)
            case "replicas":
                return replace(self, replicas=proposal)


def sentence(text: str) -> str:
    """A clause as the beginning of a sentence; the name of a knob keeps its spelling."""
    first = text.partition(" ")[0]
    return text if first != first.lower() else text[:1].upper() + text[1:]


def format_changes(values: tuple[KnobChange, ...]) -> str:
    """A change in words."""
    return ", ".join(f"{v.knob} {format_value(v.before)} -> {format_value(v.after)}" for v in values)


def format_value(value: Any) -> str:
    """A knob's value as users write it."""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def at_text(seconds: float) -> str:
    """A time (s since the epoch) as people read it: to the minute, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


IN_FLIGHT = frozenset(
    {Phase.CANARY, Phase.SETTLE, Phase.VERIFY, Phase.PROMOTE, Phase.REVERT, Phase.EMERGENCY}
)
"""Phases of a change in flight."""
