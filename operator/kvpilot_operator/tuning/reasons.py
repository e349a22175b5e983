"""Named reasons: why something is held, refused, diagnosed or taken back. They are spelled here only.

They appear in status, Events, metrics, records and ``kvpilot explain``; the reference page is made from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["hold", "rejection", "diagnosis", "verdict"]


@dataclass(frozen=True)
class Reason:
    """One reason, for users: where it appears and what it means."""

    name: str
    kind: Kind
    meaning: str


# Holds: nothing is changed while one of them stands.
NOT_ROLLED_OUT = "NotRolledOut"
NO_PODS_READY = "NoPodsReady"
METRICS_UNAVAILABLE = "MetricsUnavailable"
SCRAPE_TOO_SLOW = "ScrapeTooSlow"
METRICS_MISSING = "MetricsMissing"
METRICS_STALE = "MetricsStale"
METRICS_PARTIAL = "MetricsPartial"
ENGINE_UNREACHABLE = "EngineUnreachable"
STALLED = "EngineStalled"
ROLLING_OUT = "RollingOut"
PAUSED = "Paused"
ACTUATOR_CONFLICT = "ActuatorConflict"
COOLDOWN = "Cooldown"
DRAINING = "Draining"
FLAP_BUDGET = "FlapBudgetSpent"
NO_REMEDY = "NoRemedy"
TOO_LITTLE_EXPOSURE = "TooLittleExposure"
SINGLE_REPLICA = "SingleReplica"

# Rejections: a rule was considered and not taken.
NOT_AT_FAULT = "NotAtFault"
RULE_DISABLED = "RuleDisabled"
NOT_TUNABLE = "NotTunable"
AT_BOUND = "AtBound"
DEVICE_SATURATED = "DeviceSaturated"
PAGES_SHORT = "PagesShort"
VALUE_BARRED = "ValueBarred"
SMALL_GAIN = "SmallGain"
MEMORY_TIGHT = "MemoryTight"
INACCURATE = "PrefetchInaccurate"
NO_EVICTIONS = "NoEvictions"
TARGET_ABOVE_CEILING = "TargetAboveCeiling"
NOT_EFFECTIVE = "NotEffective"

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
POD_RESTARTED = "PodRestarted"
PUSH_FAILED = "PushFailed"
TOO_FEW_REQUESTS = "TooFewRequests"
BREACH_GONE = "BreachGone"
SPEC_CHANGED = "SpecChanged"
MODE_CHANGED = "ModeChanged"
SCALING_OUT = "ScalingOut"

REASONS: tuple[Reason, ...] = (
    Reason(NOT_ROLLED_OUT, "hold", "There is no configuration yet; the first roll-out writes one."),
    Reason(NO_PODS_READY, "hold", "No engine is ready, so there is nothing to measure or change."),
    Reason(METRICS_UNAVAILABLE, "hold", "The metrics source did not answer. No data is not zero."),
    Reason(SCRAPE_TOO_SLOW, "hold", "The short window holds fewer than 4 scrapes; use a slower pace."),
    Reason(METRICS_MISSING, "hold", "A ready engine has no metrics."),
    Reason(METRICS_STALE, "hold", "The metrics of a ready engine are older than 3 scrapes."),
    Reason(METRICS_PARTIAL, "hold", "A ready engine was measured for less than 80% of the long window."),
    Reason(ENGINE_UNREACHABLE, "hold", "The admin API of a ready engine did not answer."),
    Reason(STALLED, "hold", "Requests arrive at an engine and none ends; it is never scaled in for that."),
    Reason(ROLLING_OUT, "hold", "The workload is replacing its pods."),
    Reason(PAUSED, "hold", "A KVCacheOverride pauses this resource."),
    Reason(ACTUATOR_CONFLICT, "hold", "Another manager writes the replicas; kvpilot does not scale."),
    Reason(COOLDOWN, "hold", "A change ended a short while ago; its effect must show before the next one."),
    Reason(DRAINING, "hold", "Completions outrun arrivals: the backlog that is left goes away by itself."),
    Reason(FLAP_BUDGET, "hold", "The knob was taken back as often in 6 hours as is allowed."),
    Reason(NO_REMEDY, "hold", "An objective is breached and no rule promises relief."),
    Reason(TOO_LITTLE_EXPOSURE, "hold", "Too few requests arrive to judge an experiment in time."),
    Reason(
        SINGLE_REPLICA, "hold", "One replica has nothing to be compared with, so a change is only advised."
    ),
    Reason(NOT_AT_FAULT, "rejection", "The rule cures something that is not at fault."),
    Reason(RULE_DISABLED, "rejection", "The resource lists the rule in spec.tuning.disabledRules."),
    Reason(NOT_TUNABLE, "rejection", "The resource excludes the knob, or the engine cannot change it hot."),
    Reason(AT_BOUND, "rejection", "The knob is at its bound, or at what the engine can hold."),
    Reason(DEVICE_SATURATED, "rejection", "The device is busy 90% of the time and more rows gain under 10%."),
    Reason(PAGES_SHORT, "rejection", "Workers are idle while requests wait: free pages are short."),
    Reason(VALUE_BARRED, "rejection", "The value did harm or did not help during the last 24 hours."),
    Reason(SMALL_GAIN, "rejection", "The predicted gain is under 5%."),
    Reason(MEMORY_TIGHT, "rejection", "The change needs memory that is not ample."),
    Reason(INACCURATE, "rejection", "Too many prefetched blocks are wasted to fetch further ahead."),
    Reason(NO_EVICTIONS, "rejection", "Nothing is evicted, so a larger cache would hold nothing more."),
    Reason(
        TARGET_ABOVE_CEILING, "rejection", "Not even an infinite cache would reach the hit rate asked for."
    ),
    Reason(NOT_EFFECTIVE, "rejection", "The knob has nothing to act on as the engine is configured."),
    Reason(ALL_MET, "diagnosis", "Every objective that can be judged is met."),
    Reason(NO_TRAFFIC, "diagnosis", "No engine has arrivals, requests in flight, or a queue."),
    Reason(NOT_ENOUGH_DATA, "diagnosis", "Fewer than 20 requests were judged, or there is no data."),
    Reason(QUEUE_AT_ADMISSION, "diagnosis", "Requests wait for a worker slot or a free page."),
    Reason(TIER_LOAD_SLOW, "diagnosis", "Requests wait for cached blocks of a slower tier."),
    Reason(QUEUE_AT_BATCH, "diagnosis", "Admitted requests wait for a row or for tokens of a step."),
    Reason(PREFILL_HEAVY, "diagnosis", "Most time goes into computing prompts."),
    Reason(DECODE_HEAVY, "diagnosis", "Most time goes into generating tokens."),
    Reason(PREEMPTING, "diagnosis", "Requests lose their pages and wait to run again."),
    Reason(MEMORY_OVER_LIMIT, "diagnosis", "Memory is above the share of its limit that is allowed."),
    Reason(HIT_RATE_LOW, "diagnosis", "Fewer prompt tokens come from the cache than asked for."),
    Reason(PROMOTED, "verdict", "Proven on the canary, and now everywhere."),
    Reason(HARMFUL, "verdict", "The canary did worse than its controls; the value is barred for 24 hours."),
    Reason(NO_GAIN, "verdict", "Less than half of the predicted gain; the value is barred for 24 hours."),
    Reason(INCONCLUSIVE, "verdict", "Neither gain nor harmlessness could be shown in time."),
    Reason(EMERGENCY, "verdict", "Done at once and everywhere, since memory was nearly exhausted."),
    Reason(CANARY_LOST, "verdict", "Aborted: the canary went away."),
    Reason(CONTROL_LOST, "verdict", "Aborted: a control went away."),
    Reason(POD_RESTARTED, "verdict", "Aborted: a pod of either arm restarted."),
    Reason(PUSH_FAILED, "verdict", "Aborted: an engine did not take the configuration in time."),
    Reason(TOO_FEW_REQUESTS, "verdict", "Aborted: too few requests to judge within the time allowed."),
    Reason(BREACH_GONE, "verdict", "Aborted: the objective is met without the change as well."),
    Reason(SPEC_CHANGED, "verdict", "Aborted: the user changed the configuration."),
    Reason(MODE_CHANGED, "verdict", "Aborted: the mode is no longer Auto."),
    Reason(SCALING_OUT, "verdict", "Aborted: capacity is added first."),
)
"""Every reason, in the order of the reference page."""
