"""The list of remedies, and the walk through it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from tests.operator.tuning.plans import QUEUED, SMALL, plan, why_not
from tests.operator.tuning.policies import CATALOGUE_BOUNDS, policy_of

from kvpilot_engine.contract import CATALOGUE
from kvpilot_engine.contract.knobs import Price
from kvpilot_operator.tuning.policy import KnobBounds
from kvpilot_operator.tuning.rules.order import REMEDIES
from kvpilot_operator.tuning.rules.signals import down, up


def test_rules_stand_in_order_of_price_and_say_why() -> None:
    assert [rule.name for rule in REMEDIES] == [
        "memory-emergency",
        "memory-relief",
        "workers-up",
        "workers-down",
        "batch-up",
        "step-tokens-up",
        "prefetch-up",
        "prefetch-down",
        "strategy-adaptive",
        "compression-down",
        "compression-up",
        "cache-quota-up",
        "replicas-up",
        "replicas-down",
    ]
    assert all(remedy.why for remedy in REMEDIES)
    assert [item.urgent for item in REMEDIES] == [True] * 2 + [False] * 12
    prices = [item.price for item in REMEDIES if not item.urgent and item.replicas >= 0]
    assert prices == sorted(prices)
    assert REMEDIES[-1].price == Price(gpus=-1)


def test_in_a_price_gpus_count_first_then_a_restart_then_cold_time_then_memory() -> None:
    ascending = [
        Price(gpus=-1, restart=True, cold_seconds=90, cache_bytes=9e9),
        Price(),
        Price(cache_bytes=9e9),
        Price(cold_seconds=1),
        Price(cold_seconds=1, cache_bytes=1),
        Price(restart=True),
        Price(gpus=1),
    ]
    assert all(one < other for one, other in pairwise(ascending))
    assert [price.words for price in (Price(), Price(2, True, 90, 128 << 20), Price(gpus=-1))] == [
        "nothing but work",
        "2 GPUs, a restart, 128 MiB of cache and 90 s of warming up",
        "1 GPU less",
    ]


def test_every_knob_is_moved_by_a_rule_and_no_rule_moves_anything_else() -> None:
    moved = {knob for remedy in REMEDIES for knob in remedy.knobs}
    assert moved == {knob.resource_name for knob in CATALOGUE}


def test_every_knob_grows_and_shrinks_but_where_a_decision_says_why() -> None:
    moved = {move for remedy in REMEDIES for move in remedy.moves}
    missing = [move for knob in CATALOGUE for move in (*up(knob.resource_name), *down(knob.resource_name))]
    one_way = [(move.knob, move.way) for move in missing if move not in moved]
    assert one_way == [("maxStepTokens", "down"), ("cacheStrategy", "down"), ("useCompression", "down")]
    decision = Path("docs/decisions/2026-11-28-what-does-not-shrink.md").read_text()
    assert [f"**{knob}**" in decision for knob, _ in one_way] == [True] * len(one_way)


def test_disabled_and_excluded_rules_are_named() -> None:
    disabled = plan(SMALL, policy_of(disabled_rules=frozenset({"workers-up"})), stages=QUEUED)
    assert why_not(disabled, "workers-up") == ("RuleDisabled", "disabled by the resource")
    pinned = {**CATALOGUE_BOUNDS, "numWorkers": KnobBounds("numWorkers", None, None, tune=False)}
    excluded = plan(SMALL, policy_of(bounds=pinned), stages=QUEUED)
    assert why_not(excluded, "workers-up") == ("NotTunable", "numWorkers is excluded from tuning")
