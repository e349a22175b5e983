"""Replicas that differ by themselves are named, and no knob of all replicas is to cure them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.operator.tuning.observations import BAD, GOOD, NOW, gauges, many, observe, replica
from tests.operator.tuning.policies import policy_of

from kvpilot_operator.tuning.assess.outliers import COLD, FULLER, outliers
from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.observation import ObservedReplica
from kvpilot_operator.tuning.state import TuningState

SLOWER = "its steps are slower than those of the other replicas"
FAILS = "it fails more requests than the other replicas"
QUEUED = {"admission_wait": 0.7, "decode": 0.3}
SMALL = {"numWorkers": 2, "batchSize": 2}


def fleet(*odd: dict[str, Any], alike: int, **figures: Any) -> list[ObservedReplica]:
    """Replicas alike, and odd ones after them."""
    common = {"row_rate": 100.0, "rows": 8, **figures}
    pods = [replica(f"chat-{index}", **common) for index in range(alike)]
    return pods + [replica(f"odd-{index}", **{**common, **item}) for index, item in enumerate(odd)]


def named(pods: list[ObservedReplica]) -> list[tuple[str, str]]:
    return [(item.name, item.clause) for item in outliers(pods, pods, 0.8)]


@pytest.mark.parametrize(
    ("rate", "found"), [(50.0, True), (71.0, True), (72.0, False), (100.0, False), (300.0, False)]
)
def test_slow_replica_of_three_is_named(rate: float, found: bool) -> None:
    assert named(fleet({"row_rate": rate}, alike=2)) == ([("odd-0", SLOWER)] if found else [])


def test_replica_that_fails_more_is_named() -> None:
    assert named(fleet({"errors": 0.15}, alike=2)) == [("odd-0", FAILS)]
    assert named(fleet({"errors": 0.05}, alike=2)) == []
    assert named(fleet({"errors": 0.15}, alike=2, errors=0.1)) == [], "the others fail as well"
    shedding = {"errors": 0.15, "shed": 1.0}
    assert named(fleet(shedding, alike=2)) == [("odd-0", FAILS)], "of the requests that it answers"
    assert named(fleet({"too_large": 0.3}, alike=2)) == [], "a client sends it what no replica may hold"


@pytest.mark.parametrize(
    ("others", "ratio", "found"),
    [(0.5, 0.97, True), (0.66, 0.81, True), (0.7, 0.84, False), (0.5, 0.79, False), (0.81, 0.97, False)],
)
def test_replica_that_is_far_fuller_is_named(others: float, ratio: float, found: bool) -> None:
    """Only over the objective of 80%, which the others meet by far."""
    full = {"gauges": gauges(memory_ratio=ratio)}
    expected = [("odd-0", FULLER)] if found else []
    assert named(fleet(full, alike=2, gauges=gauges(memory_ratio=others))) == expected


@pytest.mark.parametrize(
    ("others", "rate", "found"), [(0.8, 0.1, True), (0.8, 0.41, False), (0.3, 0.01, False), (0.8, 1.0, False)]
)
def test_replica_with_a_cold_cache_is_named(others: float, rate: float, found: bool) -> None:
    expected = [("odd-0", COLD)] if found else []
    assert named(fleet({"hit": rate}, alike=2, hit=others)) == expected
    assert named(fleet({"hit": rate, "rate": 0.2}, alike=2, hit=others)) == [], "of too few requests"


def test_of_two_replicas_neither_is_the_fuller_one() -> None:
    assert named(fleet({"gauges": gauges(memory_ratio=0.97)}, alike=1)) == []


def test_memory_of_one_replica_changes_no_knob_of_all() -> None:
    pods = fleet({"gauges": gauges(memory_ratio=0.97)}, alike=19)
    decision = decide(
        observe(*pods, config=SMALL), TuningState(last_generation=1), policy_of(scaling=None), NOW
    )
    assert (decision.outliers, decision.records, decision.actions) == ((f"odd-0: {FULLER}",), (), ())
    assert decision.state.blocked_values == ()
    assert [(hold.reason, hold.message) for hold in decision.state.holds] == [
        ("ReplicaOutlier", f"no knob of all replicas cures one of them (odd-0: {FULLER})"),
    ]
    full = fleet(alike=20, gauges=gauges(memory_ratio=0.97))
    decision = decide(
        observe(*full, config=SMALL), TuningState(last_generation=1), policy_of(scaling=None), NOW
    )
    assert [record.outcome for record in decision.records] == ["Emergency"], "all of them leak"


def test_memory_of_one_replica_is_seen_beside_a_candidate() -> None:
    """Of three replicas one is tried on: the other two alone have no majority."""
    full = replica("odd-0", gauges=gauges(memory_ratio=0.97))
    tried = replica("chat-0", generation=2)
    decision = decide(
        observe(tried, replica("chat-1"), full), TuningState(last_generation=1), policy_of(), NOW
    )
    assert decision.outliers == (f"odd-0: {FULLER}",)


def test_a_control_is_not_fuller_by_itself_than_the_replicas_that_were_relieved() -> None:
    relieved = [replica(f"chat-{n}", gauges=gauges(memory_ratio=0.7)) for n in range(2)]
    control = replica("chat-2", gauges=gauges(memory_ratio=0.9))
    assert outliers([control], [*relieved, control], 0.8) == ()


def test_a_replica_with_a_cold_cache_is_not_replaced_by_a_colder_one() -> None:
    policy = policy_of(recycle_outliers=True)

    def recycled(odd: dict[str, Any]) -> list[str]:
        seen = observe(*fleet(odd, alike=3), config=SMALL)
        records = decide(seen, TuningState(last_generation=1), policy, NOW).records
        return [record.outcome for record in records]

    assert recycled({"hit": 0.1}) == []
    assert recycled({"gauges": gauges(memory_ratio=0.97)}) == ["Recycled"]


def test_few_replicas_have_no_majority() -> None:
    assert named(fleet({"row_rate": 50.0}, alike=1)) == []
    assert named(fleet({"row_rate": 50.0}, {"errors": 0.3}, alike=2)) == [], "two of four are no minority"
    assert len(named(fleet({"row_rate": 50.0}, {"errors": 0.3}, alike=3))) == 2


def test_rates_are_compared_at_the_same_number_of_rows() -> None:
    """A replica with few rows advances fewer per second, and is none the slower for it."""
    assert named(fleet({"row_rate": 50.0, "rows": 2}, alike=4)) == []


def test_a_short_time_in_steps_says_nothing() -> None:
    assert named(fleet({"row_rate": 50.0, "busy": 0.01}, alike=4)) == []


def test_few_requests_say_nothing_about_errors() -> None:
    assert named(fleet({"errors": 0.5, "rate": 0.2}, alike=4)) == []


def test_no_knob_of_all_replicas_cures_one_of_them() -> None:
    pods = fleet({"row_rate": 20.0, "attained": BAD, "stages": QUEUED}, alike=2, attained=GOOD)
    decision = decide(observe(*pods, config=SMALL), TuningState(last_generation=1), policy_of(), NOW)
    assert decision.outliers == (f"odd-0: {SLOWER}",)
    assert (decision.records, decision.actions) == ((), ())
    breached = [item.name for item in decision.objectives if item.state == "Breached"]
    holds = [(hold.reason, hold.message) for hold in decision.state.holds]
    assert breached == ["p95", "p99"], "a third of the requests is late"
    assert holds == [
        ("ReplicaOutlier", f"no knob of all replicas cures one of them (odd-0: {SLOWER})"),
    ]


def test_an_outlier_is_in_neither_arm() -> None:
    pods = fleet({"row_rate": 20.0}, alike=3, attained=BAD, stages=QUEUED)
    decision = decide(
        observe(*pods, config=SMALL), TuningState(last_generation=1), policy_of(scaling=None), NOW
    )
    change = decision.state.change
    assert change is not None
    assert {change.canary_uid, *change.control_uids} == {f"uid-chat-{index}" for index in range(3)}


def test_a_replica_that_runs_a_candidate_differs_because_of_it() -> None:
    pods = list(many(3, row_rate=100.0, rows=8))
    assert pods[0].engine is not None
    tried = replica("chat-0", row_rate=20.0, rows=8)
    tried = replace(tried, engine=replace(pods[0].engine, generation=2))
    decision = decide(observe(tried, *pods[1:]), TuningState(last_generation=1), policy_of(), NOW)
    assert decision.outliers == ()
