"""What is done, and the record that explains it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kvpilot_operator.tuning.state import KnobChange, TuningState


@dataclass(frozen=True)
class Push:
    """Make one pod run a configuration (whole, camelCase)."""

    uid: str
    generation: int
    epoch: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class WriteConfig:
    """Make a configuration the last known good one: write the owned ConfigMap."""

    generation: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Scale:
    """Ask the child workload for this number of replicas."""

    replicas: int
    reason: str


Action = Push | WriteConfig | Scale

Outcome = Literal[
    "Started",
    "Promoted",
    "Reverted",
    "Aborted",
    "Recommended",
    "ScaledOut",
    "ScaledIn",
    "Reset",
    "Infeasible",
]


@dataclass(frozen=True)
class StageShare:
    """Seconds per judged request in one stage, and its share of the whole."""

    stage: str
    seconds: float
    share: float


@dataclass(frozen=True)
class Objective:
    """One objective against its measurement: an attainment, rate or ratio; None without data.

    ``Infeasible``: missed, and known to be out of reach, so it is no breach that anything could cure.
    """

    name: str
    target: float
    measured_short: float | None
    measured_long: float | None
    state: Literal["Met", "Breached", "Unknown", "Infeasible"]


@dataclass(frozen=True)
class Diagnosis:
    """Why an objective is breached.

    Attributes:
        objective: the worst breached one; "" when all are met.
        stage: the stage at fault; "" when no stage stands out.
        reason: named constant, e.g. QueueAtAdmission, DeviceSaturated, MemoryOverLimit.
        message: one sentence with figures.
    """

    objective: str
    stage: str
    reason: str
    message: str
    stages: tuple[StageShare, ...] = ()
    saturated: bool = False


@dataclass(frozen=True)
class Rejected:
    """A rule that was considered and not taken, with the reason."""

    rule: str
    reason: str
    message: str


@dataclass(frozen=True)
class Record:
    """One action, whole: what ``kvpilot explain`` tells and the decisions ConfigMap keeps."""

    id: str
    at: float
    rule: str
    outcome: Outcome
    summary: str
    diagnosis: Diagnosis | None
    objectives: tuple[Objective, ...]
    changes: tuple[KnobChange, ...] = ()
    replicas: tuple[int, int] | None = None
    generation: int | None = None
    canary_uid: str = ""
    control_uids: tuple[str, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """The next state, what to do now, and what to tell.

    The state is written before the actions are taken; every action is idempotent, and its effect is seen in
    the next observation. ``again`` asks for the next look at once instead of at the next tick.
    """

    state: TuningState
    actions: tuple[Action, ...] = ()
    records: tuple[Record, ...] = ()
    objectives: tuple[Objective, ...] = ()
    diagnosis: Diagnosis | None = None
    again: bool = False
    infeasible: str = ""
    stalled: str = ""
