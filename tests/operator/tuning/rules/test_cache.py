"""Rules about prefetch, compression, memory and quotas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from tests.operator.tuning.observations import BAD, context_of, gauges, observe, three
from tests.operator.tuning.plans import plan, proposed, values, why_not
from tests.operator.tuning.policies import CATALOGUE_BOUNDS, PRODUCTION, policy_of

from kvpilot_operator.tuning.context import Plan
from kvpilot_operator.tuning.policy import KnobBounds
from kvpilot_operator.tuning.rules.order import consider
from kvpilot_operator.tuning.state import TuningState

LOADING = {"tier_load": 0.6, "prefill": 0.1, "decode": 0.3}


def test_prefetch_goes_further_when_what_it_fetches_is_used() -> None:
    found = plan({"prefetchSize": 4}, stages=LOADING, prefetched=(3.0, 0.5))
    assert (proposed(found).rule, values(found)) == ("prefetch-up", {"prefetchSize": (4, 8)})
    assert (
        proposed(found).message == "tier load was 60% of request time and 86% of prefetched blocks were used"
    )
    assert proposed(found).predicted_gain == pytest.approx(0.5), "of the loading time, which is compared"
    assert proposed(found).measure == "tierLoad"


def test_prefetch_does_not_go_further_when_half_is_wasted() -> None:
    found = plan({"prefetchSize": 4}, stages=LOADING, prefetched=(1.0, 1.0))
    assert why_not(found, "prefetch-up") == ("PrefetchInaccurate", "50% of prefetched blocks were used")


def test_prefetch_is_switched_on_where_it_is_off() -> None:
    found = plan({"enablePrefetch": False, "prefetchSize": 8}, stages=LOADING)
    assert values(found) == {"enablePrefetch": (False, True), "prefetchSize": (8, 16)}


def test_wasted_prefetch_is_halved_without_any_breach() -> None:
    calm = observe(*three(prefetched=(0.2, 3.0)), config={"prefetchSize": 16})
    found = consider(context_of(calm), TuningState())
    assert (proposed(found).rule, values(found)) == ("prefetch-down", {"prefetchSize": (16, 8)})
    assert (proposed(found).objective, proposed(found).message) == (
        "prefetchWaste",
        "94% of prefetched blocks were wasted",
    )


LEAST_FOUR = {**CATALOGUE_BOUNDS, "prefetchSize": KnobBounds("prefetchSize", 4, 64)}


def wasting(size: int, bounds: Mapping[str, KnobBounds] = LEAST_FOUR, **figures: Any) -> Plan:
    seen = observe(*three(prefetched=(0.2, 3.0), **figures), config={"prefetchSize": size})
    return consider(context_of(seen, policy_of(bounds=bounds)), TuningState())


def test_wasted_prefetch_is_switched_off_where_it_may_not_shrink_further() -> None:
    assert values(wasting(8)) == {"prefetchSize": (8, 4)}
    found = wasting(4)
    assert (proposed(found).rule, values(found)) == ("prefetch-down", {"enablePrefetch": (True, False)})
    assert (proposed(found).objective, proposed(found).predicted_gain) == ("prefetchWaste", 1.0)


@pytest.mark.parametrize(
    ("bounds", "figures"),
    [
        ({"enablePrefetch": KnobBounds("enablePrefetch", None, None, tune=False)}, {}),
        ({}, {"attained": BAD, "stages": LOADING}),  # few blocks shorten loads as well
        ({"prefetchSize": KnobBounds("prefetchSize", 0, 64, direction="UpOnly")}, {}),
    ],
)
def test_wasted_prefetch_stays_on(bounds: Mapping[str, KnobBounds], figures: dict[str, Any]) -> None:
    found = wasting(4, {**LEAST_FOUR, **bounds}, **figures)
    assert why_not(found, "prefetch-down") == ("AtBound", "prefetchSize is 4")


def test_compression_level_falls_by_one_when_decoding_is_slow_and_memory_is_free() -> None:
    config = {"compressionRatio": 0.3, "prefetchSize": 64}
    found = plan(config, stages=LOADING, codec=0.4)
    assert proposed(found).rule == "compression-down"
    assert values(found) == {"compressionRatio": (0.3, 0.52), "hostMemoryMb": (256, 416)}
    tight = plan(config, stages=LOADING, codec=0.4, gauges=gauges(memory_ratio=0.7))
    assert why_not(tight, "compression-down") == ("MemoryTight", "memory is at 70%")
    cheap = plan(config, stages=LOADING, codec=0.1)
    assert why_not(cheap, "compression-down") == ("NotAtFault", "decoding is 17% of the time in tier loads")


def test_compression_level_does_not_fall_without_compression() -> None:
    found = plan({"useCompression": False, "prefetchSize": 64}, stages=LOADING, codec=0.4)
    assert why_not(found, "compression-down") == ("AtBound", "blocks are not encoded")


def test_memory_over_its_limit_cuts_the_budget_and_raises_the_compression_level() -> None:
    # 88% of 1000 MiB, 72% is aimed at: 160 of 400 MiB must go; 60% of the bytes hold as many 8-bit blocks.
    fat = gauges(memory_ratio=0.88, cached_bytes=400 * 2**20, budget_bytes=500 * 2**20)
    found = plan({"compressionRatio": 1.0}, gauges=fat)
    assert proposed(found).rule == "memory-relief"
    assert values(found) == {"maxMemoryMb": (None, 240), "compressionRatio": (1.0, 0.52)}
    assert proposed(found).predicted_gain == pytest.approx(0.16 / 0.88, abs=0.01)
    assert proposed(found).message == (
        "host memory was at 88% of its limit, 80% is allowed; the cache held 400 MiB of it"
    )


def test_memory_relief_at_the_highest_compression_level_cuts_the_budget_alone() -> None:
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
        "the cache holds 90 MiB, the minimum is 100 MiB",
    )


CALM_BUT_MISSING = {"hit": 0.5, "ceiling": 0.9, "evicted": 2.0}


def missing(strategy: str = "adaptive", **figures: Any) -> Plan:
    seen = observe(
        *three(**{**CALM_BUT_MISSING, **figures}), config={"maxTokens": 4096, "cacheStrategy": strategy}
    )
    return consider(context_of(seen, policy_of(objectives=PRODUCTION)), TuningState())


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


@pytest.mark.parametrize("fixed", ["lfu", "fifo"])
def test_a_fixed_strategy_makes_way_for_adaptive_when_the_hit_rate_is_low(fixed: str) -> None:
    found = missing(fixed)
    assert proposed(found).rule == "strategy-adaptive"
    assert values(found) == {"cacheStrategy": (fixed, "adaptive")}


def test_a_strategy_that_runs_already_delays_no_other_cure() -> None:
    found = missing("lru")
    assert why_not(found, "strategy-adaptive") == (
        "NotEffective",
        "cacheStrategy adaptive runs as lru so far, which is in force",
    )
    assert proposed(found).rule == "cache-quota-up"
    same = missing("adaptive")
    assert why_not(same, "strategy-adaptive") == ("NotEffective", "cacheStrategy is adaptive")


def test_quota_grows_the_host_tier_when_the_device_pool_is_at_its_ceiling() -> None:
    found = missing(ceilings={"maxTokens": 4096})
    assert values(found) == {"hostMemoryMb": (256, 384)}
