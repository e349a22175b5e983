"""Guards of single knobs: blocked values, and the flap budget."""

from __future__ import annotations

from kvpilot_operator.tuning.policy import Policy
from kvpilot_operator.tuning.state import TuningState

DAY, SIX_HOURS = 86_400.0, 21_600.0


def is_blocked(state: TuningState, knob: str, value: object, now: float) -> bool:
    """True if that value did harm or did not help during the last 24 hours."""
    return any(
        item.knob == knob and item.value == value and item.until > now for item in state.blocked_values
    )


def flap_budget_spent(state: TuningState, knob: str, policy: Policy, now: float) -> bool:
    """True if changes of the knob were reverted as often in 6 hours as is allowed."""
    recent = [item for item in state.reversals if item.knob == knob and item.at > now - SIX_HOURS]
    return len(recent) >= policy.reversals_per_knob_6h
