"""Contexts and plans for the tests of remedies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.operator.tuning.observations import BAD, context_of, observe, three
from tests.operator.tuning.policies import CATALOGUE_BOUNDS, policy_of

from kvpilot_operator.tuning.context import Context, Plan, Proposal
from kvpilot_operator.tuning.policy import KnobBounds, Policy
from kvpilot_operator.tuning.rules.order import consider
from kvpilot_operator.tuning.state import TuningState

QUEUED = {"admission_wait": 0.71, "prefill": 0.04, "decode": 0.25}
SMALL = {"numWorkers": 2, "batchSize": 2}


def context(config: Mapping[str, Any], policy: Policy | None = None, **figures: Any) -> Context:
    return context_of(observe(*three(attained=BAD, **figures), config=config), policy)


def plan(config: Mapping[str, Any], policy: Policy | None = None, **figures: Any) -> Plan:
    return consider(context(config, policy, **figures), TuningState())


def proposed(found: Plan) -> Proposal:
    assert found.canary is not None, found.rejected
    return found.canary


def values(found: Plan) -> dict[str, tuple[Any, Any]]:
    return {item.knob: (item.before, item.after) for item in proposed(found).values}


def why_not(found: Plan, rule: str) -> tuple[str, str]:
    return next((item.reason, item.message) for item in found.rejected if item.rule == rule)


def bounded(**limits: tuple[float, float]) -> Policy:
    own = {name: KnobBounds(name, low, high) for name, (low, high) in limits.items()}
    return policy_of(bounds={**CATALOGUE_BOUNDS, **own})
