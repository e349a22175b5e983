"""Each rule cures the breach that it is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from tests.operator.backtest.simulations import (
    WIDE,
    assert_settled,
    simulate,
)

from kvpilot_operator.backtest.model import EngineModel
from kvpilot_operator.tuning.configuration import value
from kvpilot_operator.tuning.state import Phase

CURES: list[tuple[str, Mapping[str, Any], EngineModel, str, Mapping[str, Any], str]] = [
    (
        "memory",
        WIDE,
        EngineModel(memory=lambda c: 0.5 + 0.4 * min(1.0, (value(c, "maxMemoryMb") or 200) / 200)),
        "memory-relief",
        {"maxMemoryMb": 100},
        "memory fell from 90% to 70%",
    ),
    (
        "hit rate",
        WIDE,
        EngineModel(hits=lambda c: min(0.8, value(c, "maxTokens") / 8192)),
        "cache-quota-up",
        {"maxTokens": 6144},
        "the hit rate rose from 50% to 75%",
    ),
    (
        "tier load, prefetch",
        WIDE,
        EngineModel(tier_s=lambda c: 4.0 / (4 + value(c, "prefetchSize")), prefetched=lambda c: (2.0, 0.1)),
        "prefetch-up",
        {"prefetchSize": 8},
        "mean time fell from 0.5",
    ),
    (
        "wasted prefetch",
        WIDE,
        EngineModel(prefetched=lambda c: (0.3, float(value(c, "prefetchSize")))),
        "prefetch-down",
        {"prefetchSize": 2},
        "wasted blocks per request fell from 4.00 to 2.00",
    ),
    (
        "tier load, codec",
        {**WIDE, "prefetchSize": 64},
        EngineModel(
            tier_s=lambda c: {0.3: 1.2, 0.52: 0.4, 1.0: 0.01}[value(c, "compressionRatio")], decoding=0.9
        ),
        "compression-down",
        {"compressionRatio": 0.52, "hostMemoryMb": 416},
        "rose from 0% to 100%",
    ),
]


@pytest.mark.parametrize(
    ("base", "model", "rule", "after", "reported"), [c[1:] for c in CURES], ids=[c[0] for c in CURES]
)
def test_each_rule_cures_its_breach(
    base: Mapping[str, Any], model: EngineModel, rule: str, after: Mapping[str, Any], reported: str
) -> None:
    objectives = {"hitRate": "70%"} if rule == "cache-quota-up" else {}
    sim = simulate(base, objectives=objectives, load=lambda _: 30.0, model=model)
    sim.run(150, until=lambda s: s.state.phase is Phase.COOLDOWN)
    assert [(r.rule, r.outcome) for r in sim.records] == [(rule, "Started"), (rule, "Promoted")], sim.report()
    assert reported in sim.records[-1].summary
    assert sim.promoted.config == {**base, **after}
    assert_settled(sim)


def test_a_cache_that_is_a_small_part_of_memory_frees_what_it_can() -> None:
    model = EngineModel(memory=lambda c: 0.74 + 0.12 * min(1.0, (value(c, "maxMemoryMb") or 200) / 200))
    sim = simulate(WIDE, load=lambda _: 30.0, model=model).run(400)
    made = [(record.rule, record.outcome) for record in sim.records]
    assert made == [("memory-relief", "Started"), ("memory-relief", "Promoted")], sim.report()
    assert "memory fell from 86% to 80%" in sim.records[-1].summary
    assert_settled(sim)


LEAST_FOUR = [{"name": "prefetchSize", "min": 4}]


def test_prefetching_that_is_wasted_is_switched_off_once_and_stays_off() -> None:
    model = EngineModel(prefetched=lambda c: (0.3, 4.0) if value(c, "enablePrefetch") else (0.0, 0.0))
    sim = simulate({**WIDE, "prefetchSize": 4}, load=lambda _: 30.0, model=model, knobs=LEAST_FOUR).run(1800)
    made = [(record.rule, record.outcome) for record in sim.records]
    assert made == [("prefetch-down", "Started"), ("prefetch-down", "Promoted")], sim.report()
    assert sim.promoted.config == {**WIDE, "prefetchSize": 4, "enablePrefetch": False}
    assert "wasted blocks per request fell from 4.00 to 0.00" in sim.records[-1].summary
    assert_settled(sim)


def test_prefetching_that_is_wasted_and_still_shortens_loads_stays_on() -> None:
    model = EngineModel(
        prefetched=lambda c: (0.3, 4.0) if value(c, "enablePrefetch") else (0.0, 0.0),
        tier_s=lambda c: 0.02 if value(c, "enablePrefetch") else 0.6,
    )
    sim = simulate({**WIDE, "prefetchSize": 4}, load=lambda _: 30.0, model=model, knobs=LEAST_FOUR).run(1800)
    made = [(record.rule, record.outcome) for record in sim.records]
    assert made == [("prefetch-down", "Started"), ("prefetch-down", "Reverted")], sim.report()
    assert sim.promoted.config == {**WIDE, "prefetchSize": 4}


def test_hits_that_load_more_slowly_than_they_would_be_computed_are_reverted() -> None:
    """A higher compression level holds more blocks, and takes longer to decode them."""
    model = EngineModel(
        hits=lambda c: {1.0: 0.5, 0.52: 0.7, 0.3: 0.75}[value(c, "compressionRatio")],
        tier_s=lambda c: {1.0: 0.05, 0.52: 0.2, 0.3: 0.4}[value(c, "compressionRatio")],
    )
    base = {**WIDE, "compressionRatio": 1.0, "hostMemoryMb": 256, "useCompression": True}
    objectives = {"hitRate": "70%", "latency": {"p50Ms": 1000, "p95Ms": 2000, "p99Ms": 3000}}
    others = ["strategy-adaptive", "cache-quota-up"]
    sim = simulate(base, objectives=objectives, load=lambda _: 30.0, model=model, disabledRules=others)
    sim.run(200, until=lambda s: "Reverted" in s.outcomes() or "Promoted" in s.outcomes())
    ends = [(r.rule, r.outcome, r.evidence.get("verdict")) for r in sim.records if r.outcome != "Started"]
    assert ends == [("compression-up", "Reverted", "Harmful")], sim.report()
    assert "the hit rate rose from 50% to 70%, but requests are longer in work" in sim.records[-1].summary


def test_memory_emergency_halves_the_batch_on_all_replicas_at_once() -> None:
    model = EngineModel(memory=lambda c: 0.6 + 0.4 * value(c, "batchSize") / 16)
    sim = simulate(WIDE, load=lambda _: 30.0, model=model).run(120)
    assert [(r.rule, r.outcome, r.summary) for r in sim.records] == [
        (
            "memory-emergency",
            "Emergency",
            "Memory was at 100% of its limit; batchSize 16 -> 8 on all replicas at once, generation 2.",
        ),
        (
            "memory-emergency",
            "Measured",
            "batchSize 16 -> 8: memory was at 80% after 18 s; 79% (60% to 98%) was predicted.",
        ),
    ]
    assert sim.promoted.config == {"numWorkers": 16, "batchSize": 8}
    assert_settled(sim)


def test_an_engine_that_takes_nothing_keeps_the_emergency_from_no_other() -> None:
    model = EngineModel(memory=lambda c: 0.6 + 0.4 * value(c, "batchSize") / 16)
    sim = simulate(WIDE, load=lambda _: 30.0, model=model)
    sim.run(2)
    first, *others = sim.cluster.engines
    first.refuses = True
    sim.run(300)
    assert [(r.rule, r.outcome) for r in sim.records] == [
        ("memory-emergency", "Emergency"),
        ("memory-emergency", "Measured"),
    ], sim.report()
    assert [value(engine.config, "batchSize") for engine in others] == [8, 8], "the relief stands"
    assert (sim.state.change, sim.promoted.config["batchSize"]) == (None, 8)
    active = sim.cluster.snapshot().status.condition("TuningActive")
    assert active is not None
    assert (active.reason, active.message) == (
        "ReplicaBehind",
        f"{first.name}: runs an older generation; the promoted one is pushed at every reconcile",
    )
    first.refuses = False
    sim.run(10)
    assert_settled(sim)
    assert "ReplicaBehind" not in {hold.reason for hold in sim.state.holds}


def test_memory_rule_follows_when_the_emergency_did_not_help() -> None:
    sim = simulate(WIDE, load=lambda _: 30.0, model=EngineModel(memory=lambda c: 0.97)).run(250)
    assert [(r.rule, r.outcome) for r in sim.records] == [
        ("memory-emergency", "Emergency"),
        ("memory-emergency", "Measured"),
        ("memory-emergency", "Reverted"),
        ("memory-relief", "Started"),
        ("memory-relief", "Reverted"),
    ], sim.report()
    assert_settled(sim)
