"""Named reasons of holds, rejections, diagnoses and verdicts.

They appear in status, Events, metrics, records and ``kvpilot explain``; the reference page lists them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["hold", "rejection", "diagnosis", "verdict"]


@dataclass(frozen=True)
class Reason:
    """One reason: where it appears and what it means, for users."""

    name: str
    kind: Kind
    meaning: str


# Holds: no change is made while one of them stands.
NOT_ROLLED_OUT = "NotRolledOut"
NO_REPLICAS_READY = "NoReplicasReady"
METRICS_UNAVAILABLE = "MetricsUnavailable"
SCRAPE_TOO_SLOW = "ScrapeTooSlow"
METRICS_MISSING = "MetricsMissing"
METRICS_STALE = "MetricsStale"
METRICS_PARTIAL = "MetricsPartial"
OUTLIER = "ReplicaOutlier"
ENGINE_UNREACHABLE = "EngineUnreachable"
STALLED = "EngineStalled"
ROLLING_OUT = "RollingOut"
PAUSED = "Paused"
SPEC_INVALID = "SpecInvalid"
FIELD_MANAGER_CONFLICT = "FieldManagerConflict"
COOLDOWN = "Cooldown"
WATCHING = "Watching"
DRAINING = "Draining"
REPLICA_BEHIND = "ReplicaBehind"
FLAP_BUDGET = "FlapBudgetSpent"
NO_REMEDY = "NoRemedy"
TOO_LITTLE_EXPOSURE = "TooLittleExposure"
SINGLE_REPLICA = "SingleReplica"
OUTSIDE_WINDOW = "OutsideMaintenanceWindow"
KILL_SWITCH = "KillSwitch"
FLEET_LIMIT = "FleetLimit"
UPGRADE_TRIAL = "UpgradeTrial"
RULE_BLOCKED = "RuleOnlyRecommended"
RESTART_BUDGET = "RestartBudget"
CACHE_BUDGET = "CacheBudget"

# Rejections: a rule was considered and not taken.
NOT_AT_FAULT = "NotAtFault"
RULE_DISABLED = "RuleDisabled"
NOT_TUNABLE = "NotTunable"
PINNED = "Pinned"
AT_BOUND = "AtBound"
DEVICE_SATURATED = "DeviceSaturated"
WAITING_FOR_PAGES = "WaitingForPages"
VALUE_BLOCKED = "ValueBlocked"
SMALL_GAIN = "SmallGain"
MEMORY_TIGHT = "MemoryTight"
INACCURATE = "PrefetchInaccurate"
NO_EVICTIONS = "NoEvictions"
TARGET_ABOVE_CEILING = "TargetAboveCeiling"
NOT_EFFECTIVE = "NotEffective"
REPLICAS_FIXED = "ReplicasFixed"
GPU_BUDGET = "GpuBudget"
REPLICAS_PENDING = "ReplicasPending"
KNOBS_FIRST = "KnobsFirst"
METRIC_ABSENT = "MetricAbsent"

# Diagnoses: why an objective is breached.
ALL_MET = "AllMet"
NO_TRAFFIC = "NoTraffic"
NOT_ENOUGH_DATA = "NotEnoughData"
QUEUE_AT_ADMISSION = "QueueAtAdmission"
TIER_LOAD_SLOW = "TierLoadSlow"
QUEUE_AT_BATCH = "QueueAtBatch"
PREFILL_HEAVY = "PrefillHeavy"
DECODE_HEAVY = "DecodeHeavy"
PREEMPTING = "Preempting"
MEMORY_OVER_LIMIT = "MemoryOverLimit"
HIT_RATE_LOW = "HitRateLow"

# Verdicts on a change; a reason in brackets follows Aborted.
PROMOTED = "Promoted"
HARMFUL = "Harmful"
NO_GAIN = "NoGain"
INCONCLUSIVE = "Inconclusive"
EMERGENCY = "Emergency"
CANARY_LOST = "CanaryLost"
CONTROL_LOST = "ControlLost"
REPLICA_RESTARTED = "ReplicaRestarted"
PUSH_FAILED = "PushFailed"
TOO_FEW_REQUESTS = "TooFewRequests"
UNOBSERVED = "Unobserved"
CANARY_STALLED = "CanaryStalled"
BREACH_GONE = "BreachGone"
SPEC_CHANGED = "SpecChanged"
MODE_CHANGED = "ModeChanged"
ROLLED_BACK = "RolledBack"
SCALING_OUT = "ScalingOut"

REASONS: tuple[Reason, ...] = (
    Reason(NOT_ROLLED_OUT, "hold", "There is no configuration yet; the first roll-out writes it."),
    Reason(NO_REPLICAS_READY, "hold", "No replica is ready, so there is nothing to measure or change."),
    Reason(
        METRICS_UNAVAILABLE,
        "hold",
        "The metrics source did not answer. Missing data is never taken for zero.",
    ),
    Reason(
        SCRAPE_TOO_SLOW,
        "hold",
        "The engines are scraped less than once a minute, or the short window holds fewer than 4 scrapes.",
    ),
    Reason(METRICS_MISSING, "hold", "A ready replica has no metrics."),
    Reason(METRICS_STALE, "hold", "The metrics of a ready replica are older than 3 scrapes."),
    Reason(
        METRICS_PARTIAL,
        "hold",
        "A ready replica was measured for less than 80% of the long window, or a value is not finite.",
    ),
    Reason(
        OUTLIER,
        "hold",
        "Only replicas that differ from the others by themselves breach an objective; no knob cures them.",
    ),
    Reason(ENGINE_UNREACHABLE, "hold", "The admin API of a ready replica did not answer."),
    Reason(STALLED, "hold", "Requests arrive at a replica and none ends; it is not scaled in for that."),
    Reason(ROLLING_OUT, "hold", "The workload replaces its pods."),
    Reason(PAUSED, "hold", "A KVCacheOverride pauses this resource."),
    Reason(SPEC_INVALID, "hold", "The spec is invalid; the last valid one stays in force."),
    Reason(FIELD_MANAGER_CONFLICT, "hold", "Another manager writes the replicas; kvpilot does not scale."),
    Reason(COOLDOWN, "hold", "A change ended a short while ago; its effect must show before the next one."),
    Reason(WATCHING, "hold", "The last change runs on all replicas and is still compared with before."),
    Reason(
        REPLICA_BEHIND,
        "hold",
        "An engine answers and does not take the promoted configuration; it is pushed at every reconcile.",
    ),
    Reason(DRAINING, "hold", "Completions exceed arrivals, so the backlog drains without a change."),
    Reason(FLAP_BUDGET, "hold", "Changes of the knob were reverted as often in 6 hours as is allowed."),
    Reason(NO_REMEDY, "hold", "An objective is breached, and kvpilot knows no change that would help."),
    Reason(TOO_LITTLE_EXPOSURE, "hold", "Too few requests arrive to judge an experiment in time."),
    Reason(SINGLE_REPLICA, "hold", "One replica has no controls, so a change is only recommended."),
    Reason(KILL_SWITCH, "hold", "Tuning is switched off for the whole operator; candidates are taken back."),
    Reason(FLEET_LIMIT, "hold", "At most one resource, or 5% of them, is in a change at a time."),
    Reason(UPGRADE_TRIAL, "hold", "After an upgrade other rules act on 5% of the resources first."),
    Reason(
        RULE_BLOCKED, "hold", "Three changes by the rule did harm within an hour, so it is only recommended."
    ),
    Reason(RESTART_BUDGET, "hold", "Replicas restarted during changes as often in a day as is allowed."),
    Reason(CACHE_BUDGET, "hold", "Changes dropped as much cache in a day as is allowed."),
    Reason(OUTSIDE_WINDOW, "hold", "No window of spec.tuning.maintenanceWindows is open."),
    Reason(NOT_AT_FAULT, "rejection", "The remedy cures something that is not at fault."),
    Reason(RULE_DISABLED, "rejection", "The resource lists the rule in spec.tuning.disabledRules."),
    Reason(
        NOT_TUNABLE,
        "rejection",
        "The resource excludes the knob or the direction.",
    ),
    Reason(AT_BOUND, "rejection", "The knob is at its bound, or at what the engine can hold."),
    Reason(
        DEVICE_SATURATED,
        "rejection",
        "The device steps 90% of the time and one more row gains under 10% (twice as many under 15%).",
    ),
    Reason(WAITING_FOR_PAGES, "rejection", "Requests wait while worker slots are free: pages are short."),
    Reason(VALUE_BLOCKED, "rejection", "The value did harm or did not help during the last 24 hours."),
    Reason(SMALL_GAIN, "rejection", "The predicted gain is under 5%."),
    Reason(MEMORY_TIGHT, "rejection", "The change needs more memory than is free below the objective."),
    Reason(INACCURATE, "rejection", "Too many prefetched blocks are wasted already."),
    Reason(NO_EVICTIONS, "rejection", "Nothing is evicted, so a larger cache would hold nothing more."),
    Reason(
        TARGET_ABOVE_CEILING, "rejection", "Not even an infinite cache would reach the hit rate asked for."
    ),
    Reason(NOT_EFFECTIVE, "rejection", "The knob has no effect in this configuration."),
    Reason(REPLICAS_FIXED, "rejection", "spec.replicas fixes the number of replicas."),
    Reason(PINNED, "rejection", "An override pins the knob; an experiment on it is aborted."),
    Reason(GPU_BUDGET, "rejection", "spec.tuning.budgets.maxGPUs allows no more replicas."),
    Reason(REPLICAS_PENDING, "rejection", "Replicas that were asked for are not ready yet."),
    Reason(KNOBS_FIRST, "rejection", "A knob promises relief, and costs less than a replica."),
    Reason(METRIC_ABSENT, "rejection", "Not every engine exports a metric that the rule reads."),
    Reason(ALL_MET, "diagnosis", "Every objective that can be judged is met."),
    Reason(NO_TRAFFIC, "diagnosis", "No replica has arrivals, requests in flight, or a queue."),
    Reason(NOT_ENOUGH_DATA, "diagnosis", "Fewer than 20 requests were judged, or there is no data."),
    Reason(QUEUE_AT_ADMISSION, "diagnosis", "Requests wait for a worker slot or a free page."),
    Reason(TIER_LOAD_SLOW, "diagnosis", "Requests wait for blocks from a slower tier."),
    Reason(QUEUE_AT_BATCH, "diagnosis", "Admitted requests wait for a row or for tokens of a step."),
    Reason(PREFILL_HEAVY, "diagnosis", "Most time goes into prefill."),
    Reason(DECODE_HEAVY, "diagnosis", "Most time goes into decode."),
    Reason(PREEMPTING, "diagnosis", "Requests are preempted for their pages and run again."),
    Reason(MEMORY_OVER_LIMIT, "diagnosis", "Memory is above the share of its limit that is allowed."),
    Reason(HIT_RATE_LOW, "diagnosis", "Fewer prompt tokens come from the cache than asked for."),
    Reason(PROMOTED, "verdict", "Proven on the canary and rolled out to all replicas."),
    Reason(HARMFUL, "verdict", "The canary did worse than its controls; the value is blocked for 24 hours."),
    Reason(NO_GAIN, "verdict", "Less than half of the predicted gain; the value is blocked for 24 hours."),
    Reason(
        INCONCLUSIVE,
        "verdict",
        "Neither gain nor harmlessness could be shown in time; the value is blocked for ten cooldowns.",
    ),
    Reason(
        CANARY_STALLED,
        "verdict",
        "The canary completes nothing and its controls do; the value is blocked for ten cooldowns.",
    ),
    Reason(EMERGENCY, "verdict", "Made on all replicas at once, since memory was nearly exhausted."),
    Reason(CANARY_LOST, "verdict", "Aborted: the canary is gone."),
    Reason(CONTROL_LOST, "verdict", "Aborted: a control is gone."),
    Reason(REPLICA_RESTARTED, "verdict", "Aborted: a replica of either arm restarted."),
    Reason(
        PUSH_FAILED,
        "verdict",
        "Aborted: an engine did not take the configuration in time. The value waits ten cooldowns.",
    ),
    Reason(TOO_FEW_REQUESTS, "verdict", "Aborted: too few requests to judge within the time allowed."),
    Reason(UNOBSERVED, "verdict", "Aborted: its replicas could not be measured for too long."),
    Reason(BREACH_GONE, "verdict", "Aborted: the controls meet the objective without the change."),
    Reason(SPEC_CHANGED, "verdict", "Aborted: the user changed the configuration."),
    Reason(MODE_CHANGED, "verdict", "Aborted: the mode no longer permits it."),
    Reason(ROLLED_BACK, "verdict", "Aborted: an override goes back to an earlier generation."),
    Reason(SCALING_OUT, "verdict", "Aborted: capacity is added first."),
)
"""Every reason, in the order of the reference page."""
