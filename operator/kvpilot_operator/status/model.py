"""The shape of the status. Everything the tuner remembers is here; nothing is a live number.

Knob values are strings (``"16"``, ``"true"``, ``"lru"``), as one list holds values of every type; times are
RFC 3339 in UTC with at most milliseconds.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from kvpilot_operator.tuning.state import Phase

MOST_HOLDS, MOST_BARRED, MOST_REVERSALS, MOST_MARKS, MOST_TOLD, MOST_DECISIONS = 5, 16, 16, 10, 16, 10
DECISION_BYTES = 512

Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]


class _Status(BaseModel):
    # Fields of a newer operator are dropped, not refused: operator N reads what N+1 wrote.
    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=to_camel, populate_by_name=True)


class OverlayStatus(_Status):
    """A knob that differs from the user's base value."""

    knob: str
    based_on: str = Field(description="The base value it was based on; when that changes, this entry goes.")
    value: str
    decision: str = Field(description="The decision that set it.")


class ConfigStatus(_Status):
    """The last known good configuration: what the owned ConfigMap holds and pods start from."""

    generation: int | None = Field(None, description="Generation in the ConfigMap.")
    hash: str | None = Field(None, description="Digest of the effective configuration.")
    effective: dict[str, Any] | None = Field(
        None,
        description="The whole configuration in practice.",
        json_schema_extra={"x-kubernetes-preserve-unknown-fields": True},
    )
    overlay: tuple[OverlayStatus, ...] = ()


class ObjectiveStatus(_Status):
    """An objective and since when it is met or breached."""

    name: str
    state: Literal["Met", "Breached", "Unknown", "Infeasible"]
    since: Time


class CompanionStatus(_Status):
    """A knob that changes together with the leading one."""

    knob: str
    before: str = Field(alias="from")
    after: str = Field(alias="to")


class MeasureStatus(_Status):
    """How bad something was before the change: ``bad`` out of ``of``."""

    name: str
    bad: str
    of: str


class ChangeStatus(_Status):
    """The change in flight."""

    id: str
    rule: str = ""
    knob: str
    before: str = Field(alias="from")
    after: str = Field(alias="to")
    also: tuple[CompanionStatus, ...] = Field((), description="Knobs that change with it.")
    epoch: int
    generation: int = Field(description="Name of the candidate configuration.")
    started_at: Time
    phase_since: Time
    canary_uid: str = Field("", alias="canaryUID")
    control_uids: tuple[str, ...] = Field((), alias="controlUIDs")
    restarts: int = Field(0, description="Restarts of the pods of both arms when it began.")
    objective: str = Field("", description="The objective it shall cure.")
    predicted_gain: str = "0.0"
    verdict: str = ""
    measured_before: tuple[MeasureStatus, ...] = Field(
        (), description="What a change without controls is compared with."
    )

    why: str = Field("", description="What was found when it began, in one clause with figures.")

    @property
    def leading(self) -> tuple[CompanionStatus, ...]:
        """The leading knob, in the form of its companions."""
        return (CompanionStatus(knob=self.knob, before=self.before, after=self.after),)


class HoldStatus(_Status):
    """Why nothing is done, and since when."""

    reason: str
    message: str = ""
    since: Time


class BarredStatus(_Status):
    """A value that did harm or did not help."""

    knob: str
    value: str
    until: Time


class ReversalStatus(_Status):
    """A change that was taken back; the flap budget counts them."""

    knob: str
    at: Time


class MarkStatus(_Status):
    """A recommendation of replicas; the highest of the look-back wins on the way down."""

    at: Time
    replicas: int


class ToldStatus(_Status):
    """Something that was recorded without an action, and when."""

    key: str
    at: Time


class TuningStatus(_Status):
    """What the tuner remembers between two decisions."""

    state: Phase = Phase.OBSERVE
    epoch: int = Field(0, description="Fencing number of the last push; never goes back.")
    last_generation: int = Field(0, description="Last generation given out; never goes back.")
    next_decision: int = Field(1, description="Number of the next decision.")
    met_ticks: int = Field(0, description="Looks in a row with every latency objective met again.")
    change: ChangeStatus | None = None
    cooldown_until: Time | None = None
    holds: tuple[HoldStatus, ...] = Field((), max_length=MOST_HOLDS)
    barred: tuple[BarredStatus, ...] = Field((), max_length=MOST_BARRED)
    reversals: tuple[ReversalStatus, ...] = Field((), max_length=MOST_REVERSALS)
    scale_down_max: tuple[MarkStatus, ...] = Field((), max_length=MOST_MARKS)
    told: tuple[ToldStatus, ...] = Field((), max_length=MOST_TOLD)
    boosted: int = Field(0, description="Replicas that a boost asked for; they go one by one after it.")


class DecisionStatus(_Status):
    """Summary of one action; the whole record is in the ConfigMap NAME-decisions."""

    id: str
    at: Time
    rule: str
    outcome: str
    summary: str


class ConditionStatus(_Status):
    """One condition, by the conventions of Kubernetes."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str = ""
    last_transition_time: Time
    observed_generation: int = 0


class Status(_Status):
    """What is, as far as it changes rarely: live numbers are metrics."""

    observed_generation: int | None = Field(
        None, description="Generation of the spec that this status speaks of."
    )
    replicas: int | None = Field(None, description="Pods there are, for /scale.")
    ready_replicas: int | None = Field(None, description="Pods that serve.")
    selector: str | None = Field(None, description="Label selector of the pods, for /scale.")
    config: ConfigStatus | None = None
    objectives: tuple[ObjectiveStatus, ...] = Field(
        (), json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
    )
    tuning: TuningStatus | None = None
    decisions: tuple[DecisionStatus, ...] = Field(
        (), max_length=MOST_DECISIONS, description="The last actions, oldest first."
    )
    overrides: tuple[str, ...] = Field((), description="KVCacheOverride objects in force.")
    conditions: tuple[ConditionStatus, ...] = Field(
        (), json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
    )
