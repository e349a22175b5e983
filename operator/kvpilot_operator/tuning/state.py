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
class Measure:
    """How bad something was: ``bad`` out of ``of``, e.g. requests beyond an edge out of all judged ones.

    Ratios of continuous amounts are spelled alike (seconds per request, missed tokens per token looked up).
    """

    name: str
    bad: float
    of: float

    @property
    def share(self) -> float | None:
        """``bad / of``; None where there is nothing to divide by."""
        return self.bad / self.of if self.of > 0 else None


@dataclass(frozen=True)
class Change:
    """The change in flight.

    Attributes:
        id: of its decision.
        values: the leading knob first, then those that go with it.
        generation: the name of the candidate configuration; the ConfigMap gets it on promotion.
        phase_since: when the present phase began, s since the epoch.
        canary_uid: the pod that tries it; "" for an emergency, which goes to all pods at once.
        control_uids: the pods it is compared with; () when there is one replica (before/after).
        restarts: restarts of all pods of both arms at the start; more means Aborted.
        objective: the objective whose breach it shall cure (p50, p95, p99, memory, hitRate, ...).
        verdict: of a change that is being promoted or reverted, e.g. Promoted, Harmful, NoGain, Aborted(...).
        before: what a before/after change is compared with; () where controls run beside the canary.
        why: one clause with figures: what was found when it began.
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
    before: tuple[Measure, ...] = ()
    why: str = ""


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
class Told:
    """Something that was recorded without an action, so that it is not recorded at every look."""

    key: str
    at: float


@dataclass(frozen=True)
class TuningState:
    """Everything remembered. ``epoch`` and ``last_generation`` never go back.

    ``boosted`` is the number of replicas that a boost raised; after its expiry they go one by one.
    """

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
    told: tuple[Told, ...] = ()
    boosted: int = 0
