"""How many replicas the load needs, by what one of them was measured to complete."""

from __future__ import annotations

import math

from kvpilot_operator.tuning.assess.capacity import USE, Capacity, max_work_s, measured
from kvpilot_operator.tuning.assess.diagnosis import busy_share, occupancy
from kvpilot_operator.tuning.assess.forecast import expected, offered
from kvpilot_operator.tuning.assess.guards import flap_budget_spent
from kvpilot_operator.tuning.configuration import value
from kvpilot_operator.tuning.context import Context
from kvpilot_operator.tuning.state import TuningState

UTILISATION = USE
"""Capacity is sized so that engines are in use for this share."""

FULL = 0.9
"""Replicas that will be in use for more than this share once a new one could serve are too few."""

GROWTH_MARGIN = 1.15
"""Before a scale-in the need is computed at this multiple of the load."""


def needed_replicas(context: Context) -> int:
    """Replicas that 1.15 times the load of the busier window needs; the look-back remembers the peaks.

    Without a curve the load per engine is the larger one of stepping time over wall time, and of held worker
    slots over slots.
    """
    if context.traffic == "NoTraffic":
        return 0
    workers: int = value(context.config, "numWorkers")
    capacity = measured(context.measured)
    if capacity is not None:
        one = per_replica(context, capacity, workers, workers)
        load = max(offered(context.measured, name, len(context.everyone)) for name in ("short", "long"))
        return math.ceil(load * GROWTH_MARGIN / one - 1e-9)
    load = max(busy_share(context.long), occupancy(context.long) / workers)
    return math.ceil(len(context.ready) * load * GROWTH_MARGIN / UTILISATION - 1e-9)


def foreseen_replicas(context: Context, state: TuningState, *, knob_first: bool) -> tuple[int, str] | None:
    """Replicas that the load will need once one that is asked for now could serve, and why; None if enough.

    Args:
        knob_first: True while a knob promises capacity, which works a backlog off before a replica could.
    """
    capacity = measured(context.measured)
    if capacity is None or context.traffic == "NoTraffic":
        return None
    workers: int = value(context.config, "numWorkers")
    one = per_replica(context, capacity, workers, _possible_slots(context, state))
    pace, asked, serving = context.policy.pace, context.observation.desired_replicas, len(context.everyone)
    horizon = context.observation.start_s + 2 * pace.tick
    load = expected(context.measured, pace, serving, horizon)
    # The backlog that is left when a new replica serves is worked off in as long again, or a long window.
    waiting = context.waiting * serving / max(1, len(context.ready))
    if waiting > serving and not knob_first:
        queues = value(context.config, "maxQueue") * serving  # what does not fit is shed
        left = min(queues, waiting + (load - one / UTILISATION * serving) * horizon)
        load += max(0.0, left) / max(horizon, pace.long)
    if load / one <= FULL / UTILISATION * asked:
        return None
    complete = "1 replica completes" if asked == 1 else f"{asked} replicas complete"
    why = (
        f"{load:.1f} requests/s are expected within {horizon:.0f} s, and {complete} "
        f"{asked * one / UTILISATION:.1f}"
    )
    return min(math.ceil(load / one - 1e-9), max(2 * asked, asked + 4)), why


def per_replica(context: Context, capacity: Capacity, slots: int, most: float) -> float:
    """Requests/s that one replica completes at UTILISATION, with its slots at the knee if it may."""
    knee = capacity.knee(max_work_s(context.policy.objectives), most)
    return UTILISATION * capacity.rate(max(knee, min(slots, most), 1))


def _possible_slots(context: Context, state: TuningState) -> float:
    """Worker slots that a replica has, or may still be given."""
    limits, now = context.policy.bounds.get("numWorkers"), value(context.config, "numWorkers")
    disabled = "workers-up" in context.policy.disabled_rules or limits is None or not limits.tune
    blocked = any(item.knob == "numWorkers" and item.until > context.now for item in state.blocked_values)
    if disabled or blocked or flap_budget_spent(state, "numWorkers", context.policy, context.now):
        return float(now)
    return float(limits.maximum) if limits is not None and limits.maximum is not None else math.inf
