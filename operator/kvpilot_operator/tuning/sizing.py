"""How many replicas the load needs, by what one of them was measured to complete."""

from __future__ import annotations

import math

from kvpilot_engine.contract.wording import counted
from kvpilot_operator.tuning.assess.capacity import USE, Capacity
from kvpilot_operator.tuning.assess.diagnosis import busy_share, occupancy
from kvpilot_operator.tuning.assess.forecast import expected
from kvpilot_operator.tuning.assess.guards import flap_budget_spent
from kvpilot_operator.tuning.configuration import value
from kvpilot_operator.tuning.context import Context
from kvpilot_operator.tuning.observation import Counts, gauges_of
from kvpilot_operator.tuning.state import IN_USE, Prediction, TuningState

FULL = 0.85 / USE
"""Replicas that will be in use for more than so many times the planned share, once a new one could serve, are
too few."""

GROWTH_MARGIN = 1.15
"""Before a scale-in the need is computed at this multiple of the load."""


SCALED_OUT, SCALED_IN = "scale-out:", "scale-in:"
"""How keys begin under which the state remembers that the replicas were changed; both numbers follow."""


def planned_use(state: TuningState) -> float:
    """Share of their capacity that replicas are planned for."""
    return USE if state.strain is None else state.strain.use


def needed_replicas(context: Context, state: TuningState) -> int:
    """Replicas that 1.15 times the load of the short window needs; the look-back remembers the peaks.

    Without a curve the load per engine is the use that stepping time and worker slots show.
    """
    if context.traffic == "NoTraffic":
        return 0
    workers: int = value(context.config, "numWorkers")
    capacity = context.capacity
    if capacity is not None:
        one = planned_use(state) * per_replica(context, capacity, workers, workers)
        return math.ceil(context.offered("short") * GROWTH_MARGIN / one - 1e-9)
    load = _use_without_curve(context.long, workers)
    return math.ceil(len(context.ready) * load * GROWTH_MARGIN / USE - 1e-9)


def foreseen_replicas(context: Context, state: TuningState, *, knob_first: bool) -> tuple[int, str] | None:
    """Replicas that the load will need once one that is asked for now could serve, and why; None if enough.

    Args:
        knob_first: True while a knob promises capacity, which works a backlog off before a replica could.
    """
    capacity = context.capacity
    if capacity is None or context.traffic == "NoTraffic":
        return None
    workers: int = value(context.config, "numWorkers")
    whole = per_replica(context, capacity, workers, _possible_slots(context, state))
    one = planned_use(state) * whole
    pace, asked, serving = context.policy.pace, context.observation.desired_replicas, len(context.everyone)
    horizon = context.observation.start_s + 2 * pace.tick
    load = _expected(context, state, horizon)
    # The backlog that is left when a new replica serves is worked off in as long again, or a long window.
    waiting = sum(item.waiting for item in gauges_of(context.trust.counted))
    if waiting > serving and not knob_first:
        queues = value(context.config, "maxQueue") * serving  # what does not fit is shed
        left = min(queues, waiting + (load - whole * serving) * horizon)
        load += max(0.0, left) / max(horizon, pace.long)
    if load <= FULL * one * asked:
        return None
    complete = counted(asked, "replica", "completes", "complete")
    why = f"{load:.1f} requests/s are expected within {horizon:.0f} s, and {complete} {asked * whole:.1f}"
    if state.strain is not None:
        why += f", {FULL * state.strain.use:.0%} of it without a queue"
    return min(math.ceil(load / one - 1e-9), max(2 * asked, asked + 4)), why


def per_replica(context: Context, capacity: Capacity, slots: int, most: float) -> float:
    """Requests/s that one replica completes, with its slots at the knee if it may."""
    knee = capacity.knee(context.max_work_s, most)
    return capacity.rate(max(knee, min(slots, most), 1))


def use_now(context: Context) -> float:
    """Share of the capacity of all replicas that the offered load uses; 0 without a curve."""
    capacity = context.capacity
    if capacity is None:
        return 0.0
    workers: int = value(context.config, "numWorkers")
    whole = len(context.everyone) * per_replica(context, capacity, workers, workers)
    return context.offered("short") / whole


def use_of(context: Context) -> float | None:
    """Share of their capacity that the replicas are in use for; None without a measurement."""
    if context.capacity is not None:
        return use_now(context)
    if not context.short.replica_seconds:
        return None
    return _use_without_curve(context.short, value(context.config, "numWorkers"))


def _use_without_curve(counts: Counts, workers: int) -> float:
    """The larger one of stepping time over wall time, and of held worker slots over slots."""
    return max(busy_share(counts), occupancy(counts) / workers)


def predicted_use(context: Context, state: TuningState, target: int) -> Prediction | None:
    """What ``use_of`` should be with another number of replicas; None without a measurement.

    The load is what is expected when replicas that are asked for now could serve, and now for fewer ones; it
    may be off by ``GROWTH_MARGIN`` either way. The other replicas share it evenly, however many they are.
    """
    now, present = use_of(context), context.offered("short")
    if now is None:
        return None
    ahead = target > len(context.everyone) and context.capacity is not None and present > 0
    pace = context.policy.pace
    horizon = context.observation.start_s + 2 * pace.tick
    growth = _expected(context, state, horizon) / present if ahead else 1.0
    use = now * growth * len(context.everyone) / max(1, target)
    return Prediction.rounded(IN_USE, use, use / GROWTH_MARGIN, use * GROWTH_MARGIN)


def _expected(context: Context, state: TuningState, horizon_s: float) -> float:
    """Requests/s in ``horizon_s`` seconds; without a trend while the long window began before a scale-in.

    What a replica that is gone took in is missing in it: that is no rise.
    """
    short, long, pace = context.offered("short"), context.offered("long"), context.policy.pace
    if any(item.key.startswith(SCALED_IN) and context.now - item.at < pace.long for item in state.reported):
        return max(short, long)
    return expected(short, long, pace, horizon_s)


def _possible_slots(context: Context, state: TuningState) -> float:
    """Worker slots that a replica has, or may still be given: none while no knob may be changed."""
    limits, now = context.policy.bounds.get("numWorkers"), value(context.config, "numWorkers")
    disabled = "workers-up" in context.policy.disabled_rules or limits is None or not limits.tune
    blocked = any(item.knob == "numWorkers" and item.until > context.now for item in state.blocked_values)
    spent = flap_budget_spent(state, "numWorkers", context.policy, context.now)
    if context.blocks or disabled or blocked or spent:
        return float(now)
    return float(limits.maximum) if limits is not None and limits.maximum is not None else math.inf
