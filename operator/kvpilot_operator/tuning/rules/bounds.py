"""How far a knob may go: the resource's bounds, and the ceilings of the engines without a restart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvpilot_engine.contract.wording import counted
from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.assess.guards import flap_budget_spent, is_blocked
from kvpilot_operator.tuning.configuration import value
from kvpilot_operator.tuning.context import Context, Proposal, format_value
from kvpilot_operator.tuning.decision import Rejected
from kvpilot_operator.tuning.experiment.evidence import CAPACITY
from kvpilot_operator.tuning.permission.pins import pin_of
from kvpilot_operator.tuning.rules.prediction import MIN_GAIN, MIN_RATIO
from kvpilot_operator.tuning.state import KnobChange, TuningState


@dataclass(frozen=True)
class Room:
    """A knob (camelCase), its present value and its inclusive range; ``tunable`` False excludes it."""

    knob: str
    now: Any
    minimum: float
    maximum: float
    tunable: bool

    def to(self, after: Any) -> KnobChange:
        """The change to another value."""
        return KnobChange(self.knob, self.now, after)


def room(context: Context, knob: str) -> Room:
    """The room of a knob in the promoted configuration."""
    known = context.policy.bounds.get(knob)
    now = value(context.config, knob)
    if known is None:
        return Room(knob, now, float("-inf"), float("inf"), tunable=False)
    ceilings = [
        replica.engine.ceilings[knob]
        for replica in context.ready
        if replica.engine and knob in replica.engine.ceilings
    ]
    low = float("-inf") if known.minimum is None else known.minimum
    high = float("inf") if known.maximum is None else known.maximum
    high = min([high, *ceilings])
    if isinstance(now, int | float):
        low = max(low, now) if known.direction == "UpOnly" else low
        high = min(high, now) if known.direction == "DownOnly" else high
    return Room(knob, now, low, high, known.tune and pin_of(context, knob) is None)


def _direction(context: Context, change: KnobChange) -> str | None:
    """Why the knob may not be changed that way; None if it may."""
    known = context.policy.bounds.get(change.knob)
    if known is None or known.direction == "Both" or change.before is None or change.after is None:
        return None
    grows = change.after > change.before
    if grows == (known.direction == "UpOnly"):
        return None
    return f"{change.knob} may only {'shrink' if grows else 'grow'} (direction {known.direction})"


def vet(context: Context, state: TuningState, proposal: Proposal) -> Rejected | None:
    """Why a proposal must not be tried, or None: bounds, blocked values, flap budget, too small a gain."""
    found = next(filter(None, (_forbidden(context, state, change) for change in proposal.values)), None)
    leading = proposal.values[0]
    if found is None and is_blocked(state, leading.knob, leading.after, context.now):
        blocked = f"{leading.knob} {format_value(leading.after)}"
        found = reasons.VALUE_BLOCKED, f"{blocked} is blocked after a failed experiment"
    adds = proposal.ratio > 0 and proposal.measure in {"", CAPACITY}
    small = (adds and proposal.ratio < MIN_RATIO) or not proposal.predicted_gain >= MIN_GAIN
    if found is None and small:
        capacity = f" and {proposal.ratio:.2f} times the capacity" if adds else ""
        found = reasons.SMALL_GAIN, f"{proposal.summary} promises {proposal.predicted_gain:.0%}{capacity}"
    return None if found is None else Rejected(proposal.rule, *found)


def _forbidden(context: Context, state: TuningState, change: KnobChange) -> tuple[str, str] | None:
    """Why one knob must not be changed like that, or None."""
    if (pin := pin_of(context, change.knob)) is not None:
        return reasons.PINNED, f"override {pin.name} pins {change.knob} at {format_value(pin.value)}"
    limits = room(context, change.knob)
    if not limits.tunable:
        return reasons.NOT_TUNABLE, f"{change.knob} is excluded from tuning"
    if (only := _direction(context, change)) is not None:
        return reasons.NOT_TUNABLE, only
    number = isinstance(change.after, int | float) and not isinstance(change.after, bool)
    if number and not limits.minimum <= change.after <= limits.maximum:
        return reasons.AT_BOUND, f"{change.knob} {format_value(change.after)} is out of bounds"
    if flap_budget_spent(state, change.knob, context.policy, context.now):
        limit = context.policy.reversals_per_knob_6h
        return reasons.FLAP_BUDGET, f"{change.knob} was reverted {counted(limit, 'time')} in 6 hours"
    return None
