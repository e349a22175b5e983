"""What cannot be trusted holds everything: reason and message of each guard."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from tests.operator.tuning.observations import BAD, DOWN, NOW, gauges, many, observe, replica, three
from tests.operator.tuning.policies import policy_of

from kvpilot_operator.tuning.assess.trust import trust
from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.observation import Observation, ObservedReplica, SourceProblem
from kvpilot_operator.tuning.pace import MIN_SCRAPES, PACES, Pace
from kvpilot_operator.tuning.policy import Scaling
from kvpilot_operator.tuning.state import Phase, TuningState


def sampled(item: ObservedReplica, **changes: object) -> ObservedReplica:
    assert item.sample is not None
    return replace(item, sample=replace(item.sample, **changes))


SLOW = SourceProblem("ScrapeTooSlow", "window short of 10 s is below 4 intervals")
CASES: list[tuple[str, Callable[[], Observation], str, str]] = [
    (
        "no config",
        lambda: observe(*three(), promoted=None),
        "NotRolledOut",
        "no configuration was written yet",
    ),
    ("no pods", lambda: observe(replace(replica(), ready=False)), "NoReplicasReady", "no replica is ready"),
    (
        "source down",
        lambda: observe(*three(), metrics_problem=DOWN),
        "MetricsUnavailable",
        "prometheus default: timed out",
    ),
    (
        "source scrapes too slowly",
        lambda: observe(
            *three(),
            metrics_problem=SLOW,
        ),
        "ScrapeTooSlow",
        "window short of 10 s is below 4 intervals",
    ),
    (
        "no sample",
        lambda: observe(replica("a"), replace(replica("b"), sample=None)),
        "MetricsMissing",
        "b: ready, and no metrics of it",
    ),
    (
        "no long window",
        lambda: observe(sampled(replica("a"), windows={})),
        "MetricsMissing",
        "a: ready, and no metrics of it",
    ),
    (
        "stale",
        lambda: observe(sampled(replica("a"), age_s=3.1)),
        "MetricsStale",
        "a: metrics are older than 3 scrapes",
    ),
    (
        "age is no number",
        lambda: observe(sampled(replica("a"), age_s=math.nan)),
        "MetricsStale",
        "a: metrics are older than 3 scrapes",
    ),
    (
        "young",
        lambda: observe(replica("b"), sampled(replica("a"), coverage_s=47.0)),
        "MetricsPartial",
        "a: measured for too short a time",
    ),
    (
        "NaN gauge",
        lambda: observe(replica("a", gauges=gauges(memory_ratio=math.nan))),
        "MetricsPartial",
        "a: a metric is not a finite number",
    ),
    (
        "NaN counter",
        lambda: observe(replica("a", busy=math.nan)),
        "MetricsPartial",
        "a: a metric is not a finite number",
    ),
    (
        "silent engine",
        lambda: observe(replace(replica("a"), engine=None)),
        "EngineUnreachable",
        "a: its admin API does not answer",
    ),
    (
        "refused token",
        lambda: observe(replace(replica("a"), engine=None, engine_problem="unauthorized")),
        "EngineUnreachable",
        "a: its admin API refuses the token",
    ),
    (
        "refused request",
        lambda: observe(replace(replica("a"), engine=None, engine_problem="refused")),
        "EngineUnreachable",
        "a: its admin API refuses the request",
    ),
]


@pytest.mark.parametrize(("make", "reason", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_untrusted_data_holds(make: Callable[[], Observation], reason: str, message: str) -> None:
    assert trust(make(), policy_of()).too_few == (reason, message)
    decision = decide(make(), TuningState(last_generation=1), policy_of(), NOW)
    assert decision.state.phase is Phase.HOLD
    assert [(hold.reason, hold.message, hold.since) for hold in decision.state.holds] == [
        (reason, message, NOW)
    ]
    blind = trust(make(), policy_of()).nothing is not None
    assert ({item.state for item in decision.objectives} == {"Unknown"}) is blind
    assert decision.records == ()


@pytest.mark.parametrize(
    ("pace", "scrape_s", "message"),
    [
        (PACES["Fast"], 5.0, None),
        (PACES["Standard"], 60.0, None),
        (PACES["Standard"], 61.0, "the engines are scraped every 61 s; at most 60 s can be judged by"),
        (PACES["Fast"].scaled(0.3), 1.0, "the short window of 3 s holds fewer than 4 scrapes, one each 1 s"),
        (PACES["Fast"].scaled(0.3), 5.0, None),
    ],
)
def test_a_pace_that_fits_the_source_holds_only_beyond_what_can_be_judged_by(
    pace: Pace, scrape_s: float, message: str | None
) -> None:
    old = (replace(r, sample=replace(r.sample, coverage_s=9_000.0)) for r in three() if r.sample)
    found = trust(observe(*old), policy_of(pace=pace.fitted(scrape_s))).nothing
    assert found == (None if message is None else ("ScrapeTooSlow", message))


@pytest.mark.parametrize("pace", PACES.values(), ids=PACES)
def test_no_interval_misses_the_short_window_by_rounding(pace: Pace) -> None:
    fitted = (pace.fitted(hundredths / 100) for hundredths in range(1, 6001))
    assert [one.scrape for one in fitted if one.short < MIN_SCRAPES * one.scrape] == []


@pytest.mark.parametrize(("seconds", "seen"), [(10.0, True), (9.0, False)])
def test_a_deployment_that_is_all_new_may_ask_for_capacity_after_a_short_window(
    seconds: float, seen: bool
) -> None:
    found = trust(observe(*(sampled(item, coverage_s=seconds) for item in three())), policy_of())
    young = ("MetricsPartial", "chat-0, chat-1, chat-2: measured for too short a time")
    assert (found.nothing, found.too_few) == (None if seen else young, young)
    assert len(found.trusted) == (3 if seen else 0)
    assert len(found.counted) == 3, "what arrives at them can be added up"


def test_counters_of_replicas_that_cannot_be_judged_are_added_up_if_they_are_whole() -> None:
    old, young, gone = replica("a"), sampled(replica("b"), coverage_s=3.0), replace(replica("c"), engine=None)
    stale, broken = sampled(replica("d"), age_s=99.0), replica("e", busy=math.nan)
    found = trust(observe(old, young, gone, stale, broken, replace(replica("f"), sample=None)), policy_of())
    assert [item.name for item in found.counted] == ["a", "b", "c"]


def test_a_hold_that_goes_on_keeps_its_beginning_and_rewrites_nothing() -> None:
    blind = observe(*three(), metrics_problem=DOWN)
    first = decide(blind, TuningState(last_generation=1), policy_of(), NOW)
    later = decide(replace(blind, at=NOW + 100), first.state, policy_of(), NOW + 100)
    assert later.state == first.state
    assert later.actions == ()


def test_terminating_pods_are_not_judged() -> None:
    going = replace(replica("b"), terminating=True, sample=None)
    assert trust(observe(replica("a"), going), policy_of()).too_few is None


def test_stalled_is_not_idle() -> None:
    stuck = replica("a", done=0.0, gauges=gauges(waiting=3.0, running=1.0))
    decision = decide(observe(replica("b"), stuck), TuningState(last_generation=1), policy_of(), NOW)
    assert decision.stalled == "requests arrive at a and none ends"
    assert [(hold.reason, hold.message) for hold in decision.state.holds] == [
        ("EngineStalled", "a: requests arrive and none ends")
    ]


def test_first_arrivals_after_an_idle_hour_are_not_stalled() -> None:
    item = replica("a", rate=0.0, gauges=gauges(running=1.0))
    assert item.sample is not None
    fresh = {name: replace(window, arrivals=2.0) for name, window in item.sample.windows.items()}
    assert decide(observe(sampled(item, windows=fresh)), TuningState(), policy_of(), NOW).stalled == ""


def test_no_traffic_is_shown_apart_from_no_data() -> None:
    idle = decide(observe(*three(rate=0.0)), TuningState(last_generation=1), policy_of(), NOW)
    assert idle.diagnosis is not None
    assert (idle.diagnosis.reason, idle.diagnosis.message) == ("NoTraffic", "there is no traffic")
    assert idle.state.phase is Phase.OBSERVE


def test_pause_and_roll_out_hold_a_breach_and_only_a_pause_holds_capacity() -> None:
    breach = observe(*three(attained=BAD, stages={"admission_wait": 1.0, "decode": 0.1}))
    paused = decide(replace(breach, paused_by="stop"), TuningState(last_generation=1), policy_of(), NOW)
    rolling = decide(replace(breach, rolling_out=True), TuningState(last_generation=1), policy_of(), NOW)
    assert [(h.reason, h.message) for h in paused.state.holds] == [("Paused", "override stop is in force")]
    assert [(h.reason, h.message) for h in rolling.state.holds] == [
        ("RollingOut", "the workload replaces its pods")
    ]
    assert (paused.records, paused.state.change, rolling.state.change) == ((), None, None)
    assert [record.outcome for record in rolling.records] == ["ScaledOut"]


QUEUED = {"admission_wait": 1.0, "decode": 0.1}
SMALL = {"numWorkers": 2, "batchSize": 2}
WIDE = {"numWorkers": 16, "batchSize": 16}
KNOWN = TuningState(last_generation=1)
SHEDDING: dict[str, object] = {
    "attained": BAD,
    "done": 0.7,
    "shed": 3 / 7,  # of 20 requests/s 14 end well and 6 are shed
    "busy": 0.97,
    "gauges": gauges(marginal_gain=0.05, waiting=9.0),
    "stages": {"admission_wait": 1.0, "decode": 0.4},
}

UNTRUSTED: dict[str, Callable[[ObservedReplica], ObservedReplica]] = {
    "young": lambda item: sampled(item, coverage_s=20.0),
    "missing": lambda item: replace(item, sample=None),
    "stale": lambda item: sampled(item, age_s=100.0),
    "no number": lambda item: sampled(item, age_s=math.nan),
    "silent": lambda item: replace(item, engine=None),
    "hung": lambda item: replica(item.name, done=0.0, gauges=gauges(waiting=3.0, running=1.0)),
}


def untrusted(number: int, fault: str, **figures: object) -> tuple[ObservedReplica, ...]:
    """So many pods alike, the first with a fault."""
    first, *others = many(number, **figures)
    return UNTRUSTED[fault](first), *others


@pytest.mark.parametrize("fault", UNTRUSTED)
def test_one_of_twenty_is_left_out_and_the_others_are_tuned(fault: str) -> None:
    seen = observe(*untrusted(20, fault, attained=BAD, stages=QUEUED), config=SMALL)
    found = trust(seen, policy_of())
    assert (found.nothing, found.too_few) == (None, None)
    assert len(found.trusted) == 19
    assert [item.name for item in found.distrusted] == ["chat-0"]
    decision = decide(seen, KNOWN, policy_of(scaling=None), NOW)
    assert [record.outcome for record in decision.records] == ["Started"]
    assert decision.partly_trusted == f"chat-0: {found.distrusted[0].clause}"
    change = decision.state.change
    assert change is not None
    assert "uid-chat-0" not in {change.canary_uid, *change.control_uids}


@pytest.mark.parametrize("fault", UNTRUSTED)
def test_one_of_three_stops_tuning_and_not_capacity(fault: str) -> None:
    seen = observe(*untrusted(3, fault, **SHEDDING), config=WIDE)
    found = trust(seen, policy_of())
    assert found.nothing is None
    assert found.too_few == (found.distrusted[0].reason, f"chat-0: {found.distrusted[0].clause}")
    decision = decide(seen, KNOWN, policy_of(), NOW)
    assert [record.outcome for record in decision.records] == ["ScaledOut"]
    queued = observe(*untrusted(3, fault, attained=BAD, stages=QUEUED), config=SMALL)
    assert decide(queued, KNOWN, policy_of(scaling=None), NOW).records == ()


@pytest.mark.parametrize("fault", UNTRUSTED)
def test_a_fleet_that_sheds_with_one_untrusted_replica_asks_for_capacity(fault: str) -> None:
    seen = observe(*untrusted(20, fault, **SHEDDING), config=WIDE)
    decision = decide(seen, KNOWN, policy_of(scaling=Scaling(1, 60)), NOW)
    assert [(record.rule, record.outcome) for record in decision.records] == [("replicas-up", "ScaledOut")]


def test_memory_is_relieved_with_what_the_trusted_replicas_show() -> None:
    full = gauges(memory_ratio=0.97)
    seen = observe(*untrusted(3, "young", gauges=full), config=WIDE)
    assert [r.outcome for r in decide(seen, KNOWN, policy_of(), NOW).records] == ["Emergency"]
    only_it = observe(sampled(replica("chat-0", gauges=full), coverage_s=20.0), *many(3)[1:], config=WIDE)
    assert decide(only_it, KNOWN, policy_of(), NOW).records == ()


def test_each_reason_is_reported_with_all_replicas_that_it_holds_for() -> None:
    young, stale = (UNTRUSTED[name] for name in ("young", "stale"))
    a, b, c = three()
    found = trust(observe(young(a), stale(b), young(c)), policy_of())
    assert [(item.name, item.reason) for item in found.distrusted] == [
        ("chat-0", "MetricsPartial"),
        ("chat-1", "MetricsStale"),
        ("chat-2", "MetricsPartial"),
    ]
    assert found.too_few == found.nothing == ("MetricsStale", "chat-1: metrics are older than 3 scrapes")
    both = trust(observe(young(a), b, young(c)), policy_of())
    assert both.too_few == ("MetricsPartial", "chat-0, chat-2: measured for too short a time")


@pytest.mark.parametrize(("distrusted", "permits"), [(1, True), (2, True), (3, False)])
def test_nine_of_ten_are_nearly_all(distrusted: int, permits: bool) -> None:
    pods = many(20)
    seen = observe(*(UNTRUSTED["stale"](item) for item in pods[:distrusted]), *pods[distrusted:])
    assert (trust(seen, policy_of()).too_few is None) is permits
