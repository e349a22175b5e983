"""What the tuner remembers between two decisions. It lives in the resource's status and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Phase(StrEnum):
    """``status.tuning.state``."""

    OBSERVE = "Observe"
    CANARY = "Canary"  #: the candidate is being pushed to the canary
    SETTLE = "Settle"  #: the canary runs it; its effect is not judged yet
    VERIFY = "Verify"  #: both arms are compared
    PROMOTE = "Promote"  #: accepted: pushed to all pods, then written to the ConfigMap
    REVERT = "Revert"  #: refused: every pod goes back to the ConfigMap
    WATCH = "Watch"
    COOLDOWN = "Cooldown"
    HOLD = "Hold"
    EMERGENCY = "Emergency"


@dataclass(frozen=True)
class KnobChange:
    """One field of a change; values as they stand in the configuration (camelCase name)."""

    knob: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Change:
    """The change in flight.

    Attributes:
        id: of its decision.
        values: the leading knob first, then those that go with it.
        generation: the name of the candidate configuration; the ConfigMap gets it on promotion.
        phase_since: when the present phase began, s since the epoch.
        canary_uid: "" when there is no canary (one replica, before/after).
        restarts: restarts of all pods of both arms at the start; more means Aborted.
        objective: the objective whose breach it shall cure (p50, p95, p99, memory, hitRate, ...).
        verdict: of a change that is being promoted or reverted, e.g. Promoted, Harmful, NoGain, Aborted(...).
    """

    id: str
    rule: str
    values: tuple[KnobChange, ...]
    epoch: int
    generation: int
    started_at: float
    phase_since: float
    canary_uid: str
    control_uids: tuple[str, ...]
    restarts: int
    objective: str
    predicted_gain: float
    verdict: str = ""


@dataclass(frozen=True)
class OverlayEntry:
    """One knob that differs from the user's base value, and the base value it was based on."""

    knob: str
    based_on: Any
    value: Any
    decision: str


@dataclass(frozen=True)
class Hold:
    """A reason why nothing is done, and since when."""

    reason: str
    message: str
    since: float


@dataclass(frozen=True)
class Barred:
    """A value that did harm or did not help, and until when it is not tried again."""

    knob: str
    value: Any
    until: float


@dataclass(frozen=True)
class Reversal:
    """A change that was taken back; the flap budget counts them."""

    knob: str
    at: float


@dataclass(frozen=True)
class ReplicaMark:
    """A recommendation of replicas; the highest one of the look-back wins on the way down."""

    at: float
    replicas: int


@dataclass(frozen=True)
class TuningState:
    """Everything remembered. ``epoch`` and ``last_generation`` never go back."""

    phase: Phase = Phase.OBSERVE
    epoch: int = 0
    last_generation: int = 0
    next_decision: int = 1
    overlay: tuple[OverlayEntry, ...] = ()
    change: Change | None = None
    cooldown_until: float = 0.0
    holds: tuple[Hold, ...] = ()
    barred: tuple[Barred, ...] = ()
    reversals: tuple[Reversal, ...] = ()
    scale_down: tuple[ReplicaMark, ...] = ()
    met_ticks: int = 0
