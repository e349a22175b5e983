"""Every Event that kvpilot tells on a resource: on transitions only, so that nothing is told twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from kvpilot_operator.tuning.decision import Outcome, Record

Kind = Literal["Normal", "Warning"]

_BY_OUTCOME: Mapping[Outcome, tuple[Kind, str]] = MappingProxyType(
    {
        "Started": ("Normal", "ChangeStarted"),
        "Promoted": ("Normal", "ChangePromoted"),
        "Reverted": ("Warning", "ChangeReverted"),
        "Aborted": ("Warning", "ChangeAborted"),
        "Recommended": ("Normal", "ChangeRecommended"),
        "ScaledOut": ("Normal", "ScaledOut"),
        "ScaledIn": ("Normal", "ScaledIn"),
        "Reset": ("Normal", "BaseChanged"),
        "Infeasible": ("Warning", "ObjectiveInfeasible"),
    }
)
"""Kind and reason of the Event of each record."""

_HEALTHY: Mapping[str, str] = MappingProxyType(
    {
        "Ready": "True",
        "MetricsTrusted": "True",
        "SLOMet": "True",
        "Paused": "False",
        "ActuatorConflict": "False",
        "Infeasible": "False",
        "EngineStalled": "False",
        "ConfigEffective": "True",
    }
)
"""Conditions whose transitions are told, and the status of each when all is well."""


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


def condition_changed(condition: Mapping[str, Any]) -> Event:
    """A condition turned."""
    well = condition["status"] == _HEALTHY[condition["type"]]
    message = condition.get("message") or f"{condition['type']} is {condition['status']}"
    return Event("Normal" if well else "Warning", condition["reason"], message)


def boosted(alert: str, override: str, minimum: int, until: str) -> Event:
    """An alert was verified and raised the minimum of replicas."""
    return Event(
        "Normal", "AlertBoost", f"Alert {alert}: at least {minimum} replicas until {until} ({override})"
    )


def transitions(
    before: Mapping[str, Any], after: Mapping[str, Any], records: Sequence[Record]
) -> tuple[Event, ...]:
    """The Events between two statuses: one per record that is new, and one per condition that turned.

    A condition that appears as it should be is no news; only Ready is, as that ends a wait.
    """
    old = {(item["id"], item["outcome"]) for item in before.get("decisions") or ()}
    told = [recorded(record) for record in records if (record.id, record.outcome) not in old]
    known = {condition["type"]: condition for condition in before.get("conditions") or ()}
    for condition in after.get("conditions") or ():
        name, status = condition["type"], condition["status"]
        if name not in _HEALTHY:
            continue
        earlier = known.get(name)
        turned = earlier is None or earlier["status"] != status
        if turned and (earlier is not None or status != _HEALTHY[name] or name == "Ready"):
            told.append(condition_changed(condition))
    return tuple(told)
