"""What an experiment showed: a verdict with its evidence, and the sentence that tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.evidence import (
    HARM_EVIDENCE,
    MEMORY,
    MISSES,
    SECONDS,
    WASTE,
    Arm,
    arm,
    arm_of,
    exposed,
    gain,
    harm_evidence,
    harmless,
)
from kvpilot_operator.tuning.guards import distrusted_pods
from kvpilot_operator.tuning.look import Look
from kvpilot_operator.tuning.policy import Objectives
from kvpilot_operator.tuning.state import Change

EXPOSURE_LIMIT = 4
"""Waiting for requests ends after so many times the verify time."""

GAIN_SHARE = 0.5
"""A change must gain at least this share of what was predicted."""


@dataclass(frozen=True)
class Verdict:
    """The end of an experiment: a reason (with ``aborted`` where nothing was proven) and its evidence."""

    name: str
    effect: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    aborted: bool = False


def judge_change(look: Look, change: Change) -> Verdict | None:
    """The verdict on the change in flight, or None while it is open.

    Harm ends it at any time; anything else needs the verify time and enough judged requests of both arms.
    """
    elapsed = look.now - change.phase_since
    overdue = elapsed >= EXPOSURE_LIMIT * look.policy.pace.verify
    arms = _arms(look, change)
    if arms is None:
        late = Verdict(reasons.TOO_FEW_REQUESTS, "the arms could not be measured in time", aborted=True)
        return late if overdue else None
    canary, control = arms
    wanted = look.policy.objectives
    harm = harm_evidence(canary, control, wanted)
    gained = gain(canary, control, change.objective)
    evidence = _told_evidence(change, canary, control, harm, gained)
    effect = told_effect(change.objective, canary, control, wanted)
    if harm >= HARM_EVIDENCE:
        return Verdict(reasons.HARMFUL, effect, evidence)
    if elapsed < look.policy.pace.verify:
        return None
    name = _name(look, change, canary, control, gained, overdue=overdue)
    aborted = name in {reasons.TOO_FEW_REQUESTS, reasons.BREACH_GONE}
    return None if name is None else Verdict(name, effect, evidence, aborted)


def _name(
    look: Look, change: Change, canary: Arm, control: Arm, gained: float | None, *, overdue: bool
) -> str | None:
    """What the counts say once the verify time is over."""
    wanted = look.policy.objectives
    fewest = look.policy.pace.requests_per_arm
    if not (exposed(canary, fewest) and exposed(control, fewest)):
        # What memory a change frees shows without requests; that it harms none of them does not.
        if not (overdue and change.objective == MEMORY):
            return reasons.TOO_FEW_REQUESTS if overdue else None
    elif not harmless(canary, control, wanted) and _gains(change, gained):
        return reasons.INCONCLUSIVE if overdue else None
    if change.control_uids and _met_without(change.objective, control, wanted):
        return reasons.BREACH_GONE
    return reasons.PROMOTED if _gains(change, gained) else reasons.NO_GAIN


def _gains(change: Change, gained: float | None) -> bool:
    return gained is not None and gained >= GAIN_SHARE * change.predicted_gain


def _met_without(objective: str, control: Arm, wanted: Objectives) -> bool:
    """True when the controls meet what was breached: then nothing can be gained any more."""
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


def _arms(look: Look, change: Change) -> tuple[Arm, Arm] | None:
    """Canary and controls over the time of the verification; None while they cannot be trusted."""
    uids = {change.canary_uid, *change.control_uids}
    pods = tuple(pod for pod in look.ready if pod.uid in uids)
    if look.observation.metrics_problem or distrusted_pods(pods, look.policy) is not None:
        return None
    if look.now - change.phase_since < look.policy.pace.short:
        return None
    if any(pod.sample is None or "verify" not in pod.sample.windows for pod in pods):
        return None
    wanted = look.policy.objectives
    canary = arm(look.observation, "verify", frozenset({change.canary_uid}), wanted)
    if change.before:
        return canary, arm_of(change.before)
    return canary, arm(look.observation, "verify", frozenset(change.control_uids), wanted)


def _told_evidence(
    change: Change, canary: Arm, control: Arm, harm: float, gained: float | None
) -> dict[str, Any]:
    def told(side: Arm) -> dict[str, Any]:
        return {
            "judged": round(side.judged, 1),
            "offered": round(side.offered, 1),
            **{name: round(item.share, 4) for name, item in side.measures.items() if item.share is not None},
        }

    return {
        "canary": told(canary),
        "control": told(control),
        "harmEValue": float(f"{harm:.3g}"),
        "gain": None if gained is None else round(gained, 4),
        "predictedGain": round(change.predicted_gain, 4),
        "unproven": bool(change.before),
    }


def told_effect(objective: str, canary: Arm, control: Arm, wanted: Objectives) -> str:
    """What the change did to what it shall cure, in one clause: controls first, then canary."""
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
    """``rose from 41% to 99%``; what people read alike stayed."""
    return f"stayed at {now}" if before == now else f"{'rose' if rose else 'fell'} from {before} to {now}"
