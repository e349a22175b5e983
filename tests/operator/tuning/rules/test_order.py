"""Each rule on recorded observations: what it proposes with which figures, and why it does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from tests.tuning.observations import BAD, NOW, gauges, look_at, observe, three
from tests.tuning.simulation import CATALOGUE_BOUNDS, PRODUCTION, policy_of

from kvpilot_operator.tuning.bounds import room
from kvpilot_operator.tuning.look import Look, Plan, Proposal
from kvpilot_operator.tuning.policy import KnobBounds, Policy
from kvpilot_operator.tuning.rules import RULES, consider
from kvpilot_operator.tuning.state import Barred, Reversal, TuningState

QUEUED = {"admission_wait": 0.71, "prefill": 0.04, "decode": 0.25}
SMALL = {"numWorkers": 2, "batchSize": 2}


def look(config: Mapping[str, Any], policy: Policy | None = None, **figures: Any) -> Look:
    return look_at(observe(*three(attained=BAD, **figures), config=config), policy)


def plan(config: Mapping[str, Any], policy: Policy | None = None, **figures: Any) -> Plan:
    return consider(look(config, policy, **figures), TuningState())


def proposed(found: Plan) -> Proposal:
    assert found.proposal is not None, found.rejected
    return found.proposal


def values(found: Plan) -> dict[str, tuple[Any, Any]]:
    return {item.knob: (item.before, item.after) for item in proposed(found).values}


def why_not(found: Plan, rule: str) -> tuple[str, str]:
    return next((item.reason, item.message) for item in found.rejected if item.rule == rule)


def bounded(**limits: tuple[float, float]) -> Policy:
    own = {name: KnobBounds(name, low, high) for name, (low, high) in limits.items()}
    return policy_of(bounds={**CATALOGUE_BOUNDS, **own})


def test_rules_stand_in_order_of_price_and_say_why() -> None:
    assert [rule.name for rule in RULES] == [
        "memory-relief",
        "workers-up",
        "batch-up",
        "step-tokens-up",
        "prefetch-up",
        "prefetch-down",
        "compression-looser",
        "cache-quota-up",
    ]
    assert all(rule.why for rule in RULES)


# Workers, batch, step tokens


def test_workers_are_sized_by_littles_law_and_carry_the_batch() -> None:
    # 20 requests/s x 0.29 s of work = 5.8 at once; with headroom 11.6: from 3 the next value is 12, fourfold.
    found = plan({"numWorkers": 3, "batchSize": 2}, stages=QUEUED)
    assert values(found) == {"numWorkers": (3, 12), "batchSize": (2, 12)}
    proposal = proposed(found)
    assert (proposal.rule, proposal.objective) == ("workers-up", "p95")
    assert proposal.predicted_gain == pytest.approx(0.71)
    assert proposal.message == (
        "admission wait was 71% of request time; 5.8 requests in work at once are needed per engine"
    )


def test_workers_grow_at_most_fourfold() -> None:
    assert values(plan(SMALL, stages=QUEUED, rate=90.0))["numWorkers"] == (2, 8)


def test_workers_alone_when_the_batch_holds_them() -> None:
    assert values(plan({"numWorkers": 2, "batchSize": 16}, stages=QUEUED)) == {"numWorkers": (2, 8)}


@pytest.mark.parametrize("ceiling", [{"numWorkers": 4}, None])
def test_workers_stay_within_bounds_and_ceilings(ceiling: dict[str, int] | None) -> None:
    policy = policy_of() if ceiling else bounded(numWorkers=(1, 4))
    found = plan(SMALL, policy, stages=QUEUED, ceilings=ceiling)
    assert values(found) == {"numWorkers": (2, 4), "batchSize": (2, 4)}


def test_workers_beyond_a_batch_that_cannot_grow_only_move_the_wait() -> None:
    found = plan(SMALL, bounded(batchSize=(1, 2)), stages=QUEUED)
    assert found.proposal is None
    assert why_not(found, "workers-up") == ("AtBound", "numWorkers is 2, and more would wait for the batch")


def test_a_saturated_device_gets_no_more_workers() -> None:
    full = gauges(marginal_gain=0.05)
    found = plan(SMALL, stages=QUEUED, busy=0.97, gauges=full)
    assert found.proposal is None
    assert why_not(found, "workers-up") == (
        "DeviceSaturated",
        "more requests at once would only share a device that is full",
    )


@pytest.mark.parametrize(("busy", "gain"), [(0.97, 0.9), (0.6, 0.05)])
def test_busy_with_few_rows_is_not_saturated(busy: float, gain: float) -> None:
    assert (
        proposed(plan(SMALL, stages=QUEUED, busy=busy, gauges=gauges(marginal_gain=gain))).rule
        == "workers-up"
    )


def test_waits_for_pages_are_not_waits_for_workers() -> None:
    config = {"numWorkers": 16, "batchSize": 16, "maxTokens": 2048}
    starved = gauges(waiting=20.0, running=6.0)
    found = plan(config, stages=QUEUED, gauges=starved)
    assert why_not(found, "workers-up") == (
        "PagesShort",
        "requests wait while fewer than 16 workers hold one",
    )
    assert (proposed(found).rule, values(found)) == ("cache-quota-up", {"maxTokens": (2048, 3072)})


def test_batch_grows_to_the_workers_at_most() -> None:
    stages = {"batch_wait": 0.5, "prefill": 0.1, "decode": 0.4}
    found = plan({"numWorkers": 8, "batchSize": 4}, stages=stages)
    assert (proposed(found).rule, values(found)) == ("batch-up", {"batchSize": (4, 8)})
    assert proposed(found).message == "batch wait was 50% of request time with 4 rows for 8 workers"
    assert why_not(found, "workers-up") == ("NotAtFault", "admission wait is not at fault")


def test_step_tokens_grow_when_steps_are_full_of_prompts() -> None:
    stages = {"prefill": 0.9, "decode": 0.1}
    config = {"numWorkers": 8, "batchSize": 8, "maxStepTokens": 256}
    full = plan(config, stages=stages, step_tokens=250.0)
    assert (proposed(full).rule, values(full)) == ("step-tokens-up", {"maxStepTokens": (256, 512)})
    assert proposed(full).predicted_gain == pytest.approx(0.45)
    assert why_not(plan(config, stages=stages, step_tokens=100.0), "step-tokens-up") == (
        "NotEffective",
        "steps do not fill 256 tokens",
    )


# Prefetch and codec

LOADING = {"tier_load": 0.6, "prefill": 0.1, "decode": 0.3}


def test_prefetch_goes_further_when_what_it_fetches_is_used() -> None:
    found = plan({"prefetchSize": 4}, stages=LOADING, prefetched=(3.0, 0.5))
    assert (proposed(found).rule, values(found)) == ("prefetch-up", {"prefetchSize": (4, 8)})
    assert (
        proposed(found).message == "tier load was 60% of request time and 86% of prefetched blocks were used"
    )
    assert proposed(found).predicted_gain == pytest.approx(0.3)


def test_prefetch_does_not_go_further_when_half_is_wasted() -> None:
    found = plan({"prefetchSize": 4}, stages=LOADING, prefetched=(1.0, 1.0))
    assert why_not(found, "prefetch-up") == ("PrefetchInaccurate", "50% of prefetched blocks were used")


def test_prefetch_is_switched_on_where_it_is_off() -> None:
    found = plan({"enablePrefetch": False, "prefetchSize": 8}, stages=LOADING)
    assert values(found) == {"enablePrefetch": (False, True), "prefetchSize": (8, 16)}


def test_wasted_prefetch_is_halved_without_any_breach() -> None:
    calm = observe(*three(prefetched=(0.2, 3.0)), config={"prefetchSize": 16})
    found = consider(look_at(calm), TuningState())
    assert (proposed(found).rule, values(found)) == ("prefetch-down", {"prefetchSize": (16, 8)})
    assert (proposed(found).objective, proposed(found).message) == (
        "prefetchWaste",
        "94% of prefetched blocks were wasted",
    )


def test_codec_loosens_by_a_rung_when_decoding_pays_and_memory_is_ample() -> None:
    config = {"compressionRatio": 0.3, "prefetchSize": 64}
    found = plan(config, stages=LOADING, codec=0.4)
    assert proposed(found).rule == "compression-looser"
    assert values(found) == {"compressionRatio": (0.3, 0.52), "hostMemoryMb": (256, 416)}
    tight = plan(config, stages=LOADING, codec=0.4, gauges=gauges(memory_ratio=0.7))
    assert why_not(tight, "compression-looser") == ("MemoryTight", "memory is at 70%")
    cheap = plan(config, stages=LOADING, codec=0.1)
    assert why_not(cheap, "compression-looser") == ("NotAtFault", "decoding is 17% of the time in tier loads")


def test_a_user_who_wants_no_codec_has_nothing_to_loosen() -> None:
    found = plan({"useCompression": False, "prefetchSize": 64}, stages=LOADING, codec=0.4)
    assert why_not(found, "compression-looser") == ("AtBound", "blocks are not encoded")


# Memory and quota


def test_memory_over_its_limit_cuts_the_budget_and_tightens_the_codec() -> None:
    # 88% of 1000 MiB, 72% is aimed at: 160 of 400 MiB must go; 60% of the bytes hold as many 8-bit blocks.
    fat = gauges(memory_ratio=0.88, cached_bytes=400 * 2**20, budget_bytes=500 * 2**20)
    found = plan({"compressionRatio": 1.0}, gauges=fat)
    assert proposed(found).rule == "memory-relief"
    assert values(found) == {"maxMemoryMb": (None, 240), "compressionRatio": (1.0, 0.52)}
    assert proposed(found).predicted_gain == pytest.approx(0.16 / 0.88, abs=0.01)
    assert proposed(found).message == (
        "memory was at 88% of its limit, 80% is allowed; the cache held 400 MiB"
    )


def test_memory_relief_at_the_tightest_codec_cuts_the_budget_alone() -> None:
    fat = gauges(memory_ratio=0.88, cached_bytes=400 * 2**20, budget_bytes=500 * 2**20)
    assert values(plan({"compressionRatio": 0.3}, gauges=fat)) == {"maxMemoryMb": (None, 240)}


def test_memory_without_a_known_limit_falls_in_steps() -> None:
    fat = gauges(
        memory_ratio=0.88, cached_bytes=400 * 2**20, budget_bytes=500 * 2**20, memory_limit_bytes=0.0
    )
    assert values(plan({"compressionRatio": 0.3}, gauges=fat)) == {"maxMemoryMb": (None, 300)}


def test_memory_that_is_not_the_caches_is_not_cut_below_the_bound() -> None:
    thin = gauges(memory_ratio=0.88, cached_bytes=90 * 2**20, budget_bytes=500 * 2**20)
    assert why_not(plan({}, gauges=thin), "memory-relief") == (
        "AtBound",
        "the cache holds 90 MiB, and 100 MiB is the least",
    )


CALM_BUT_MISSING = {"hit": 0.5, "ceiling": 0.9, "evicted": 2.0}


def missing(**figures: Any) -> Plan:
    seen = observe(*three(**{**CALM_BUT_MISSING, **figures}), config={"maxTokens": 4096})
    return consider(look_at(seen, policy_of(objectives=PRODUCTION)), TuningState())


def test_quota_grows_when_the_hit_rate_is_low_and_pages_are_evicted() -> None:
    found = missing()
    assert (proposed(found).rule, values(found)) == ("cache-quota-up", {"maxTokens": (4096, 6144)})
    assert proposed(found).objective == "hitRate"
    assert proposed(found).predicted_gain == pytest.approx(0.4 * (1 - 4096 / 6144) / 0.5)
    assert proposed(found).message == (
        "50% of prompt tokens came from the cache, an infinite one would give 90%"
    )


@pytest.mark.parametrize(
    ("figures", "reason", "message"),
    [
        ({"evicted": 0.0}, "NoEvictions", "nothing is evicted"),
        (
            {"hit": 0.3, "ceiling": 0.4},
            "TargetAboveCeiling",
            "not even an infinite cache would reach the hit rate asked for",
        ),
        (
            {"gauges": gauges(memory_ratio=0.7)},
            "MemoryTight",
            "memory is at 70%, and 128 MiB more are needed",
        ),
    ],
)
def test_quota_does_not_grow(figures: dict[str, Any], reason: str, message: str) -> None:
    assert why_not(missing(**figures), "cache-quota-up") == (reason, message)


def test_quota_grows_the_host_tier_when_the_hot_cache_is_at_its_ceiling() -> None:
    found = missing(ceilings={"maxTokens": 4096})
    assert values(found) == {"hostMemoryMb": (256, 384)}


# Vetoes


def test_disabled_and_excluded_rules_are_named() -> None:
    disabled = plan(SMALL, policy_of(disabled_rules=frozenset({"workers-up"})), stages=QUEUED)
    assert why_not(disabled, "workers-up") == ("RuleDisabled", "disabled by the resource")
    pinned = {**CATALOGUE_BOUNDS, "numWorkers": KnobBounds("numWorkers", None, None, tune=False)}
    excluded = plan(SMALL, policy_of(bounds=pinned), stages=QUEUED)
    assert why_not(excluded, "workers-up") == ("NotTunable", "numWorkers is excluded from tuning")


def test_values_that_failed_are_barred_for_their_time() -> None:
    breach = look(SMALL, stages=QUEUED)
    barred = TuningState(barred=(Barred("numWorkers", 8, NOW + 1),))
    expired = TuningState(barred=(Barred("numWorkers", 8, NOW - 1),))
    assert why_not(consider(breach, barred), "workers-up") == (
        "ValueBarred",
        "numWorkers 8 failed a short while ago",
    )
    assert consider(breach, expired).proposal is not None


def test_the_flap_budget_stops_a_knob_for_six_hours() -> None:
    breach = look(SMALL, stages=QUEUED)
    recent = TuningState(reversals=(Reversal("numWorkers", NOW - 60), Reversal("numWorkers", NOW - 21_000)))
    old = replace(recent, reversals=(Reversal("numWorkers", NOW - 60), Reversal("numWorkers", NOW - 22_000)))
    assert why_not(consider(breach, recent), "workers-up") == (
        "FlapBudgetSpent",
        "numWorkers was taken back 2 times in 6 hours",
    )
    assert consider(breach, old).proposal is not None


def test_a_small_gain_is_not_worth_an_experiment() -> None:
    found = plan({"prefetchSize": 48}, stages={"tier_load": 0.15, "decode": 0.85}, prefetched=(3.0, 0.0))
    assert why_not(found, "prefetch-up") == ("SmallGain", "prefetchSize 48 -> 64 promises 4%")


def test_room_of_an_unknown_knob_is_none() -> None:
    assert room(look({}, policy_of(bounds={})), "numWorkers").tunable is False
