"""How far a knob may go: the resource's bounds, and what every engine can hold without a restart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvpilot_engine.contract import knob as catalogued
from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.configuration import value
from kvpilot_operator.tuning.decision import Rejected
from kvpilot_operator.tuning.guards import barred, flap_budget_spent
from kvpilot_operator.tuning.look import Look, Proposal, told_value
from kvpilot_operator.tuning.prediction import LEAST_GAIN
from kvpilot_operator.tuning.state import KnobChange, TuningState


@dataclass(frozen=True)
class Room:
    """A knob (camelCase), its value now, and the inclusive range it may take; ``tunable`` False pins it."""

    knob: str
    now: Any
    minimum: float
    maximum: float
    tunable: bool

    def to(self, after: Any) -> KnobChange:
        """The change to another value."""
        return KnobChange(self.knob, self.now, after)


def room(look: Look, knob: str) -> Room:
    """The room of a knob, in the last known good configuration."""
    known = look.policy.bounds.get(knob)
    now = value(look.config, knob)
    if known is None or not known.tune:
        return Room(knob, now, float("-inf"), float("inf"), tunable=False)
    ceilings = [pod.engine.ceilings[knob] for pod in look.ready if pod.engine and knob in pod.engine.ceilings]
    low = float("-inf") if known.minimum is None else known.minimum
    high = float("inf") if known.maximum is None else known.maximum
    return Room(knob, now, low, min([high, *ceilings]), tunable=True)


def vet(look: Look, state: TuningState, proposal: Proposal) -> Rejected | None:
    """Why a proposal must not be made, or None: bounds, values that failed, flaps, too small a gain."""

    def no(reason: str, message: str) -> Rejected:
        return Rejected(proposal.rule, reason, message)

    for change in proposal.values:
        limits = room(look, change.knob)
        if not limits.tunable or not catalogued(change.knob).hot:
            return no(reasons.NOT_TUNABLE, f"{change.knob} is excluded from tuning")
        number = isinstance(change.after, int | float) and not isinstance(change.after, bool)
        if number and not limits.minimum <= change.after <= limits.maximum:
            return no(reasons.AT_BOUND, f"{change.knob} {told_value(change.after)} is out of bounds")
        if flap_budget_spent(state, change.knob, look.policy, look.now):
            most = look.policy.reversals_per_knob_6h
            return no(reasons.FLAP_BUDGET, f"{change.knob} was taken back {most} times in 6 hours")
    leading = proposal.values[0]
    if barred(state, leading.knob, leading.after, look.now):
        return no(
            reasons.VALUE_BARRED, f"{leading.knob} {told_value(leading.after)} failed a short while ago"
        )
    if not proposal.predicted_gain >= LEAST_GAIN:
        return no(reasons.SMALL_GAIN, f"{proposal.told} promises {proposal.predicted_gain:.0%}")
    return None
