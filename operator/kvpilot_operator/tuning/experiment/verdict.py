"""Verdict of an experiment, with its evidence and a sentence that explains it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kvpilot_operator.tuning.context import Context
from kvpilot_operator.tuning.experiment.evidence import (
    CAPACITY,
    MEMORY,
    MISSES,
    SECONDS,
    TIER_LOAD,
    WASTE,
    WORK,
    Arm,
    arm,
    arm_of,
)
from kvpilot_operator.tuning.experiment.statistics import overdispersion
from kvpilot_operator.tuning.policy import Objectives
from kvpilot_operator.tuning.state import Change

EXPOSURE_LIMIT = 4
"""A verification ends without a verdict after so many verify times in which the arms could be observed."""

GAIN_SHARE = 0.5
"""A change must gain at least this share of the prediction."""


OPEN = ""
"""Name of a verdict that has not come yet."""


@dataclass(frozen=True)
class Verdict:
    """What an experiment shows by now: its effect and its evidence.

    ``name`` is the reason of its end, ``OPEN`` before; ``aborted`` if it ends and nothing was proven.
    """

    name: str
    effect: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    aborted: bool = False


def arms(context: Context, change: Change, window: str = "verify") -> tuple[Arm, Arm]:
    """Candidate and controls in a window; the change's own past where there are no controls."""
    wanted = context.policy.objectives
    canary = arm(context.measured, window, change.candidates, wanted, change.values)
    canary = replace(canary, dispersion=overdispersion(change.scatter_before, change.scatter))
    if change.before:
        return canary, arm_of(change.before)
    return canary, arm(context.measured, window, change.others, wanted, change.values)


def overdue(context: Context, change: Change) -> bool:
    """True if a verification has taken as long as it may."""
    return context.now >= (change.deadline or deadline_of(context, change.started_at))


def deadline_of(context: Context, since: float) -> float:
    """When a verification that begins then has to end, s since the epoch."""
    return since + EXPOSURE_LIMIT * context.policy.pace.verify


def met_by(control: Arm, objective: str, wanted: Objectives) -> bool:
    """True if an arm meets what was breached: then nothing is left to gain."""
    if objective == MEMORY:
        share = control.share(MEMORY)
        return share is not None and share <= wanted.memory
    if objective == MISSES:
        share = control.share(MISSES)
        return share is not None and 1 - share >= wanted.hit_rate
    if objective == WASTE:
        return False
    limits = {name: 1 - required for name, (_, required) in wanted.latency.items()} | {
        "errors": wanted.errors
    }
    shares = {name: control.share(name) for name in limits}
    return all(share is not None and share <= limits[name] for name, share in shares.items())


def format_arms(canary: Arm, control: Arm) -> dict[str, Any]:
    """Both arms for the record."""

    def reported(side: Arm) -> dict[str, Any]:
        return {
            "judged": round(side.judged, 1),
            "offered": round(side.offered, 1),
            **{name: round(item.share, 4) for name, item in side.measures.items() if item.share is not None},
        }

    return {"canary": reported(canary), "control": reported(control)}


def format_effect(change: Change, canary: Arm, control: Arm, wanted: Objectives) -> str:
    """Effect of the change on what it should cure, in one clause: controls first, then canary."""
    of_requests = change.measure in {CAPACITY, TIER_LOAD, SECONDS, WORK}
    objective = change.objective if of_requests else change.measure
    if objective in wanted.latency:
        edge = wanted.latency[objective][0]
        name = f"{objective} within {edge * 1000:g} ms"
        return f"{_moved(name, canary, control, objective, good=True)}, {_seconds(canary, control)}"
    if objective == MEMORY:
        return _moved("memory", canary, control, MEMORY)
    if objective == MISSES:
        return _moved("the hit rate", canary, control, MISSES, good=True)
    if objective == WASTE:
        now, before = canary.share(WASTE), control.share(WASTE)
        if now is None or before is None:
            return "wasted blocks could not be compared"
        return f"wasted blocks per request {_from_to(f'{before:.2f}', f'{now:.2f}', rose=now > before)}"
    return f"{_moved('errors', canary, control, 'errors')}, {_seconds(canary, control)}"


def _moved(name: str, canary: Arm, control: Arm, measure: str, *, good: bool = False) -> str:
    now, before = canary.share(measure), control.share(measure)
    if now is None or before is None:
        return f"{name} could not be compared"
    if good:
        now, before = 1 - now, 1 - before
    return f"{name} {_from_to(f'{before:.0%}', f'{now:.0%}', rose=now > before)}"


def _seconds(canary: Arm, control: Arm) -> str:
    now, before = canary.share(SECONDS), control.share(SECONDS)
    if now is None or before is None:
        return "mean time unknown"
    return f"mean time {_from_to(f'{before:.2f} s', f'{now:.2f} s', rose=now > before)}"


def _from_to(before: str, now: str, *, rose: bool) -> str:
    """``rose from 41% to 99%``, or ``stayed at 99%`` where both read alike."""
    return f"stayed at {now}" if before == now else f"{'rose' if rose else 'fell'} from {before} to {now}"
