"""Policies for the tests of pure functions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvpilot_engine.contract import CATALOGUE
from kvpilot_operator.tuning.pace import PACES
from kvpilot_operator.tuning.policy import KnobBounds, Objectives, Policy, Scaling

CATALOGUE_BOUNDS = {
    knob.resource_name: KnobBounds(knob.resource_name, knob.minimum, knob.maximum) for knob in CATALOGUE
}

PRODUCTION = Objectives(
    signal="request",
    latency={"p50": (0.1, 0.5), "p95": (0.5, 0.95), "p99": (1.0, 0.99)},
    throughput=100,
    floor=50,
    hit_rate=0.7,
    memory=0.8,
    errors=0.01,
)


def policy_of(**changes: Any) -> Policy:
    """An Auto policy at Fast pace with one to six replicas; no target for the hit rate unless given."""
    objectives = changes.pop("objectives", replace(PRODUCTION, hit_rate=0.0))
    given: dict[str, Any] = {
        "objectives": objectives,
        "mode": "Auto",
        "pace": PACES["Fast"],
        "bounds": CATALOGUE_BOUNDS,
        "scaling": Scaling(1, 6),
        **changes,
    }
    return Policy(**given)
