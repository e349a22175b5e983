"""The conditions of a resource. A message names the remedy.

A message is not replaced if only its figures changed, so that a steady state writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from kvpilot_engine.contract.wording import counted
from kvpilot_operator.resource.model import DeploymentSpec
from kvpilot_operator.resource.resolve import not_yet_effective
from kvpilot_operator.status.model import ConditionStatus
from kvpilot_operator.status.snapshot import Snapshot
from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.context import at_text
from kvpilot_operator.tuning.decision import Decision
from kvpilot_operator.tuning.observation import OPTIONAL_COUNTS, Observation
from kvpilot_operator.tuning.policy import Mode, Policy
from kvpilot_operator.tuning.rules.order import REMEDIES

State = Literal["True", "False", "Unknown"]

CONDITION_TYPES: Mapping[str, str] = {
    "Ready": "At least the minimum of replicas is ready.",
    "Progressing": "Replicas are being replaced or started.",
    "MetricsTrusted": "Measurements are fresh and complete; without them no change is decided.",
    "ReplicaOutlier": "A replica is slower, fails more, is fuller or colder than others; no knob cures it.",
    "SLOMet": "Every objective is met.",
    "TuningActive": "kvpilot may make a change now.",
    "ApprovalPending": "A change waits for an approval; `kvpilot approve` gives it.",
    "Paused": "A KVCacheOverride pauses the resource.",
    "OverridesObeyed": "Every KVCacheOverride of the resource is in force as a whole.",
    "FieldManagerConflict": "Another field manager writes the number of replicas.",
    "Infeasible": "An objective cannot be reached within the bounds given.",
    "RolledBack": "The last change with a verdict was reverted, or an override went back behind it.",
    "EngineStalled": "Requests arrive and none completes.",
    "ConfigEffective": "Every given value of engine.config has an effect in this version.",
}

STARTING, BELOW_FLOOR = "ReplicasStarting", "ThroughputBelowFloor"
"""Reasons of ``Ready`` while a new resource starts, and of ``SLOMet`` while a breach is critical."""

NOT_EXPORTED = "Not every engine exports "
"""How the message about absent metrics begins; their names follow."""

MESSAGE_LIMIT = 1024
_FIGURE = re.compile(r"\d+(\.\d+)?")


@dataclass(frozen=True)
class Condition:
    """One condition without its times."""

    type: str
    status: State
    reason: str
    message: str
    spec_generation: int | None = None
    """The spec that it speaks of; None for the one in force."""


def same_but_for_figures(one: str, other: str) -> bool:
    """True if two sentences differ at most in their numbers."""
    return _FIGURE.sub("#", one) == _FIGURE.sub("#", other)


def dated(
    conditions: Iterable[Condition], before: Iterable[ConditionStatus], generation: int, now: float
) -> tuple[ConditionStatus, ...]:
    """The conditions of the status; ``lastTransitionTime`` changes only with a condition's status."""
    result = {item.type: item for item in before}
    for new in conditions:
        old, message = result.get(new.type), new.message[:MESSAGE_LIMIT]
        observed = generation if new.spec_generation is None else new.spec_generation
        if old is not None and (old.observed_generation, old.reason) == (observed, new.reason):
            # New figures alone write nothing; a new spec gets its own.
            message = old.message if same_but_for_figures(old.message, message) else message
        result[new.type] = ConditionStatus(
            type=new.type,
            status=new.status,
            reason=new.reason,
            message=message,
            last_transition_time=old.last_transition_time
            if old is not None and old.status == new.status
            else int(now),
            observed_generation=observed,
        )
    order = list(CONDITION_TYPES)
    return tuple(
        sorted(result.values(), key=lambda item: order.index(item.type) if item.type in order else len(order))
    )


def invalid_spec(message: str, spec_generation: int) -> Condition:
    """The present spec is invalid."""
    return Condition("Ready", "False", "InvalidSpec", message, spec_generation)


def conditions_of(
    snapshot: Snapshot, policy: Policy, observation: Observation, decision: Decision
) -> list[Condition]:
    """All conditions; RolledBack only with a new verdict, else it stays."""
    spec = snapshot.resource.spec
    found = [
        _invalid(snapshot) if snapshot.spec_error else _ready(snapshot, spec),
        _progressing(snapshot, observation),
        _metrics_trusted(policy, observation, decision),
        _outlier(decision),
        _slo_met(decision),
        _tuning_active(policy, observation, decision),
        _approval_pending(snapshot, decision),
        _paused(observation),
        _overrides_obeyed(snapshot),
        _field_manager_conflict(snapshot, observation),
        _infeasible(decision),
        _engine_stalled(decision),
        _config_effective(spec),
    ]
    return [*found, *_rolled_back(decision)]


def _invalid(snapshot: Snapshot) -> Condition:
    message = f"{snapshot.spec_error}; generation {snapshot.resource.metadata.generation} stays in force"
    return invalid_spec(message, snapshot.spec_generation)


def _ready(snapshot: Snapshot, spec: DeploymentSpec) -> Condition:
    wanted = spec.scaling.minimum if spec.scaling is not None else spec.replicas or 0
    serving = sum(replica.ready and not replica.terminating for replica in snapshot.replicas)
    if wanted == 0:
        return Condition("Ready", "True", "ScaledToZero", "The spec asks for no replicas.")
    if serving >= wanted:
        return Condition("Ready", "True", "Serving", "At least the minimum of replicas is ready.")
    message = f"{serving} of at least {counted(wanted, 'replica', 'is', 'are')} ready"
    if stuck := _stuck(snapshot):
        message = f"{message}: {'; '.join(stuck)}"
    return Condition("Ready", "False", _not_ready(snapshot, serving), f"{message}.")


def _not_ready(snapshot: Snapshot, serving: int) -> str:
    """The reason: a new resource starts until a replica is stuck or it was ready once."""
    before = snapshot.status.condition("Ready")
    if not _stuck(snapshot) and (before is None or before.reason == STARTING):
        return STARTING
    return "ReplicasNotReady" if serving else "NoReplicaReady"


def _stuck(snapshot: Snapshot) -> list[str]:
    """What keeps replicas from becoming ready, and the workload from creating more of them."""
    waiting = [
        f"{replica.name}: {replica.pending_reason}" for replica in snapshot.replicas if replica.pending_reason
    ]
    return [snapshot.replica_failure, *waiting] if snapshot.replica_failure else waiting


def _progressing(snapshot: Snapshot, observation: Observation) -> Condition:
    if stuck := _stuck(snapshot):
        return Condition("Progressing", "True", "ReplicasPending", "Waiting for " + "; ".join(stuck))
    if observation.rolling_out:
        return Condition("Progressing", "True", "RollingOut", "Pods are replaced one after the other.")
    serving = len(observation.ready)
    if serving < observation.desired_replicas:
        return Condition("Progressing", "True", "ReplicasStarting", "Replicas are starting.")
    return Condition("Progressing", "False", "Complete", "All replicas are ready.")


def _metrics_trusted(policy: Policy, observation: Observation, decision: Decision) -> Condition:
    if (problem := observation.metrics_problem) is not None:
        return Condition("MetricsTrusted", "False", problem.reason, problem.message)
    for hold in decision.state.holds:
        if hold.reason in METRIC_HOLDS:
            return Condition("MetricsTrusted", "False", hold.reason, hold.message)
    if not observation.ready:
        return Condition("MetricsTrusted", "Unknown", "NoReplicaReady", "No replica is ready to be measured.")
    return _fresh(policy, decision)


def _fresh(policy: Policy, decision: Decision) -> Condition:
    """Measurements are trusted; the first restriction gives the reason, and the message tells them all."""
    slow = f"The source scrapes seldom, so all durations are {policy.stretched:.1f} times as long."
    few = f"Fresh but for a few replicas, which are not judged. {decision.partly_trusted}."
    restrictions = {
        "NearlyAll": few if decision.partly_trusted else "",
        reasons.METRIC_ABSENT: _absent(policy, decision),
        "SlowScrapes": slow if policy.stretched > 1 else "",
    }
    found = {reason: message for reason, message in restrictions.items() if message}
    if not found:
        return Condition("MetricsTrusted", "True", "Fresh", "Measurements of every ready replica are fresh.")
    return Condition("MetricsTrusted", "True", next(iter(found)), " ".join(found.values()))


def _absent(policy: Policy, decision: Decision) -> str:
    """Metrics that not every engine exports, and what stands aside without them; "" without any."""
    asides = {item.name: item.reads for item in REMEDIES}
    if policy.objectives.signal == "firstToken":
        asides["the latency objectives"] = ("first_token_within",)
    aside = {name: missed for name, reads in asides.items() if (missed := set(reads) & set(decision.absent))}
    if not aside:
        return ""
    metrics = sorted({OPTIONAL_COUNTS[item] for missed in aside.values() for item in missed})
    them = "it" if len(metrics) == 1 else "them"
    return f"{NOT_EXPORTED}{', '.join(metrics)}. Without {them} stand aside: {', '.join(aside)}."


def _outlier(decision: Decision) -> Condition:
    if not decision.outliers:
        return Condition("ReplicaOutlier", "False", "Alike", "The replicas are alike.")
    message = f"{'; '.join(decision.outliers)}. Knobs of all replicas do not cure it; look at its node."
    return Condition("ReplicaOutlier", "True", "Differs", message)


def _slo_met(decision: Decision) -> Condition:
    breached = [item for item in decision.objectives if item.state == "Breached"]
    names = ", ".join(item.name for item in breached)
    if any(item.severity == "critical" for item in breached):
        message = f"Critical: completions are below the throughput floor. Breached: {names}."
        return Condition("SLOMet", "False", BELOW_FLOOR, message)
    if breached:
        return Condition("SLOMet", "False", "Breached", f"Breached: {names}.")
    beyond = [item.name for item in decision.objectives if item.state == "Infeasible"]
    if beyond:
        return Condition("SLOMet", "False", "Infeasible", f"Out of reach: {', '.join(beyond)}.")
    if any(item.state == "Met" for item in decision.objectives):
        return Condition("SLOMet", "True", "AllMet", "Every objective that can be judged is met.")
    return Condition("SLOMet", "Unknown", "NothingToJudge", "There is no traffic or no data to judge by.")


def _tuning_active(policy: Policy, observation: Observation, decision: Decision) -> Condition:
    if observation.fleet.off:
        return Condition("TuningActive", "False", reasons.KILL_SWITCH, observation.fleet.off)
    if policy.mode == "Off":
        return Condition("TuningActive", *_BY_MODE["Off"])
    if observation.paused_by:
        return Condition(
            "TuningActive", "False", "Paused", f"KVCacheOverride {observation.paused_by} is in force."
        )
    if decision.state.holds:
        hold = decision.state.holds[0]
        return Condition("TuningActive", "False", hold.reason, hold.message)
    return Condition("TuningActive", *_BY_MODE[policy.mode])


_BY_MODE: Mapping[Mode, tuple[State, str, str]] = {
    "Off": ("False", "ModeOff", "spec.tuning.mode is Off: kvpilot only measures."),
    "Recommend": ("False", "RecommendOnly", "spec.tuning.mode is Recommend."),
    "Approve": ("True", "WithApproval", "kvpilot makes changes that are approved."),
    "Auto": ("True", "Active", "kvpilot may make changes."),
}
"""Status, reason and message of TuningActive where nothing else stands in the way."""


def _approval_pending(snapshot: Snapshot, decision: Decision) -> Condition:
    waiting = [item for item in decision.state.pending if not item.approved_by]
    if not waiting:
        return Condition("ApprovalPending", "False", "NothingPending", "No change waits for an approval.")
    name = snapshot.key.name
    commands = "; ".join(
        f"{item.rule}: kvpilot approve {name} {item.id}, before {at_text(item.expires)}" for item in waiting
    )
    return Condition("ApprovalPending", "True", "Proposed", commands)


def _paused(observation: Observation) -> Condition:
    if observation.paused_by:
        what = "tuning and scaling" if observation.scaling_paused else "tuning; bounds and boosts go on"
        message = f"KVCacheOverride {observation.paused_by} pauses {what}; delete it or let it expire."
        return Condition("Paused", "True", "Override", message)
    return Condition("Paused", "False", "NotPaused", "No override pauses this resource.")


def _overrides_obeyed(snapshot: Snapshot) -> Condition:
    if refused := snapshot.overrides.refused:
        reported = "; ".join(f"{item.name}: {item.message}" for item in refused)
        return Condition("OverridesObeyed", "False", refused[0].reason, reported)
    return Condition("OverridesObeyed", "True", "AllObeyed", "No override is refused or limited.")


def _field_manager_conflict(snapshot: Snapshot, observation: Observation) -> Condition:
    if snapshot.autoscaler:
        return Condition(
            "FieldManagerConflict",
            "True",
            "OtherManager",
            f"{snapshot.autoscaler} also writes the number of replicas; kvpilot does not while it exists. "
            "Delete it, or let it scale this resource with spec.replicas.",
        )
    if observation.replicas_managed_by:
        return Condition(
            "FieldManagerConflict",
            "True",
            "OtherManager",
            f"{observation.replicas_managed_by} also wrote the number of replicas; kvpilot stops scaling and "
            "continues from that number ten minutes after this began. To set the number permanently, use "
            "spec.replicas instead of spec.scaling.",
        )
    return Condition(
        "FieldManagerConflict", "False", "NoConflict", "No other field manager writes the number of replicas."
    )


def _infeasible(decision: Decision) -> Condition:
    if decision.infeasible:
        return Condition("Infeasible", "True", "TargetUnreachable", decision.infeasible)
    return Condition("Infeasible", "False", "Feasible", "No objective is known to be out of reach.")


def _engine_stalled(decision: Decision) -> Condition:
    if decision.stalled:
        return Condition("EngineStalled", "True", "NoCompletions", decision.stalled)
    return Condition("EngineStalled", "False", "Completing", "Requests complete.")


NOTHING_JUDGED = Condition("RolledBack", "False", "NothingJudged", "No change has been judged yet.")
"""The first RolledBack condition of a resource."""


def _rolled_back(decision: Decision) -> list[Condition]:
    """The condition after a new verdict; [] without one."""
    for record in reversed(decision.records):
        if record.outcome == "Reverted":
            return [Condition("RolledBack", "True", "Reverted", record.summary)]
        if record.outcome == "RolledBack":
            return [Condition("RolledBack", "True", "ByOverride", record.summary)]
        if record.outcome == "Promoted":
            return [Condition("RolledBack", "False", "Promoted", record.summary)]
    return []


def _config_effective(spec: DeploymentSpec) -> Condition:
    idle = not_yet_effective(spec)
    if idle:
        reported = "; ".join(f"{notice.field} {notice.message}" for notice in idle)
        return Condition("ConfigEffective", "False", "NotYetEffective", reported)
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
"""Holds that mean that measurements cannot be trusted."""
