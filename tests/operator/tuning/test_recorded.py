"""Rules on observations of real engines (see ``record``): what they propose there, and in which words."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from tests.operator.tuning.policies import policy_of
from tests.operator.tuning.record import recorded

from kvpilot_operator.tuning.decide import assess, decide
from kvpilot_operator.tuning.policy import Objectives
from kvpilot_operator.tuning.rules.order import consider
from kvpilot_operator.tuning.state import KnobChange, TuningState

LENIENT = Objectives(
    signal="request",
    latency={"p50": (30.0, 0.5), "p95": (30.0, 0.95), "p99": (30.0, 0.99)},
    throughput=0,
    floor=0,
    hit_rate=0.0,
    memory=0.9,
    errors=0.05,
)
QUICK = replace(LENIENT, latency={**LENIENT.latency, "p50": (0.05, 0.5)})


@dataclass(frozen=True)
class Case:
    """A recording, the objectives that it is judged by, and what must follow."""

    name: str
    objectives: Objectives
    diagnosis: tuple[str, str, str]
    rule: str
    values: tuple[KnobChange, ...]
    clause: str


CASES = [
    Case(
        "loads_one_by_one",
        QUICK,
        ("p50", "tier_load", "TierLoadSlow"),
        "prefetch-up",
        (KnobChange("enablePrefetch", False, True), KnobChange("prefetchSize", 4, 8)),
        "of request time and none were fetched ahead",
    ),
    Case(
        "loads_that_decode",
        QUICK,
        ("p50", "tier_load", "TierLoadSlow"),
        "compression-down",
        (KnobChange("compressionRatio", 0.32, 0.52), KnobChange("hostMemoryMb", 256, 416)),
        "of it decoding, and memory was at",
    ),
    Case(
        "few_hits",
        replace(LENIENT, hit_rate=0.9),
        ("hitRate", "", "HitRateLow"),
        "cache-quota-up",
        (KnobChange("maxTokens", 6144, 9216),),
        "of prompt tokens came from the cache, an infinite one would give 98%",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_rule_finds_what_was_at_fault(case: Case) -> None:
    observation = recorded(case.name)
    # As it was recorded: windows of 4 and 24 s.
    policy = policy_of(objectives=case.objectives, scaling=None, single_replica="BeforeAfter")
    policy = replace(policy, pace=policy.pace.scaled(0.4))
    context = assess(observation, policy, observation.at)
    assert context.trust.too_few is None
    assert (context.diagnosis.objective, context.diagnosis.stage, context.diagnosis.reason) == case.diagnosis
    proposal = consider(context, TuningState()).canary
    assert proposal is not None
    assert (proposal.rule, proposal.values) == (case.rule, case.values)
    assert case.clause in proposal.message
    decision = decide(observation, TuningState(last_generation=1), policy, observation.at)
    assert [(record.outcome, record.rule) for record in decision.records] == [("Started", case.rule)]


def test_without_a_breach_the_same_observations_lead_to_nothing() -> None:
    for case in CASES:
        observation = recorded(case.name)
        policy = replace(policy_of(objectives=LENIENT), pace=policy_of().pace.scaled(0.4))
        assert consider(assess(observation, policy, observation.at), TuningState()).canary is None
