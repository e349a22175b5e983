"""Objectives: attainment at edges, both windows, few requests, demand, ceilings."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.operator.tuning.observations import BAD, GOOD, counts, gauges, observe, replica
from tests.operator.tuning.policies import PRODUCTION

from kvpilot_operator.tuning.assess.objectives import backlog_gone, judge, late, latency_met, met_again
from kvpilot_operator.tuning.decision import Objective
from kvpilot_operator.tuning.observation import Observation, ObservedReplica


def judged(observation: Observation, *, trusted: bool = True) -> dict[str, Objective]:
    return {item.name: item for item in judge(observation, PRODUCTION, trusted)}


def with_short(item: ObservedReplica, **figures: object) -> ObservedReplica:
    assert item.sample is not None
    windows = {**item.sample.windows, "short": counts(10.0, **figures)}
    return replace(item, sample=replace(item.sample, windows=windows))


def test_latency_is_judged_by_attainment_at_the_edge() -> None:
    objective = judged(observe(replica(attained=BAD)))["p95"]
    assert objective.state == "Breached"
    assert objective.measured_short == pytest.approx(0.41)
    assert objective.target == 0.95


def test_shed_requests_count_against_latency_and_errors() -> None:
    # 20% shed: at most 1 / 1.2 of the judged requests can be within any edge.
    shedding = judged(observe(replica(shed=0.2, attained={"p50": 0.8, "p95": 0.83, "p99": 0.83})))
    assert shedding["errors"].measured_short == pytest.approx(1 / 6)
    assert (shedding["errors"].state, shedding["p95"].state, shedding["p50"].state) == (
        "Breached",
        "Breached",
        "Met",
    )


def test_a_breach_needs_both_windows() -> None:
    calm_now = with_short(replica(attained=BAD), attained=GOOD)
    bad_now = with_short(replica(attained=GOOD), attained=BAD)
    assert judged(observe(calm_now))["p95"].state == "Met"
    assert judged(observe(bad_now))["p95"].state == "Met"


@pytest.mark.parametrize(("waiting", "state"), [(0.0, "Met"), (10.0, "Met"), (200.0, "Breached")])
def test_requests_that_wait_too_long_count_before_they_end(waiting: float, state: str) -> None:
    # 20 requests/s end, all in time: 10 of those that wait can be within 0.5 s, and no more.
    objective = judged(observe(replica(attained=GOOD, gauges=gauges(waiting=waiting))))["p95"]
    assert objective.state == state
    late = max(0.0, waiting - 10)
    assert objective.measured_short == pytest.approx(0.99 * 200 / (200 + late))
    assert objective.measured_long == pytest.approx(0.99 * 1200 / (1200 + late))


def test_a_burst_that_waits_is_no_breach_of_the_long_window() -> None:
    assert judged(observe(replica(attained=GOOD, gauges=gauges(waiting=40.0))))["p95"].state == "Met"


def test_a_queue_of_a_replica_without_a_rate_says_nothing() -> None:
    stuck = with_short(replica(attained=GOOD, gauges=gauges(waiting=500.0)), rate=0.0)
    assert late(observe(stuck), 0.5) == 0.0


def test_few_requests_say_nothing() -> None:
    objectives = judged(observe(replica(rate=0.3, attained=BAD)))  # 18 in the long window
    assert {objectives[name].state for name in ("p50", "p95", "errors", "throughput", "hitRate")} == {
        "Unknown"
    }


def test_few_requests_in_the_short_window_widen_it() -> None:
    # 4 now, which is too few; 24 in the long window.
    few = judged(observe(with_short(replica(rate=0.4, attained=BAD), rate=0.4, attained=GOOD)))["p95"]
    assert (few.state, few.measured_short, few.measured_long) == (
        "Breached",
        few.measured_long,
        few.measured_short,
    )
    many = judged(observe(with_short(replica(rate=2.0, attained=BAD), rate=2.0, attained=GOOD)))["p95"]
    assert (many.state, many.measured_short) == ("Met", pytest.approx(0.99))


def test_without_trust_everything_is_unknown() -> None:
    states = {item.state for item in judge(observe(replica(attained=BAD)), PRODUCTION, trusted=False)}
    assert states == {"Unknown"}


@pytest.mark.parametrize(
    ("rate", "done", "state"),
    [
        (20.0, 1.0, "Met"),  # little is offered, all of it is completed
        (90.0, 0.95, "Met"),  # within the margin of what is in flight
        (90.0, 0.7, "Breached"),  # 63 of 90
        (200.0, 0.6, "Met"),  # 120 of 200, and 100 is all that is asked for
        (200.0, 0.4, "Breached"),
        (40.0, 0.5, "Breached"),  # the floor does not excuse what is offered below it
    ],
)
def test_throughput_is_judged_by_what_is_offered(rate: float, done: float, state: str) -> None:
    assert judged(observe(replica(rate=rate, done=done)))["throughput"].state == state


@pytest.mark.parametrize(
    ("rate", "done", "severity"),
    [
        (90.0, 0.5, "critical"),  # 45 completed, 50 is the floor
        (90.0, 0.7, "breach"),  # 63: below what is offered, above the floor
        (45.0, 0.5, "breach"),  # the floor is not offered
        (200.0, 0.9, ""),
    ],
)
def test_throughput_below_the_floor_is_critical(rate: float, done: float, severity: str) -> None:
    assert judged(observe(replica(rate=rate, done=done)))["throughput"].severity == severity


def test_throughput_below_a_floor_that_equals_the_target_is_critical() -> None:
    wanted = replace(PRODUCTION, throughput=100, floor=100)
    found = {o.name: o for o in judge(observe(replica(rate=200.0, done=0.48)), wanted, trusted=True)}
    assert (found["throughput"].state, found["throughput"].severity) == ("Breached", "critical")


def test_breach_of_another_objective_is_not_critical() -> None:
    found = judged(observe(replica(attained=BAD, gauges=gauges(memory_ratio=0.85))))
    assert {found[name].severity for name in ("p50", "p95", "p99", "memory")} == {"breach"}
    assert (found["errors"].severity, found["errors"].state) == ("", "Met")


@pytest.mark.parametrize(
    ("ticks", "index"), [("", None), ("mm", None), ("mmm", 2), ("mm-mmm", 5), ("-mmmm", 3)]
)
def test_met_again_needs_three_ticks_in_a_row(ticks: str, index: int | None) -> None:
    assert met_again(tick == "m" for tick in ticks) == index


def test_latency_is_met_by_the_short_window_of_every_latency_objective() -> None:
    good = judge(observe(with_short(replica(attained=BAD), attained=GOOD)), PRODUCTION, trusted=True)
    bad = judge(observe(with_short(replica(attained=GOOD), attained=BAD)), PRODUCTION, trusted=True)
    assert (latency_met(good), latency_met(bad), latency_met(())) == (True, False, False)


def test_hit_rate_above_its_ceiling_is_infeasible_and_no_breach() -> None:
    low = judged(observe(replica(hit=0.3, ceiling=0.9)))["hitRate"]
    impossible = judged(observe(replica(hit=0.3, ceiling=0.35)))["hitRate"]
    assert (low.state, impossible.state) == ("Breached", "Infeasible")
    assert impossible.measured_short == pytest.approx(0.3)


def test_memory_is_the_worst_engine() -> None:
    objective = judged(observe(replica("a"), replica("b", gauges=gauges(memory_ratio=0.85))))["memory"]
    assert (objective.state, objective.measured_short) == ("Breached", 0.85)


def test_first_token_signal_uses_its_own_histogram() -> None:
    item = replica(attained=BAD)
    assert item.sample is not None
    windows = {
        name: replace(window, first_token_within=counts(10.0 if name == "short" else 60.0).request_within)
        for name, window in item.sample.windows.items()
    }
    quick = replace(item, sample=replace(item.sample, windows=windows))
    first = {o.name: o.state for o in judge(observe(quick), replace(PRODUCTION, signal="firstToken"), True)}
    assert (first["p95"], judged(observe(quick))["p95"].state) == ("Met", "Breached")


@pytest.mark.parametrize(("waiting", "gone"), [(0, True), (8, True), (9, False)])
def test_backlog_is_gone_when_half_the_slots_would_hold_it(waiting: float, gone: bool) -> None:
    assert backlog_gone(waiting, engines=2, workers=8) is gone
