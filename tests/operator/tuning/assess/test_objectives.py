"""Objectives: attainment at edges, both windows, few requests, demand, ceilings."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.tuning.observations import BAD, GOOD, counts, gauges, observe, pod
from tests.tuning.simulation import PRODUCTION

from kvpilot_operator.tuning.decision import Objective
from kvpilot_operator.tuning.objectives import backlog_gone, judge
from kvpilot_operator.tuning.observation import Observation, Pod


def judged(observation: Observation, *, trusted: bool = True) -> dict[str, Objective]:
    return {item.name: item for item in judge(observation, PRODUCTION, trusted)}


def with_short(item: Pod, **figures: object) -> Pod:
    assert item.sample is not None
    windows = {**item.sample.windows, "short": counts(10.0, **figures)}
    return replace(item, sample=replace(item.sample, windows=windows))


def test_latency_is_judged_by_attainment_at_the_edge() -> None:
    objective = judged(observe(pod(attained=BAD)))["p95"]
    assert objective.state == "Breached"
    assert objective.measured_short == pytest.approx(0.41)
    assert objective.target == 0.95


def test_shed_requests_count_against_latency_and_errors() -> None:
    # 20% shed: at most 1 / 1.2 of the judged requests can be within any edge.
    shedding = judged(observe(pod(shed=0.2, attained={"p50": 0.8, "p95": 0.83, "p99": 0.83})))
    assert shedding["errors"].measured_short == pytest.approx(1 / 6)
    assert (shedding["errors"].state, shedding["p95"].state, shedding["p50"].state) == (
        "Breached",
        "Breached",
        "Met",
    )


def test_a_breach_needs_both_windows() -> None:
    calm_now = with_short(pod(attained=BAD), attained=GOOD)
    bad_now = with_short(pod(attained=GOOD), attained=BAD)
    assert judged(observe(calm_now))["p95"].state == "Met"
    assert judged(observe(bad_now))["p95"].state == "Met"


def test_few_requests_say_nothing() -> None:
    objectives = judged(observe(pod(rate=0.3, attained=BAD)))  # 18 in the long window
    assert {objectives[name].state for name in ("p50", "p95", "errors", "throughput", "hitRate")} == {
        "Unknown"
    }


def test_few_requests_in_the_short_window_widen_it() -> None:
    # 4 now, which is too few; 24 in the long window.
    few = judged(observe(with_short(pod(rate=0.4, attained=BAD), rate=0.4, attained=GOOD)))["p95"]
    assert (few.state, few.measured_short, few.measured_long) == (
        "Breached",
        few.measured_long,
        few.measured_short,
    )
    many = judged(observe(with_short(pod(rate=2.0, attained=BAD), rate=2.0, attained=GOOD)))["p95"]
    assert (many.state, many.measured_short) == ("Met", pytest.approx(0.99))


def test_without_trust_everything_is_unknown() -> None:
    states = {item.state for item in judge(observe(pod(attained=BAD)), PRODUCTION, trusted=False)}
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
    assert judged(observe(pod(rate=rate, done=done)))["throughput"].state == state


def test_hit_rate_above_its_ceiling_is_infeasible_and_no_breach() -> None:
    low = judged(observe(pod(hit=0.3, ceiling=0.9)))["hitRate"]
    impossible = judged(observe(pod(hit=0.3, ceiling=0.35)))["hitRate"]
    assert (low.state, impossible.state) == ("Breached", "Infeasible")
    assert impossible.measured_short == pytest.approx(0.3)


def test_memory_is_the_worst_engine() -> None:
    objective = judged(observe(pod("a"), pod("b", gauges=gauges(memory_ratio=0.85))))["memory"]
    assert (objective.state, objective.measured_short) == ("Breached", 0.85)


def test_first_token_signal_uses_its_own_histogram() -> None:
    item = pod(attained=BAD)
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
