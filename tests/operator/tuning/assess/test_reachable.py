"""Latency that no replica and no knob can reach: the work of one request alone takes longer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.operator.tuning.observations import GOOD, NOW, counts, curve, gauges, many, observe
from tests.operator.tuning.policies import PRODUCTION, policy_of

from kvpilot_operator.tuning.assess.capacity import Capacity
from kvpilot_operator.tuning.assess.reachable import Unreachable, unreachable
from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.decision import Decision
from kvpilot_operator.tuning.observation import Observation
from kvpilot_operator.tuning.policy import Objectives
from kvpilot_operator.tuning.state import TuningState

SLOW = {"p50": 0.0, "p95": 0.2, "p99": 0.97}
"""Half of the requests take longer than 100 ms, all of them nearly 1 s."""


def engine(work_s: float) -> Capacity:
    """An engine that serves a request alone in ``work_s``."""
    return Capacity(1.0, 1.0, 0.0, {1: work_s, 2: work_s})


def found(work_s: float, seconds: float, **figures: Any) -> dict[str, Unreachable]:
    seen = counts(60.0, stages={"decode": seconds}, **figures)
    return {item.name: item for item in unreachable(seen, engine(work_s), PRODUCTION)}


def test_an_objective_that_an_empty_engine_misses_is_out_of_reach() -> None:
    slow = found(0.6, 0.6, attained=SLOW)
    assert set(slow) == {"p50", "p95", "p99"}
    assert (slow["p50"].edge_s, slow["p50"].reachable_s) == (0.1, 1.0)
    assert slow["p99"].reachable_s is None, "97% within 1 s, and nothing is known beyond the last edge"


def test_a_queue_is_no_work() -> None:
    """Requests take 0.8 s, of which 50 ms are work: with enough slots they would be 16 times faster."""
    assert found(0.05, 0.8, attained={"p50": 0.0, "p95": 0.0, "p99": 1.0}) == {}


def test_an_answer_behind_the_first_token_puts_no_limit_out_of_reach() -> None:
    """The first token takes 200 ms, of which 40 are work, and the 19 tokens behind it 0.4 s."""
    wanted = replace(PRODUCTION, signal="firstToken")
    engine = Capacity(20.0, 1.0, 0.001, {1: 0.02, 2: 0.02})
    stages = {"admission_wait": 0.16, "prefill": 0.04, "decode": 0.4}
    seen = counts(60.0, stages=stages, attained={"p50": 0.4, "p95": 0.97, "p99": 1.0})
    assert unreachable(seen, engine, wanted) == ()
    slow = counts(60.0, stages={**stages, "admission_wait": 0.0}, attained=SLOW)
    assert [(item.name, item.reachable_s) for item in unreachable(slow, engine, wanted)] == [
        ("p50", 1.0), ("p95", 1.0), ("p99", None),
    ]  # fmt: skip


def test_what_is_reached_is_within_reach() -> None:
    assert found(0.08, 0.08) == {}


def test_shed_requests_say_nothing_about_work() -> None:
    assert set(found(0.6, 0.6, attained=SLOW, shed=1.0)) == {"p50", "p95"}


@pytest.mark.parametrize("errors", [0.02, 0.06, 0.5])
def test_requests_that_fail_say_nothing_about_work(errors: float) -> None:
    """Failures miss every limit; a faster engine would not help them, and no target needs to be relaxed."""
    well = dict.fromkeys(GOOD, 1 - errors)
    assert found(0.08, 0.08, attained=well, errors=errors) == {}
    assert set(found(0.6, 0.6, attained=SLOW, errors=errors)) >= {"p50", "p95"}


@pytest.mark.parametrize("capacity", [None, engine(0.6)])
def test_nothing_is_said_without_a_measurement(capacity: Capacity | None) -> None:
    seen = counts(60.0, stages={"decode": 0.6}, attained=SLOW, rate=0.0 if capacity else 20.0)
    assert unreachable(seen, capacity, PRODUCTION) == ()


def impossible(
    state: TuningState | None = None,
    *,
    now: float = NOW,
    seen: Observation | None = None,
    **policy: Any,
) -> Decision:
    """Three engines that are idle most of the time, whose requests need 30 steps of 17 ms."""
    own: Objectives = replace(PRODUCTION, hit_rate=0.0, throughput=0, floor=0, latency={"p50": (0.1, 0.5)})
    pods = many(
        3,
        attained={"p50": 0.0, "p95": 0.6, "p99": 1.0},
        stages={"decode": 0.5, "prefill": 0.01},
        rate=2.0,
        busy=0.8,
        rows=1,
        row_rate=75.0,
        gauges=gauges(curve=curve(), running=1.0),
    )
    slow = observe(*pods, config={"numWorkers": 16, "batchSize": 16})
    return decide(
        seen or slow, state or TuningState(last_generation=1), policy_of(objectives=own, **policy), now
    )


def test_what_cannot_be_reached_is_no_breach_and_asks_for_no_replica() -> None:
    decision = impossible()
    states = {item.name: item.state for item in decision.objectives}
    assert states["p50"] == "Infeasible"
    assert decision.infeasible == (
        "p50: 100 ms is asked for, and requests such as these take longer on an engine that serves no other; "
        "about 400 ms could be reached; relax the target"
    )
    assert [(r.rule, r.outcome) for r in decision.records] == [("objectives", "Infeasible")]
    assert decision.actions == ()
    again = impossible()
    assert again.state == decision.state


def test_a_target_that_flaps_is_reported_once_in_ten_cooldowns() -> None:
    """Good for a while, out of reach for a while: as where half of the requests are long."""
    state = impossible().state
    reachable = observe(*many(3, attained=GOOD), config={"numWorkers": 16, "batchSize": 16})

    def at(seconds: float, seen: Observation | None = None) -> Decision:
        return impossible(state, now=NOW + seconds, seen=seen)

    for tick in range(1, 5):
        met = at(60.0 * tick, reachable)
        assert {item.state for item in met.objectives if item.name == "p50"} == {"Met"}
        state = met.state
        again = at(60.0 * tick + 2)
        assert again.infeasible and not again.records
        state = again.state
    state = at(310.0, reachable).state
    assert [record.outcome for record in at(312.0).records] == ["Infeasible"]
