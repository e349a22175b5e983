"""The list of remedies, and the walk through it."""

from __future__ import annotations

from tests.operator.tuning.plans import QUEUED, SMALL, plan, why_not
from tests.operator.tuning.policies import CATALOGUE_BOUNDS, policy_of

from kvpilot_engine.contract import CATALOGUE
from kvpilot_operator.tuning.policy import KnobBounds
from kvpilot_operator.tuning.rules.order import REMEDIES


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
    urgent = [remedy.urgent for remedy in REMEDIES]
    assert urgent == sorted(urgent, reverse=True)
    prices = [remedy.price for remedy in REMEDIES if not remedy.urgent]
    assert prices == sorted(prices)


def test_every_knob_is_moved_by_a_rule_and_no_rule_moves_anything_else() -> None:
    moved = {knob for remedy in REMEDIES for knob in remedy.knobs}
    assert moved == {knob.resource_name for knob in CATALOGUE}


def test_disabled_and_excluded_rules_are_named() -> None:
    disabled = plan(SMALL, policy_of(disabled_rules=frozenset({"workers-up"})), stages=QUEUED)
    assert why_not(disabled, "workers-up") == ("RuleDisabled", "disabled by the resource")
    pinned = {**CATALOGUE_BOUNDS, "numWorkers": KnobBounds("numWorkers", None, None, tune=False)}
    excluded = plan(SMALL, policy_of(bounds=pinned), stages=QUEUED)
    assert why_not(excluded, "workers-up") == ("NotTunable", "numWorkers is excluded from tuning")
