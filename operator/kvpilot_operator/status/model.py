"""The status of a resource as the API server holds it. Live numbers are metrics and are not here.

In memory, times are seconds since the epoch and knob values have their own type. On the wire, times are RFC
3339 in UTC with milliseconds; knob values and other non-integers are text, since one list holds values of
every type and a CustomResourceDefinition should not hold floating-point numbers. The parts of ``tuning`` have
the field names of ``tuning.state``, from which ``status.codec`` makes them.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema
from pydantic.alias_generators import to_camel

from kvpilot_operator.resource.times import from_rfc3339, to_rfc3339
from kvpilot_operator.tuning.state import (
    MAX_BLOCKED_VALUES,
    MAX_CONTROLS,
    MAX_EXPECTED,
    MAX_GENERATIONS,
    MAX_HANDLED,
    MAX_HOLDS,
    MAX_LONGEST,
    MAX_MARKS,
    MAX_PENDING,
    MAX_REPORTED,
    MAX_REVERSALS,
    MAX_SPENT,
    Phase,
)

MAX_DECISIONS = 10
DECISION_BYTES = 512

STATUS_BYTES, KEPT_GENERATIONS = 16 * 1024, 2
"""A larger status drops its oldest decisions, then its oldest generations, of which it keeps so many."""

TEXT_LIMITS = (256, 128, 56, 40)
"""Then it cuts texts for people to so many characters, the first number that suffices."""


def value_text(value: Any) -> str:
    """A knob value as text: JSON, but text that is no JSON stays as it is, e.g. ``16``, ``true``, ``lru``."""
    return value if isinstance(value, str) and value_of(value) == value else json.dumps(value)


def value_of(text: Any) -> Any:
    """The inverse; a value that is not text is returned as it is."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text


def _seconds(time: Any) -> Any:
    # Rounded as on the wire, so that a status that was written and read again is equal.
    return from_rfc3339(time) if isinstance(time, str) else time and round(time * 1000) / 1000


Time = Annotated[
    float,
    BeforeValidator(_seconds),
    PlainSerializer(to_rfc3339),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]
OptionalTime = Annotated[Time | None, BeforeValidator(lambda time: time or None)]
"""Absent for 0, which is no time."""
KnobValue = Annotated[
    Any, BeforeValidator(value_of), PlainSerializer(value_text), WithJsonSchema({"type": "string"})
]
Number = Annotated[float, PlainSerializer(repr, return_type=str), WithJsonSchema({"type": "string"})]


class _Status(BaseModel):
    # Fields of a newer operator are dropped, not refused: operator N reads what N+1 wrote.
    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=to_camel, populate_by_name=True)


RATIO = "Predicted step rate over the one before, or the least that is left of it; 0 where it stays."


class OverlayStatus(_Status):
    """A knob that differs from the user's base value."""

    knob: str = Field(description="Name of the knob.")
    based_on: KnobValue = Field(
        description="Base value that it replaces; the entry is dropped when the base changes."
    )
    value: KnobValue = Field(description="Value in force.")
    decision: str = Field(description="ID of the decision that set it.")


class ConfigStatus(_Status):
    """The promoted configuration: the owned ConfigMap holds it, and engines start with it."""

    generation: int | None = Field(None, description="Generation of the promoted configuration.")
    hash: str | None = Field(None, description="Digest of the effective configuration, 8 hexadecimal digits.")
    effective: dict[str, Any] | None = Field(
        None,
        description="The promoted configuration with every default filled in.",
        json_schema_extra={"x-kubernetes-preserve-unknown-fields": True},
    )
    overlay: tuple[OverlayStatus, ...] = Field(
        (), description="Knobs that differ from the user's base values."
    )


class ObjectiveStatus(_Status):
    """State of one objective."""

    name: str = Field(description="Name of the objective.")
    state: Literal["Met", "Breached", "Unknown", "Infeasible"] = Field(
        description="Infeasible: missed, and known to be out of reach. Unknown: no data to judge by."
    )
    since: Time = Field(description="When this state began.")


class KnobChangeStatus(_Status):
    """One knob of a change."""

    knob: str = Field(description="Name of the knob.")
    before: KnobValue = Field(alias="from", description="Value before the change.")
    after: KnobValue = Field(alias="to", description="Value that is tried.")


class MeasureStatus(_Status):
    """A measurement before the change, as the ratio bad / of."""

    name: str = Field(description="What is measured.")
    bad: Number = Field(description="Numerator, e.g. requests over a latency limit.")
    of: Number = Field(description="Denominator, e.g. all judged requests.")


class ReplicaRefStatus(_Status):
    """A replica of an experiment."""

    name: str = Field(description="Name of its pod.")
    uid: str = Field(description="UID of its pod.")


class EffectStatus(_Status):
    """A log ratio of two arms."""

    log_ratio: Number = Field(description="Natural logarithm of candidate over control.")
    variance: Number = Field(description="Variance of it.")


class StepRateStatus(_Status):
    """How fast replicas advance rows."""

    rate: Number = Field(0.0, description="Row-steps per second of stepping; 0 if unknown.")
    requests: Number = Field(0.0, description="Requests' worth of row-steps that it rests on.")
    rows: Number = Field(0.0, description="Most rows at once that were seen long enough.")
    computed: Number | None = Field(
        None, description="Computed prompt tokens per row-step; absent if the engines do not count them."
    )
    prefill_s: Number = Field(0.0, description="Seconds that they took.")


class TallyStatus(_Status):
    """Differences of the arms over the intervals so far."""

    count: int = Field(0, description="Number of intervals.")
    mean: Number = Field(0.0, description="Mean of the log ratios.")
    squares: Number = Field(0.0, description="Sum of their squared deviations from the mean.")
    requests: Number = Field(0.0, description="Judged requests of the smaller arm.")
    at: OptionalTime = Field(None, description="End of the last interval.")


class ScatterStatus(_Status):
    """Failed requests by cell, as an interval or a replica."""

    count: int = Field(0, description="Number of cells.")
    bad: Number = Field(0.0, description="Failed requests.")
    of: Number = Field(0.0, description="Requests.")
    squares: Number = Field(0.0, description="Sum of failed^2 / requests over the cells.")
    at: OptionalTime = Field(None, description="End of the last interval.")


class WatchStatus(_Status):
    """A promoted change that is still compared with how it was before it."""

    id: str = Field(description="ID of its decision.")
    rule: str = Field("", description="Rule that proposed it.")
    values: tuple[KnobChangeStatus, ...] = Field(description="Knobs that were changed.")
    since: Time = Field(description="When it ran on all replicas.")
    until: Time = Field(description="When the watch ends.")
    rate_before: StepRateStatus = Field(
        default_factory=StepRateStatus, description="Step rate of all replicas before it."
    )
    errors_before: Number = Field(0.0, description="Share of failed requests before it.")
    judged_before: Number = Field(0.0, description="Number of requests that show it.")
    own: bool = Field(True, description="False for an edit of the user, which is never taken back.")
    ratio: Number = Field(0.0, description=RATIO)
    memory_before: Number = Field(0.0, description="Memory ratio that an emergency was to lower.")
    scatter_before: ScatterStatus = Field(
        default_factory=ScatterStatus, description="Failed requests by cell before it."
    )
    scatter: ScatterStatus = Field(
        default_factory=ScatterStatus, description="Failed requests by interval since the user's edit."
    )
    arrivals_before: Number = Field(
        0.0, description="Requests/s per replica seen before an edit; 0: errors of the load do not count."
    )


class ChangeStatus(_Status):
    """The change in flight."""

    id: str = Field(description="ID of its decision.")
    rule: str = Field("", description="Rule that proposed it.")
    values: tuple[KnobChangeStatus, ...] = Field(
        description="Knobs that change together; the one that the rule asks for is first."
    )
    epoch: int = Field(description="Fencing number of its pushes.")
    generation: int = Field(description="Generation of the candidate configuration.")
    started_at: Time = Field(description="When it began.")
    phase_since: Time = Field(description="When its present phase began.")
    canary: ReplicaRefStatus | None = Field(
        None, description="Replica that runs the candidate first; absent when all do at once."
    )
    controls: tuple[ReplicaRefStatus, ...] = Field(
        (), description=f"Replicas that it is compared with: all others, or {MAX_CONTROLS} at random."
    )
    restarts: int = Field(0, description="Container restarts of canary and controls when it began.")
    objective: str = Field("", description="Objective whose breach it is to end.")
    predicted_gain: Number = Field(
        0.0, description="Predicted relative improvement of that objective's measure, 0 to 1."
    )
    verdict: str = Field("", description="Verdict, while it is promoted or reverted.")
    before: tuple[MeasureStatus, ...] = Field(
        (), alias="measuredBefore", description="What a change without controls is compared with."
    )
    why: str = Field("", description="Finding that led to it, with figures.")
    approved_by: str = Field("", description="Who approved it, in mode Approve.")
    measure: str = Field("", description="What the arms are compared by.")
    ratio: Number = Field(0.0, description=RATIO)
    seed: int = Field(0, description="Seed of the draw of canary and controls.")
    measured_from: OptionalTime = Field(None, description="Since when measurements show the candidate.")
    widened: tuple[ReplicaRefStatus, ...] = Field(
        (), description="Controls that run the candidate, beside the canary."
    )
    drained: bool = Field(False, description="True once the backlog of the candidate's replicas is gone.")
    rate_before: StepRateStatus = Field(
        default_factory=StepRateStatus, description="Step rate of all replicas before it."
    )
    errors_before: Number = Field(0.0, description="Share of failed requests before it.")
    judged_before: Number = Field(0.0, description="Number of requests that show it.")
    difference_before: EffectStatus | None = Field(
        None, description="What canary and controls differed by before it."
    )
    tally: TallyStatus = Field(default_factory=TallyStatus, description="Intervals of its verification.")
    work: TallyStatus = Field(
        default_factory=TallyStatus,
        description="The same of the time in work, where another measure improves.",
    )
    work_before: EffectStatus | None = Field(
        None, description="What the arms differed by in it before the change."
    )
    scatter_before: ScatterStatus = Field(
        default_factory=ScatterStatus,
        description="Faults by cell: of all replicas before it, then of controls.",
    )
    scatter: ScatterStatus = Field(
        default_factory=ScatterStatus, description="Faults of the candidate's replicas by interval."
    )
    crossed_at: OptionalTime = Field(None, description="When the arms of two replicas were swapped.")
    deadline: OptionalTime = Field(None, description="When its verification ends without a verdict.")
    unseen_since: OptionalTime = Field(None, description="Since when its replicas cannot be observed.")


class PendingStatus(_Status):
    """A remedy that waits for an approval."""

    id: str = Field(description="ID of its decision, which an approval names.")
    rule: str = Field(description="Rule that proposed it.")
    values: tuple[KnobChangeStatus, ...] = Field((), description="Knobs that it changes.")
    replicas: int = Field(0, description="Number of replicas that it asks for; 0 for knobs.")
    objective: str = Field("", description="Objective whose breach it is to end.")
    predicted_gain: Number = Field(0.0, description="Predicted relative improvement, 0 to 1.")
    why: str = Field("", description="Finding that led to it, with figures.")
    since: Time = Field(description="When it was proposed.")
    expires: Time = Field(description="When it is withdrawn unless it was approved.")
    ratio: Number = Field(0.0, description=RATIO)
    lapsing_since: OptionalTime = Field(None, description="Since when its rule no longer proposes it.")
    approved_by: str = Field("", description="Who approved it, until its number of replicas is seen.")


class GenerationStatus(_Status):
    """A configuration that was promoted, to which an override can go back."""

    number: int = Field(description="Its number.")
    at: Time = Field(description="When it was noted.")
    decision: str = Field("", description="ID of the decision that made it; empty where none is known.")
    verdict: str = Field("", description="How it came about, e.g. Promoted, Emergency, RolledBack, Found.")
    knobs: str = Field("{}", description="Its tuned knobs, as JSON; the rest is the user's base.")


class SpentStatus(_Status):
    """What changes have cost; budgets limit it."""

    what: str = Field(description="restarts of replicas, or cacheLost in bytes.")
    at: Time = Field(description="Since when.")
    amount: Number = Field(description="How much.")


class LongestRequestStatus(_Status):
    """The longest request that an engine reported; no cut of the cache makes it too large."""

    tokens: int = Field(description="Its prompt and answer, whole blocks.")
    until: OptionalTime = Field(None, description="When it is forgotten; absent while an engine reports it.")


class PredictionStatus(_Status):
    """What a measure should be after an action."""

    measure: str = Field(description="use of the replicas' capacity, or memory over its limit.")
    value: Number = Field(description="Expected value.")
    low: Number = Field(description="Least value that was to be expected.")
    high: Number = Field(description="Greatest one.")


class ExpectedStatus(_Status):
    """An action without arms whose effect is not measured yet."""

    id: str = Field(description="ID of its decision.")
    rule: str = Field(description="Rule that it rests on.")
    what: str = Field(description="The change in words.")
    prediction: PredictionStatus = Field(description="What should come of it.")
    at: Time = Field(description="When it was made.")
    replicas: int = Field(0, description="Number of replicas that it asked for; 0 for knobs.")
    since: OptionalTime = Field(None, description="Since when it is in force.")


class HoldStatus(_Status):
    """Why no change is made."""

    reason: str = Field(description="Named reason.")
    message: str = Field("", description="The reason in one sentence.")
    since: Time = Field(description="When it began.")


class BlockedValueStatus(_Status):
    """A value that was harmful or did not help."""

    knob: str = Field(description="Name of the knob.")
    value: KnobValue = Field(description="Value that is not tried again.")
    until: Time = Field(description="When the block ends.")


class ReversalStatus(_Status):
    """A reverted change; budgets.reversalsPerKnob6h counts them."""

    knob: str = Field(description="Name of the knob.")
    at: Time = Field(description="When it was reverted.")


class MarkStatus(_Status):
    """A number of replicas that was needed; the highest of the look-back limits scale-in."""

    at: Time = Field(description="When it was needed.")
    replicas: int = Field(description="Number of replicas.")


class StrainStatus(_Status):
    """A use of the replicas at which requests had to wait although the measured curve shows room."""

    use: Number = Field(description="Share of their capacity that replicas are planned for, 0 to 1.")
    until: Time = Field(description="When replicas are planned by the curve alone again.")


class ReportedStatus(_Status):
    """Something that was recorded without an action, so that it is not recorded again at once."""

    key: str = Field(description="What was recorded.")
    at: Time = Field(description="When it was recorded.")


class TuningStatus(_Status):
    """What the tuner remembers from one reconcile to the next."""

    phase: Phase = Field(Phase.OBSERVE, alias="state", description="What the tuner does.")
    epoch: int = Field(0, description="Fencing number of the last push; never decreases.")
    last_generation: int = Field(0, description="Last generation given to a configuration; never decreases.")
    next_decision: int = Field(1, description="Number of the next decision.")
    change: ChangeStatus | None = Field(None, description="The change in flight.")
    cooldown_until: OptionalTime = Field(None, description="No new change before this time.")
    holds: tuple[HoldStatus, ...] = Field(
        (), max_length=MAX_HOLDS, description="Why no change is made; the first counts most."
    )
    blocked_values: tuple[BlockedValueStatus, ...] = Field(
        (), max_length=MAX_BLOCKED_VALUES, description="Knob values that are not tried for now."
    )
    reversals: tuple[ReversalStatus, ...] = Field(
        (), max_length=MAX_REVERSALS, description="Reverted changes of the last 6 hours."
    )
    scale_down: tuple[MarkStatus, ...] = Field(
        (), alias="scaleDownMax", max_length=MAX_MARKS, description="Numbers of replicas needed lately."
    )
    reported: tuple[ReportedStatus, ...] = Field(
        (), max_length=MAX_REPORTED, description="What was recorded without an action."
    )
    watch: WatchStatus | None = Field(None, description="The last promoted change, while it is watched.")
    strain: StrainStatus | None = Field(None, description="Why replicas are planned with more room.")
    boosted: int = Field(
        0, description="Number of replicas that a boost raised; they are removed one by one after it."
    )
    pending: tuple[PendingStatus, ...] = Field(
        (), max_length=MAX_PENDING, description="Remedies that wait for an approval."
    )
    handled: tuple[str, ...] = Field(
        (), max_length=MAX_HANDLED, description="Overrides in force that were carried out or refused."
    )
    generations: tuple[GenerationStatus, ...] = Field(
        (), max_length=MAX_GENERATIONS, description="The last promoted configurations, oldest first."
    )
    spent: tuple[SpentStatus, ...] = Field(
        (), max_length=MAX_SPENT, description="What changes have cost during the last day."
    )
    longest: tuple[LongestRequestStatus, ...] = Field(
        (), max_length=MAX_LONGEST, description="The longest requests of the last day, longest first."
    )
    expected: tuple[ExpectedStatus, ...] = Field(
        (), max_length=MAX_EXPECTED, description="Actions without arms whose effect is not measured yet."
    )
    rules_hash: str = Field("", description="Digest of the operator's rules that acted last.")


class DecisionStatus(_Status):
    """Summary of one decision; the ConfigMap NAME-decisions holds the whole record."""

    id: str = Field(description="ID of the decision.")
    at: Time = Field(description="When it was taken.")
    rule: str = Field(description="Rule that it rests on.")
    outcome: str = Field(description="What was done, e.g. Started, Promoted, Reverted, ScaledOut.")
    summary: str = Field(description="The decision in one sentence.")
    verdict: str | None = Field(None, description="Verdict of a change that ended, e.g. Harmful, NoGain.")


class ConditionStatus(_Status):
    """One condition, by the conventions of Kubernetes."""

    type: str = Field(description="Name of the condition.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: str = Field(description="Named reason.")
    message: str = Field("", description="The reason in one sentence.")
    last_transition_time: Time = Field(description="When status changed last.")
    observed_generation: int = Field(
        0, description="metadata.generation of the spec that it was derived from."
    )


class Status(_Status):
    """What changes rarely; live numbers are metrics."""

    observed_generation: int | None = Field(
        None,
        description="metadata.generation of the spec in force; of the last valid one if the present is not.",
    )
    replicas: int | None = Field(None, description="Number of pods, for /scale.")
    ready_replicas: int | None = Field(None, description="Number of pods that serve.")
    selector: str | None = Field(None, description="Label selector of the pods, for /scale.")
    config: ConfigStatus | None = Field(None, description="The promoted configuration.")
    objectives: tuple[ObjectiveStatus, ...] = Field(
        (),
        description="State of each objective.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    tuning: TuningStatus | None = Field(None, description="What the tuner remembers.")
    decisions: tuple[DecisionStatus, ...] = Field(
        (), max_length=MAX_DECISIONS, description="The last decisions, oldest first."
    )
    overrides: tuple[str, ...] = Field((), description="Names of the KVCacheOverrides in force.")
    conditions: tuple[ConditionStatus, ...] = Field(
        (),
        description="Conditions, one of each type.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )

    def condition(self, kind: str) -> ConditionStatus | None:
        """The condition of a type; None if there is none."""
        return next((item for item in self.conditions if item.type == kind), None)


class OverrideStatus(_Status):
    """Status of a KVCacheOverride."""

    kind: str = Field("", description="What it asks for: pause, approve, pin, boost or rollback.")
    expires_at: Time = Field(description="When it stops being in force.")
    conditions: tuple[ConditionStatus, ...] = Field(
        (),
        description="InForce: whether it is in force, and why not.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
