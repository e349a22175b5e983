"""Every Event that kvpilot writes on a resource: on transitions only, so that none is repeated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from kvpilot_engine.contract.wording import counted
from kvpilot_operator.status.conditions import BELOW_FLOOR, STARTING
from kvpilot_operator.status.model import ConditionStatus, Status
from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.decision import DecisionOutcome, Record

Kind = Literal["Normal", "Warning"]

_BY_OUTCOME: Mapping[DecisionOutcome, tuple[Kind, str]] = MappingProxyType(
    {
        "Started": ("Normal", "ChangeStarted"),
        "Promoted": ("Normal", "ChangePromoted"),
        "Reverted": ("Warning", "ChangeReverted"),
        "Aborted": ("Warning", "ChangeAborted"),
        "Recommended": ("Normal", "ChangeRecommended"),
        "ScaledOut": ("Normal", "ScaledOut"),
        "ScaledIn": ("Normal", "ScaledIn"),
        "Measured": ("Normal", "EffectMeasured"),
        "Reset": ("Normal", "BaseChanged"),
        "Infeasible": ("Warning", "ObjectiveInfeasible"),
        "Emergency": ("Warning", "EmergencyChange"),
        "Proposed": ("Normal", "ApprovalPending"),
        "Withdrawn": ("Normal", "ApprovalWithdrawn"),
        "Refused": ("Warning", "OverrideRefused"),
        "Recycled": ("Normal", "ReplicaRecycled"),
        "Harmful": ("Warning", "BaseHarmful"),
        "Pinned": ("Normal", "KnobPinned"),
        "Unpinned": ("Normal", "PinEnded"),
        "RolledBack": ("Warning", "ConfigRolledBack"),
    }
)
"""Kind and reason of the Event of each record."""

_HEALTHY: Mapping[str, str] = MappingProxyType(
    {
        "Ready": "True",
        "MetricsTrusted": "True",
        "SLOMet": "True",
        "Paused": "False",
        "OverridesObeyed": "True",
        "FieldManagerConflict": "False",
        "Infeasible": "False",
        "EngineStalled": "False",
        "ConfigEffective": "True",
    }
)
"""Conditions whose transitions are Events, and the healthy status of each."""

_WARMING_UP = frozenset({STARTING, reasons.METRICS_MISSING, reasons.METRICS_PARTIAL})
"""Reasons that every new resource passes through: replicas start, then their first windows fill."""


@dataclass(frozen=True)
class Event:
    """One Event: ``reason`` in CamelCase, ``message`` one sentence for people."""

    kind: Kind
    reason: str
    message: str


def recorded(record: Record) -> Event:
    """A decision was taken."""
    kind, reason = _BY_OUTCOME[record.outcome]
    return Event(kind, reason, f"{record.id} ({record.rule}): {record.summary}")


def condition_changed(earlier: ConditionStatus | None, condition: ConditionStatus) -> Event:
    """A condition changed. What a new resource waits for is no Warning."""
    healthy = condition.status == _HEALTHY[condition.type]
    warming_up = condition.reason in _WARMING_UP and (earlier is None or earlier.status != "True")
    message = condition.message or f"{condition.type} is {condition.status}"
    kind: Kind = "Normal" if healthy or warming_up else "Warning"
    return Event(kind, condition.reason, message)


def boosted(alert: str, override: str, minimum: int, until: str) -> Event:
    """An alert was verified and raised the minimum of replicas."""
    return Event(
        "Normal",
        "AlertBoost",
        f"Alert {alert}: at least {counted(minimum, 'replica')} until {until} ({override})",
    )


def rule_blocked(rule: str) -> Event:
    """A rule did harm too often in the fleet."""
    return Event(
        "Warning",
        "RuleOnlyRecommended",
        f"{rule} did harm three times within an hour over all resources; for an hour it is only recommended",
    )


def transitions(before: Status, after: Status, records: Sequence[Record]) -> tuple[Event, ...]:
    """Events of the step from one status to the next: one per new record and per condition that changed."""
    known = {(item.id, item.outcome) for item in before.decisions}
    found = [recorded(record) for record in records if (record.id, record.outcome) not in known]
    for condition in after.conditions:
        earlier = before.condition(condition.type)
        if condition.type in _HEALTHY and _changed(earlier, condition):
            found.append(condition_changed(earlier, condition))
    return tuple(found)


def _changed(earlier: ConditionStatus | None, condition: ConditionStatus) -> bool:
    """True if a condition is worth an Event.

    At first only a fault is, and Ready, since people wait for it. Later a new status is, a start that has
    become a fault, and a breach that has become critical.
    """
    if earlier is None:
        unhealthy = condition.status not in {_HEALTHY[condition.type], "Unknown"}
        return condition.type == "Ready" or unhealthy
    if earlier.status != condition.status:
        return True
    reasons_differ = earlier.reason != condition.reason
    return reasons_differ and (earlier.reason == STARTING or condition.reason == BELOW_FLOOR)
