"""What cannot be trusted holds everything: reason and message of each guard."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from tests.tuning.observations import BAD, NOW, gauges, observe, pod, three
from tests.tuning.simulation import policy_of

from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.guards import distrust
from kvpilot_operator.tuning.observation import Observation, Pod
from kvpilot_operator.tuning.pace import PACES
from kvpilot_operator.tuning.state import Phase, TuningState


def sampled(item: Pod, **changes: object) -> Pod:
    assert item.sample is not None
    return replace(item, sample=replace(item.sample, **changes))


CASES: list[tuple[str, Callable[[], Observation], str, str]] = [
    (
        "no config",
        lambda: observe(*three(), promoted=None),
        "NotRolledOut",
        "no configuration was written yet",
    ),
    ("no pods", lambda: observe(replace(pod(), ready=False)), "NoPodsReady", "no engine is ready"),
    (
        "source down",
        lambda: observe(*three(), metrics_problem="prometheus default: timed out"),
        "MetricsUnavailable",
        "prometheus default: timed out",
    ),
    (
        "source scrapes too slowly",
        lambda: observe(*three(), metrics_problem="ScrapeTooSlow: window short of 10 s is below 4 intervals"),
        "ScrapeTooSlow",
        "window short of 10 s is below 4 intervals",
    ),
    (
        "no sample",
        lambda: observe(pod("a"), replace(pod("b"), sample=None)),
        "MetricsMissing",
        "b: ready, and no metrics of it",
    ),
    (
        "no long window",
        lambda: observe(sampled(pod("a"), windows={})),
        "MetricsMissing",
        "a: ready, and no metrics of it",
    ),
    (
        "stale",
        lambda: observe(sampled(pod("a"), age_s=3.1)),
        "MetricsStale",
        "a: metrics are older than 3 scrapes",
    ),
    (
        "age is no number",
        lambda: observe(sampled(pod("a"), age_s=math.nan)),
        "MetricsStale",
        "a: metrics are older than 3 scrapes",
    ),
    (
        "young",
        lambda: observe(pod("b"), sampled(pod("a"), coverage_s=47.0)),
        "MetricsPartial",
        "a: measured for too short a time",
    ),
    (
        "NaN gauge",
        lambda: observe(pod("a", gauges=gauges(memory_ratio=math.nan))),
        "MetricsPartial",
        "a: a metric is not a finite number",
    ),
    (
        "NaN counter",
        lambda: observe(pod("a", busy=math.nan)),
        "MetricsPartial",
        "a: a metric is not a finite number",
    ),
    (
        "silent engine",
        lambda: observe(replace(pod("a"), engine=None)),
        "EngineUnreachable",
        "a: its admin API does not answer",
    ),
]


@pytest.mark.parametrize(("make", "reason", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_untrusted_data_holds(make: Callable[[], Observation], reason: str, message: str) -> None:
    assert distrust(make(), policy_of()) == (reason, message)
    decision = decide(make(), TuningState(last_generation=1), policy_of(), NOW)
    assert decision.state.phase is Phase.HOLD
    assert [(hold.reason, hold.message, hold.since) for hold in decision.state.holds] == [
        (reason, message, NOW)
    ]
    assert {item.state for item in decision.objectives} == {"Unknown"}
    assert decision.records == ()


def test_a_window_of_too_few_scrapes_holds() -> None:
    slow = policy_of(pace=replace(PACES["Fast"], scrape=5))
    found = distrust(observe(*three()), slow)
    assert found == (
        "ScrapeTooSlow",
        "a window of 10 s holds fewer than 4 scrapes of 5 s; scrape more often or use a slower pace",
    )


def test_a_hold_that_goes_on_keeps_its_beginning_and_rewrites_nothing() -> None:
    blind = observe(*three(), metrics_problem="prometheus default: timed out")
    first = decide(blind, TuningState(last_generation=1), policy_of(), NOW)
    later = decide(replace(blind, at=NOW + 100), first.state, policy_of(), NOW + 100)
    assert later.state == first.state
    assert later.actions == ()


def test_terminating_pods_are_not_judged() -> None:
    going = replace(pod("b"), terminating=True, sample=None)
    assert distrust(observe(pod("a"), going), policy_of()) is None


def test_stalled_is_not_idle() -> None:
    stuck = pod("a", done=0.0, gauges=gauges(waiting=3.0, running=1.0))
    decision = decide(observe(pod("b"), stuck), TuningState(last_generation=1), policy_of(), NOW)
    assert decision.stalled == "requests arrive at a and none ends"
    assert [(hold.reason, hold.message) for hold in decision.state.holds] == [
        ("EngineStalled", "requests arrive at a and none ends")
    ]


def test_first_arrivals_after_an_idle_hour_are_not_stalled() -> None:
    item = pod("a", rate=0.0, gauges=gauges(running=1.0))
    assert item.sample is not None
    fresh = {name: replace(window, arrivals=2.0) for name, window in item.sample.windows.items()}
    assert decide(observe(sampled(item, windows=fresh)), TuningState(), policy_of(), NOW).stalled == ""


def test_no_traffic_is_told_apart_from_no_data() -> None:
    idle = decide(observe(*three(rate=0.0)), TuningState(last_generation=1), policy_of(), NOW)
    assert idle.diagnosis is not None
    assert (idle.diagnosis.reason, idle.diagnosis.message) == ("NoTraffic", "there is no traffic")
    assert idle.state.phase is Phase.OBSERVE


def test_pause_and_roll_out_hold_a_breach() -> None:
    breach = observe(*three(attained=BAD, stages={"admission_wait": 1.0, "decode": 0.1}))
    paused = decide(replace(breach, paused_by="stop"), TuningState(last_generation=1), policy_of(), NOW)
    rolling = decide(replace(breach, rolling_out=True), TuningState(last_generation=1), policy_of(), NOW)
    assert [(h.reason, h.message) for h in paused.state.holds] == [("Paused", "override stop is in force")]
    assert [(h.reason, h.message) for h in rolling.state.holds] == [
        ("RollingOut", "the workload replaces its pods")
    ]
    assert paused.records == rolling.records == ()
