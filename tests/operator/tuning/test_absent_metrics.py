"""What a runtime does not export silences the rules that read it, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.operator.tuning.observations import BAD, NOW, context_of, observe, three
from tests.operator.tuning.plans import QUEUED, SMALL, why_not
from tests.operator.tuning.policies import PRODUCTION, policy_of

from kvpilot_operator.tuning.context import Plan
from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.experiment.evidence import MISSES, WASTE, measures
from kvpilot_operator.tuning.experiment.step_rate import difference, of_equal_prompts, step_rate
from kvpilot_operator.tuning.observation import OPTIONAL_COUNTS, Observation, ObservedReplica
from kvpilot_operator.tuning.rules.order import REMEDIES, consider
from kvpilot_operator.tuning.state import Phase, TuningState

READ = {"first_token_within", *(count for remedy in REMEDIES for count in remedy.reads)}
EVERY_METRIC = sorted(set(OPTIONAL_COUNTS.values()))


def without(metric: str, replica: ObservedReplica) -> ObservedReplica:
    """The replica of a runtime that does not export the metric."""
    assert replica.sample is not None
    gone = {count for count, name in OPTIONAL_COUNTS.items() if name == metric}
    windows = {
        name: replace(counts, **dict.fromkeys(gone)) for name, counts in replica.sample.windows.items()
    }
    return replace(replica, sample=replace(replica.sample, windows=windows))


def observed(metric: str = "", *, one: bool = False, **figures: object) -> Observation:
    """Three replicas that queue; none (or just not the first) exports the metric."""
    replicas = three(attained=BAD, stages=QUEUED, **figures)
    changed = 1 if one else len(replicas)
    return observe(*(without(metric, r) for r in replicas[:changed]), *replicas[changed:], config=SMALL)


def found(plan: Plan) -> dict[str, tuple[str, str]]:
    return {item.rule: (item.reason, item.message) for item in plan.rejected}


@pytest.mark.parametrize("one", [False, True], ids=["all", "one of three"])
@pytest.mark.parametrize("metric", EVERY_METRIC)
def test_what_is_absent_silences_the_rules_that_read_it_alone(metric: str, one: bool) -> None:
    policy = policy_of(objectives=replace(PRODUCTION, hit_rate=0.9), disabled_rules=frozenset({"workers-up"}))
    seen, whole = context_of(observed(metric, one=one), policy), context_of(observed(), policy)
    assert seen.trust == replace(whole.trust, trusted=seen.trust.trusted, counted=seen.trust.counted), (
        "as trusted as with it"
    )
    assert len(seen.trust.trusted) == len(seen.trust.counted) == 3
    silent = {item.name for item in REMEDIES if metric in {OPTIONAL_COUNTS[count] for count in item.reads}}
    with_it, without_it = found(consider(whole, TuningState())), found(consider(seen, TuningState()))
    for remedy in REMEDIES:
        if remedy.name in silent:
            assert without_it[remedy.name] == ("MetricAbsent", f"not every engine exports {metric}")
        elif "misses" not in remedy.cures:
            assert without_it.get(remedy.name) == with_it.get(remedy.name), remedy.name


@pytest.mark.parametrize("metric", EVERY_METRIC)
def test_capacity_and_latency_are_judged_and_cured_without_it(metric: str) -> None:
    known = TuningState(last_generation=1)
    decision = decide(observed(metric), known, policy_of(), NOW)
    assert decision.state.phase is Phase.CANARY
    assert decision.state.change is not None
    assert decision.state.change.rule == "workers-up"
    states = {item.name: item.state for item in decision.objectives}
    assert (states["p95"], states["throughput"]) == ("Breached", "Met")
    assert {OPTIONAL_COUNTS[item] for item in decision.absent} == {metric}


def test_a_latency_to_the_first_token_that_nobody_exports_is_unknown() -> None:
    policy = policy_of(objectives=replace(PRODUCTION, signal="firstToken"))
    for metric, state in (("", "Breached"), ("kvpilot_first_token_seconds", "Unknown")):
        judged = context_of(observed(metric), policy).objectives
        assert {item.state for item in judged if item.kind.latency} == {state}


@pytest.mark.parametrize(
    ("metric", "state"),
    [
        ("kvpilot_prefix_hit_tokens_total", "Unknown"),
        ("kvpilot_prefix_query_tokens_total", "Unknown"),
        ("kvpilot_prefix_ceiling_tokens_total", "Breached"),
    ],
)
def test_a_hit_rate_is_judged_by_what_is_known_of_it(metric: str, state: str) -> None:
    policy = policy_of(objectives=replace(PRODUCTION, hit_rate=0.9))
    judged = {item.name: item.state for item in context_of(observed(metric), policy).objectives}
    assert judged["hitRate"] == state


def test_a_rule_with_a_breach_to_cure_names_what_it_lacks() -> None:
    policy = policy_of(objectives=replace(PRODUCTION, hit_rate=0.9))
    metric = "kvpilot_evicted_pages_total"
    calm = observe(*(without(metric, item) for item in three(evicted=1.0)), config=SMALL)
    plan = consider(context_of(calm, policy), TuningState())
    assert why_not(plan, "cache-quota-up") == ("MetricAbsent", f"not every engine exports {metric}")
    held = decide(calm, TuningState(last_generation=1), policy, NOW).state.holds
    assert f"cache-quota-up: MetricAbsent, not every engine exports {metric}" in held[0].message


def test_an_arm_reports_no_measure_that_it_does_not_export() -> None:
    counts = observed().counts("long")
    for metric, measure in (
        ("kvpilot_prefix_hit_tokens_total", MISSES),
        ("kvpilot_prefetch_blocks_total", WASTE),
        ("kvpilot_first_token_seconds", "p95"),
    ):
        wanted = replace(PRODUCTION, signal="firstToken")
        reported = {item.name for item in measures(counts, wanted)}
        left = {item.name for item in measures(observed(metric).counts("long"), wanted)}
        assert measure in reported - left
        assert {"errors", "faults", "seconds", "work"} <= left


def test_arms_are_not_made_equal_by_prompts_that_one_does_not_count() -> None:
    figures = {"rows": 4, "row_rate": 100.0, "busy": 0.8}
    whole = observed(**figures).counts("long")
    unknown = observed("kvpilot_prefix_hit_tokens_total", **figures).counts("long")
    curve = {1: 0.001, 8: 0.002}
    one, other = step_rate(whole, (), curve), step_rate(unknown, (), curve)
    assert one.computed and other.computed is None
    assert of_equal_prompts(one, other) == difference(one, other)


def test_every_rule_reads_counts_that_may_be_absent() -> None:
    assert set(OPTIONAL_COUNTS) >= READ
