"""Latency that no number of replicas can reach: work alone takes longer than the objective allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvpilot_engine.contract.metrics import EDGES_S, Stage
from kvpilot_operator.tuning.assess.capacity import Capacity
from kvpilot_operator.tuning.observation import Counts
from kvpilot_operator.tuning.policy import Objectives


@dataclass(frozen=True)
class Unreachable:
    """A latency objective that is out of reach, its edge, and the least edge that could be reached, s."""

    name: str
    edge_s: float
    reachable_s: float | None


def unreachable(counts: Counts, capacity: Capacity | None, wanted: Objectives) -> tuple[Unreachable, ...]:
    """Latency objectives that an empty engine would miss with these requests.

    An engine with one row at work serves a request, or its first token, in ``unloaded`` s on average, of
    ``mean`` s now. If every request took its time x unloaded / mean, the share within an edge e would be that
    within e x mean / unloaded now. The histogram gives it at the published edges, rounded in the objective's
    favour. Requests that failed are in neither: their time says nothing about the work.
    """
    completed = counts.completed
    seconds = sum(counts.stage_seconds.values())
    within = counts.within(wanted.signal)
    if capacity is None or within is None or completed <= 0 or seconds <= 0:
        return ()
    unloaded = capacity.work_s(1)
    if wanted.signal == "firstToken":
        unloaded = capacity.first_token_s(1)
        seconds -= counts.stage_seconds.get(Stage.DECODE, 0.0)
    scale = max(1.0, seconds / completed / unloaded)
    found = []
    for name, (edge, required) in wanted.latency.items():
        if not _reached(within, completed, edge, scale, required):
            least = next((e for e in EDGES_S if _reached(within, completed, e, scale, required)), None)
            found.append(Unreachable(name, edge, least))
    return tuple(found)


def _reached(
    within: Mapping[float, float], completed: float, edge: float, scale: float, required: float
) -> bool:
    """True if enough requests would end within an edge if they were served ``scale`` times faster."""
    above = next((known for known in EDGES_S if known >= edge * scale), None)
    return above is None or within.get(above, 0.0) >= required * completed
