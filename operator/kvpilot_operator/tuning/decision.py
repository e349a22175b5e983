"""Decision: the actions, the records that explain them, and the next state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from kvpilot_engine.contract.knobs import Price
from kvpilot_operator.tuning.state import KnobChange, TuningState


@dataclass(frozen=True)
class Push:
    """Make one replica run a configuration (whole, camelCase)."""

    uid: str
    generation: int
    epoch: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class WriteConfig:
    """Promote a configuration: write it to the owned ConfigMap."""

    generation: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Scale:
    """Ask the child workload for this number of replicas; those in ``first`` (UIDs) go first."""

    replicas: int
    reason: str
    first: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recycle:
    """Replace one replica by a new one."""

    uid: str


@dataclass(frozen=True)
class TakeOverReplicas:
    """Become the only field manager of the child workload's replicas.

    ``replicas`` is the number that was observed: the action fails if it has changed since.
    """

    replicas: int


Action = Push | WriteConfig | Scale | Recycle | TakeOverReplicas

DecisionOutcome = Literal[
    "Started",
    "Promoted",
    "Reverted",
    "Aborted",
    "Recommended",
    "ScaledOut",
    "ScaledIn",
    "Measured",
    "Reset",
    "Infeasible",
    "Emergency",
    "Proposed",
    "Withdrawn",
    "Refused",
    "Harmful",
    "Recycled",
    "Pinned",
    "Unpinned",
    "RolledBack",
]


@dataclass(frozen=True)
class StageShare:
    """Seconds per judged request in one stage, and its share of the whole."""

    stage: str
    seconds: float
    share: float


@dataclass(frozen=True)
class ObjectiveKind:
    """What is known of an objective by its name.

    Attributes:
        higher_is_better: a measurement below the target misses it; else one above it does.
        felt: requests feel a miss, so more capacity may help.
        latency: an attainment at a latency edge.
        conditional: what is possible depends on the load, so one window below the target proves no miss.
    """

    higher_is_better: bool
    felt: bool
    latency: bool = False
    conditional: bool = False


_LATENCY = ObjectiveKind(higher_is_better=True, felt=True, latency=True)
OBJECTIVE_KINDS: Mapping[str, ObjectiveKind] = MappingProxyType(
    {
        "p50": _LATENCY,
        "p95": _LATENCY,
        "p99": _LATENCY,
        "throughput": ObjectiveKind(higher_is_better=True, felt=True, conditional=True),
        "errors": ObjectiveKind(higher_is_better=False, felt=True),
        "hitRate": ObjectiveKind(higher_is_better=True, felt=False, conditional=True),
        "memory": ObjectiveKind(higher_is_better=False, felt=False),
    }
)
"""Every objective, in the order in which they are reported."""


@dataclass(frozen=True)
class Objective:
    """One objective against its measurement: an attainment, rate or ratio; None without data.

    Attributes:
        state: ``Infeasible`` is missed and known to be out of reach, so it is no breach to cure.
        severity: of a breach: ``critical`` below the throughput floor, else ``breach``; "" without one.
    """

    name: str
    target: float
    measured_short: float | None
    measured_long: float | None
    state: Literal["Met", "Breached", "Unknown", "Infeasible"]
    severity: Literal["", "breach", "critical"] = ""

    @property
    def kind(self) -> ObjectiveKind:
        """Direction and effect of this objective."""
        return OBJECTIVE_KINDS[self.name]

    @property
    def missed_now(self) -> bool:
        """True if it is breached, or the short window alone proves a miss."""
        if self.state == "Breached" or self.kind.conditional or self.measured_short is None:
            return self.state == "Breached"
        return not self.meets(self.measured_short)

    def meets(self, measured: float) -> bool:
        """True if a measurement reaches the target."""
        return measured >= self.target if self.kind.higher_is_better else measured <= self.target


@dataclass(frozen=True)
class Diagnosis:
    """Why an objective is breached.

    Attributes:
        objective: the worst breached one; "" when all are met.
        stage: the stage at fault; "" when no stage stands out.
        reason: one of ``tuning.reasons``, e.g. QueueAtAdmission.
        message: one sentence with figures.
    """

    objective: str
    stage: str
    reason: str
    message: str
    stages: tuple[StageShare, ...] = ()
    saturated: bool = False

    @property
    def stage_text(self) -> str:
        """The stage in words."""
        return self.stage.replace("_", " ")


@dataclass(frozen=True)
class Rejected:
    """A remedy that was considered and not taken, with the reason."""

    rule: str
    reason: str
    message: str


@dataclass(frozen=True)
class Record:
    """One decision with everything it rests on, for ``kvpilot explain`` and the decisions ConfigMap.

    Attributes:
        changes: knobs of the change; whether they are in force follows from ``outcome``.
        replicas: number of replicas before and after.
        canary, controls: names of the replicas of the experiment.
        price: of what is proposed or begun; None for the end of a change and for what has none.
    """

    id: str
    at: float
    rule: str
    outcome: DecisionOutcome
    summary: str
    diagnosis: Diagnosis | None
    objectives: tuple[Objective, ...]
    changes: tuple[KnobChange, ...] = ()
    replicas: tuple[int, int] | None = None
    generation: int | None = None
    canary: str = ""
    controls: tuple[str, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)
    price: Price | None = None


@dataclass(frozen=True)
class Decision:
    """The next state, the actions, and the records.

    The state is written before the actions are taken; every action is idempotent, and its effect shows in the
    next observation. ``again`` asks to reconcile at once instead of at the next tick. ``outliers`` names
    replicas that differ from the others by themselves, ``partly_trusted`` those that are not judged.
    ``absent`` names the counts that not every engine exports (``OPTIONAL_COUNTS``).
    """

    state: TuningState
    actions: tuple[Action, ...] = ()
    records: tuple[Record, ...] = ()
    objectives: tuple[Objective, ...] = ()
    diagnosis: Diagnosis | None = None
    again: bool = False
    infeasible: str = ""
    stalled: str = ""
    outliers: tuple[str, ...] = ()
    partly_trusted: str = ""
    absent: tuple[str, ...] = ()
