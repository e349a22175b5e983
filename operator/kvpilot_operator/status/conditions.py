"""The conditions of a resource. Their reasons are documented constants; messages name the fix.

A message whose figures alone changed is left as it is, so that a steady state writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvpilot_operator.ports import Snapshot
from kvpilot_operator.spec.errors import ManifestError
from kvpilot_operator.spec.models import DeploymentSpec
from kvpilot_operator.spec.resolve import not_yet_effective
from kvpilot_operator.spec.times import to_rfc3339
from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.decision import Decision
from kvpilot_operator.tuning.observation import Observation
from kvpilot_operator.tuning.policy import Policy

State = Literal["True", "False", "Unknown"]

CONDITION_TYPES: Mapping[str, str] = {
    "Ready": "As many engines serve as the spec asks for at least.",
    "Progressing": "Pods are being replaced, added, or waited for.",
    "MetricsTrusted": "Measurements are fresh and complete; without them nothing is decided.",
    "SLOMet": "Every objective is met.",
    "TuningActive": "kvpilot may change something now.",
    "Paused": "A KVCacheOverride forbids every change.",
    "ActuatorConflict": "Somebody else writes the number of replicas.",
    "Infeasible": "An objective cannot be reached within the bounds given.",
    "RolledBack": "The last change that was judged was taken back.",
    "EngineStalled": "Requests arrive and none is completed.",
    "ConfigEffective": "Every given value of engine.config has an effect in this version.",
}

MESSAGE_LIMIT = 1024
_FIGURE = re.compile(r"\d+(\.\d+)?")


@dataclass(frozen=True)
class Condition:
    """One condition before it is dated."""

    type: str
    status: State
    reason: str
    message: str


def same_but_for_figures(one: str, other: str) -> bool:
    """True when two sentences differ in their numbers at most."""
    return _FIGURE.sub("#", one) == _FIGURE.sub("#", other)


def dated(
    conditions: Iterable[Condition],
    before: Sequence[Mapping[str, Any]],
    generation: int,
    now: float,
) -> list[dict[str, Any]]:
    """Conditions as the status holds them; ``lastTransitionTime`` moves only when the status of one flips."""
    known = {item["type"]: item for item in before}
    result = {item["type"]: dict(item) for item in before}
    for new in conditions:
        old = known.get(new.type, {})
        message = new.message[:MESSAGE_LIMIT]
        # Figures of the same spec are kept, so that a look alone writes nothing; a new spec has its own.
        same_spec = old.get("observedGeneration") == generation and old.get("reason") == new.reason
        if same_spec and same_but_for_figures(old.get("message", ""), message):
            message = old.get("message", message)
        flipped = old.get("status") != new.status
        result[new.type] = {
            "type": new.type,
            "status": new.status,
            "reason": new.reason,
            "message": message,
            "lastTransitionTime": to_rfc3339(int(now)) if flipped else old["lastTransitionTime"],
            "observedGeneration": generation,
        }
    order = list(CONDITION_TYPES)
    return sorted(
        result.values(), key=lambda item: order.index(item["type"]) if item["type"] in order else 99
    )


def refused(error: ManifestError) -> Condition:
    """A spec that cannot be used; what runs goes on as it is."""
    return Condition("Ready", "False", "InvalidSpec", "; ".join(error.lines))


def conditions_of(
    snapshot: Snapshot, spec: DeploymentSpec, policy: Policy, observation: Observation, decision: Decision
) -> list[Condition]:
    """All conditions; RolledBack only with a new verdict, else it goes on as it is."""
    found = [
        _ready(snapshot, spec),
        _progressing(snapshot, observation),
        _metrics_trusted(observation, decision),
        _slo_met(decision),
        _tuning_active(policy, observation, decision),
        _paused(observation),
        _actuator_conflict(snapshot, observation),
        _infeasible(decision),
        _engine_stalled(decision),
        _config_effective(spec),
    ]
    return [*found, *_rolled_back(decision)]


def _ready(snapshot: Snapshot, spec: DeploymentSpec) -> Condition:
    wanted = spec.scaling.minimum if spec.scaling is not None else spec.replicas or 0
    serving = sum(pod.ready and not pod.terminating for pod in snapshot.pods)
    if wanted == 0:
        return Condition("Ready", "True", "ScaledToZero", "No replicas are asked for.")
    if serving >= wanted:
        return Condition("Ready", "True", "Serving", "At least as many engines serve as asked for.")
    message = f"{serving} of at least {wanted} engines serve."
    if stuck := _stuck(snapshot):
        message = f"{message[:-1]}: {'; '.join(stuck)}"
    return Condition("Ready", "False", "EnginesNotReady" if serving else "NoEngineReady", message)


def _stuck(snapshot: Snapshot) -> list[str]:
    """What keeps pods from serving, pod by pod, and what keeps more of them from being made."""
    waiting = [f"{pod.name}: {pod.pending_reason}" for pod in snapshot.pods if pod.pending_reason]
    return [snapshot.refused_pods, *waiting] if snapshot.refused_pods else waiting


def _progressing(snapshot: Snapshot, observation: Observation) -> Condition:
    if stuck := _stuck(snapshot):
        return Condition("Progressing", "True", "PodsPending", "Waiting for " + "; ".join(stuck))
    if observation.rolling_out:
        return Condition("Progressing", "True", "RollingOut", "Pods are being replaced one after the other.")
    serving = len(observation.ready)
    if serving < observation.replicas:
        return Condition("Progressing", "True", "PodsStarting", "Pods are starting.")
    return Condition("Progressing", "False", "Complete", "All pods that are asked for serve.")


def _metrics_trusted(observation: Observation, decision: Decision) -> Condition:
    if observation.metrics_problem:
        return Condition("MetricsTrusted", "False", reasons.METRICS_UNAVAILABLE, observation.metrics_problem)
    for hold in decision.state.holds:
        if hold.reason in METRIC_HOLDS:
            return Condition("MetricsTrusted", "False", hold.reason, hold.message)
    if not observation.ready:
        return Condition(
            "MetricsTrusted", "Unknown", "NoEngineReady", "No engine serves that could be measured."
        )
    return Condition("MetricsTrusted", "True", "Fresh", "Measurements of every ready engine are fresh.")


def _slo_met(decision: Decision) -> Condition:
    breached = [item.name for item in decision.objectives if item.state == "Breached"]
    if breached:
        return Condition("SLOMet", "False", "Breached", f"Breached: {', '.join(breached)}.")
    beyond = [item.name for item in decision.objectives if item.state == "Infeasible"]
    if beyond:
        return Condition("SLOMet", "False", "Infeasible", f"Out of reach: {', '.join(beyond)}.")
    if any(item.state == "Met" for item in decision.objectives):
        return Condition("SLOMet", "True", "AllMet", "Every objective that can be judged is met.")
    return Condition("SLOMet", "Unknown", "NothingToJudge", "There is no traffic or no data to judge by.")


def _tuning_active(policy: Policy, observation: Observation, decision: Decision) -> Condition:
    if policy.mode == "Off":
        return Condition("TuningActive", "False", "ModeOff", "spec.tuning.mode is Off: only measured.")
    if observation.paused_by:
        return Condition(
            "TuningActive", "False", "Paused", f"KVCacheOverride {observation.paused_by} is in force."
        )
    if decision.state.holds:
        hold = decision.state.holds[0]
        return Condition("TuningActive", "False", hold.reason, hold.message)
    if policy.mode == "Recommend":
        return Condition("TuningActive", "False", "RecommendOnly", "spec.tuning.mode is Recommend.")
    return Condition("TuningActive", "True", "Active", "kvpilot may act.")


def _paused(observation: Observation) -> Condition:
    if observation.paused_by:
        return Condition(
            "Paused",
            "True",
            "Override",
            f"KVCacheOverride {observation.paused_by} is in force; delete it or let it expire.",
        )
    return Condition("Paused", "False", "NotPaused", "No override pauses this resource.")


def _actuator_conflict(snapshot: Snapshot, observation: Observation) -> Condition:
    if snapshot.autoscaler:
        return Condition(
            "ActuatorConflict",
            "True",
            "OtherManager",
            f"{snapshot.autoscaler} also writes the number of replicas; kvpilot does not while it is there. "
            "Delete it, or give it this resource with spec.replicas as its target.",
        )
    if observation.replicas_managed_by:
        return Condition(
            "ActuatorConflict",
            "True",
            "OtherManager",
            f"{observation.replicas_managed_by} also wrote the number of replicas; kvpilot stops scaling, "
            "and goes on from that number ten minutes after this began. To write it for good, use "
            "spec.replicas in place of spec.scaling.",
        )
    return Condition("ActuatorConflict", "False", "NoConflict", "Nobody else writes the number of replicas.")


def _infeasible(decision: Decision) -> Condition:
    if decision.infeasible:
        return Condition("Infeasible", "True", "TargetUnreachable", decision.infeasible)
    return Condition("Infeasible", "False", "Feasible", "No objective is known to be out of reach.")


def _engine_stalled(decision: Decision) -> Condition:
    if decision.stalled:
        return Condition("EngineStalled", "True", "NoCompletions", decision.stalled)
    return Condition("EngineStalled", "False", "Completing", "Engines complete what arrives.")


NOTHING_JUDGED = Condition("RolledBack", "False", "NothingJudged", "No change has been judged yet.")
"""Where RolledBack starts."""


def _rolled_back(decision: Decision) -> list[Condition]:
    """Tells of the last verdict; without a new one the condition stays as it is."""
    for record in reversed(decision.records):
        if record.outcome == "Reverted":
            return [Condition("RolledBack", "True", "Reverted", record.summary)]
        if record.outcome == "Promoted":
            return [Condition("RolledBack", "False", "Promoted", record.summary)]
    return []


def _config_effective(spec: DeploymentSpec) -> Condition:
    idle = not_yet_effective(spec)
    if idle:
        told = "; ".join(f"{notice.field} {notice.message}" for notice in idle)
        return Condition("ConfigEffective", "False", "NotYetEffective", told)
    return Condition("ConfigEffective", "True", "AllEffective", "Every given value has an effect.")


METRIC_HOLDS = frozenset(
    {
        reasons.METRICS_UNAVAILABLE,
        reasons.METRICS_MISSING,
        reasons.METRICS_STALE,
        reasons.METRICS_PARTIAL,
        reasons.SCRAPE_TOO_SLOW,
    }
)
"""Holds that mean: measurements cannot be trusted."""
