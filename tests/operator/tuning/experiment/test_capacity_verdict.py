"""Verdicts on changes of capacity: step rates prove and refute them, errors and long work are harm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.operator.tuning.experiments import CURED, canary, change, context, controls, seen
from tests.operator.tuning.observations import BAD, GOOD, curve, gauges, replica

from kvpilot_operator.tuning.experiment.canary import judge_change
from kvpilot_operator.tuning.experiment.capacity_verdict import capacity_effect, is_calm, rates_before
from kvpilot_operator.tuning.experiment.verdict import OPEN, Verdict
from kvpilot_operator.tuning.observation import Observation
from kvpilot_operator.tuning.state import Change, Effect, KnobChange, Measure, ReplicaRef, StepRate

VERIFY_S, LONG_S = 45.0, 60.0
QUEUED = gauges(waiting=40.0)
ALIKE = {"row_rate": 100.0}


def arms(one: dict[str, Any], other: dict[str, Any], seconds: float = 20.0, **figures: Any) -> Observation:
    """Both arms with a backlog, after ``seconds`` of verification."""
    figures = {"gauges": QUEUED, "seconds": seconds, **figures}
    return seen(canary(verify={**ALIKE, **one}, **figures), *controls(verify={**ALIKE, **other}, **figures))


def judged(observation: Observation, tried: Change | None = None, since: float = 20.0) -> Verdict:
    _, verdict = judge_change(context(observation), tried or change(since=since))
    return verdict


def name_of(verdict: Verdict) -> tuple[str, bool]:
    return verdict.name, verdict.aborted


def test_a_gain_is_proven_as_soon_as_the_rates_show_it() -> None:
    verdict = judged(arms({"row_rate": 200.0}, {}))
    assert name_of(verdict) == ("Promoted", False)
    evidence = verdict.evidence
    assert (evidence["ratio"], evidence["predictedRatio"], evidence["predictionError"]) == (2.0, 1.8, 0.111)
    assert evidence["ratioLow"] < 2.0 < evidence["ratioHigh"]
    assert evidence["gainEValue"] >= 20
    assert evidence["unproven"] is False


@pytest.mark.parametrize(
    ("missed", "errors", "verdict"),
    [(0.0, 0.0, OPEN), (1.0, 0.0, "Promoted"), (1.0, 0.2, OPEN)],
)
def test_while_controls_miss_the_objective_fewer_requests_bound_the_faults(
    missed: float, errors: float, verdict: str
) -> None:
    """60 and 40 requests without a fault leave 6 points open: too many, unless they are spared far more."""
    hit = dict.fromkeys(GOOD, 1 - missed)
    observed = arms({"row_rate": 300.0, "rate": 10.0, "errors": errors}, {"rate": 3.3, "attained": hit}, 6.0)
    assert judged(observed, since=6.0).name == verdict


def test_latencies_prove_nothing() -> None:
    """As near saturation: the canary is lucky or unlucky for a while, and works as fast as the others."""
    lucky = judged(arms({"attained": CURED}, {"attained": BAD}))
    unlucky = judged(arms({"attained": {"p50": 0.0, "p95": 0.0, "p99": 0.0}}, {"attained": GOOD}))
    assert name_of(lucky) == name_of(unlucky) == (OPEN, False)
    assert lucky.effect == "p95 within 500 ms rose from 41% to 99%, mean time stayed at 0.08 s"


@pytest.mark.parametrize(
    ("figures", "harmful"),
    [
        ({"row_rate": 50.0}, True),
        ({"row_rate": 90.0}, False),
        ({"errors": 0.2}, True),
        ({"errors": 0.01}, False),
        ({"stages": {"decode": 2.5}}, True),  # the limits leave 0.2 s of work
        ({"stages": {"decode": 0.15}}, False),
        ({"stages": {"admission_wait": 2.5, "decode": 0.06}}, False),  # a wait is the load's
    ],
)
def test_harm(figures: dict[str, Any], harmful: bool) -> None:
    assert name_of(judged(arms(figures, {}))) == (("Harmful", False) if harmful else (OPEN, False))


@pytest.mark.parametrize(
    ("knob", "verdict"), [("numWorkers", "Promoted"), ("maxTokens", "Harmful"), ("maxMemoryMb", "Harmful")]
)
def test_requests_that_are_too_large_are_harm_of_what_bounds_their_length(knob: str, verdict: str) -> None:
    """One client sends them, and a sticky router sends the client to the canary."""
    tried = change(since=20.0, values=(KnobChange(knob, 2, 4),))
    found = judged(arms({"row_rate": 200.0, "too_large": 0.3}, {}), tried)
    assert found.name == verdict
    assert ("faults", 0.0) in found.evidence["canary"].items() or verdict == "Harmful"


def test_fewer_rows_than_the_controls_had_are_no_harm() -> None:
    drained = change(since=20.0, drained=True)
    assert judged(arms({"row_rate": 50.0, "rows": 4}, {"rows": 8}), drained).name == OPEN
    assert judged(arms({"row_rate": 50.0, "rows": 8}, {"rows": 8}), drained).name == "Harmful"


def test_long_work_that_the_controls_have_as_well_is_no_harm() -> None:
    slow = {"stages": {"decode": 2.5}}
    assert judged(arms(slow, slow)).name == OPEN


def test_a_gain_that_comes_with_errors_is_not_promoted() -> None:
    failing = judged(arms({"row_rate": 200.0, "errors": 0.05}, {}))
    assert failing.name != "Promoted"


@pytest.mark.parametrize(
    ("drained", "waiting", "verdict"), [(False, 40.0, "NoGain"), (True, 40.0, OPEN), (False, 0.0, OPEN)]
)
def test_no_gain_is_only_shown_while_there_is_work_for_the_candidate(
    drained: bool, waiting: float, verdict: str
) -> None:
    tried = change(since=20.0, ratio=4.0, drained=drained)
    observation = arms({}, {}, gauges=gauges(waiting=waiting), attained=BAD)
    assert judged(observation, tried).name == verdict


def test_what_drained_once_stays_so() -> None:
    calm = context(arms({}, {}, gauges=gauges(waiting=0.0)))
    assert is_calm(calm, change(since=20.0))
    drained, _ = judge_change(calm, change(since=20.0))
    again, _ = judge_change(context(arms({}, {})), drained)
    assert (drained.drained, again.drained) == (True, True)


def test_a_breach_that_is_gone_without_the_change_ends_it() -> None:
    calm = arms({}, {}, gauges=gauges(), attained=GOOD, seconds=LONG_S)
    assert name_of(judged(calm, since=LONG_S)) == ("BreachGone", True)
    assert judged(calm, since=LONG_S - 1).name == OPEN, "one long window first"
    queued = arms({}, {}, attained=GOOD, seconds=LONG_S)
    assert judged(queued, change(since=LONG_S, drained=True)).name == OPEN, (
        "the controls still have a backlog"
    )


def test_a_breach_by_shedding_is_not_gone_while_the_controls_shed() -> None:
    """They meet every latency objective, as 3% of shed requests do; 1% may fail."""
    calm = {"gauges": gauges(), "attained": GOOD, "seconds": LONG_S}
    shedding = arms({}, {}, shed=0.03, **calm)
    assert judged(shedding, change(since=LONG_S, objective="errors")).name == OPEN
    assert name_of(judged(arms({}, {}, shed=0.005, **calm), since=LONG_S)) == ("BreachGone", True)


def test_a_cure_that_shows_needs_less_of_a_proof() -> None:
    """The canary meets its objectives and the controls do not, while a fifth more is likely."""
    better = {"row_rate": 145.0}
    pods = arms(better, {}, attained=CURED, seconds=50.0)
    pods = replace(
        pods,
        replicas=(pods.replicas[0], *(controls(verify=ALIKE, gauges=QUEUED, seconds=50.0, attained=BAD))),
    )
    soon, later = change(since=VERIFY_S - 1), change(since=VERIFY_S)
    assert 3 <= judged(pods, soon).evidence["gainEValue"] < 20
    assert (judged(pods, soon).name, judged(pods, later).name) == (OPEN, "Promoted")
    everyone = arms(better, {}, attained=CURED, seconds=50.0)
    assert judged(everyone, later).name == OPEN, "the controls are cured as well"


def test_what_proves_nothing_ends_inconclusive() -> None:
    assert judged(arms({}, {}, seconds=179.0), since=179.0).name == OPEN
    assert name_of(judged(arms({}, {}, seconds=180.0), since=180.0)) == ("Inconclusive", False)


def test_what_the_machines_differed_by_is_no_gain() -> None:
    faster = arms({"row_rate": 150.0}, {}, seconds=60.0)
    tried = change(since=60.0)
    fresh = capacity_effect(context(faster), tried)
    known = capacity_effect(context(faster), replace(tried, difference_before=Effect(0.4, 0.001)))
    assert fresh is not None and known is not None
    assert known.log_ratio < 0.3 * fresh.log_ratio
    assert judged(faster, replace(tried, difference_before=Effect(0.4, 0.001))).name == "NoGain"


def test_one_replica_is_compared_with_its_past_and_said_to_be_unproven() -> None:
    tried = change(
        since=20.0,
        controls=(),
        before=(Measure("faults", 0.0, 1200.0), Measure("p95", 700.0, 1200.0)),
        rate_before=StepRate(100.0, 1200.0),
    )
    faster = seen(canary(verify={"row_rate": 200.0}, gauges=QUEUED, seconds=20.0))
    assert name_of(judged(faster, tried)) == ("Promoted", False)
    assert judged(faster, tried).evidence["unproven"] is True
    slower = seen(canary(verify={"row_rate": 50.0}, gauges=QUEUED, seconds=20.0))
    assert judged(slower, tried).name == "Harmful"


@pytest.mark.parametrize(("rate", "verdict"), [(148.0, "Promoted"), (120.0, OPEN)])
def test_what_all_replicas_run_is_compared_with_their_own_past(rate: float, verdict: str) -> None:
    """As after the load stayed on the controls: half as fast again is a proof, since no machine changed."""
    tried = change(
        since=60.0,
        widened=(ReplicaRef("uid-chat-1", "chat-1"), ReplicaRef("uid-chat-2", "chat-2")),
        before=(Measure("faults", 0.0, 1200.0), Measure("p95", 700.0, 1200.0)),
        rate_before=StepRate(100.0, 1200.0),
    )
    figures = {"verify": {"row_rate": rate}, "gauges": QUEUED, "seconds": 60.0}
    assert judged(seen(canary(**figures), *controls(**figures)), tried).name == verdict


MEASURED = gauges(waiting=40.0, curve=curve())


def test_a_gain_is_seen_through_the_hits_of_controls_whose_queue_shares_prompts() -> None:
    """Measured on real engines: 62% hits where requests wait, 44% on the canary."""
    tried = change(since=20.0, difference_before=Effect(0.0, 0.005))
    one = {"row_rate": 138.0, "busy": 0.3 / 1.38, "rows": 4, "hit": 0.44}  # the same requests in less time
    other = {"rows": 4, "hit": 0.62}
    alike = judged(arms(one, {**other, "hit": 0.44}, gauges=MEASURED), tried)
    through = judged(arms(one, other, gauges=MEASURED), tried)
    assert (alike.name, through.name) == (OPEN, "Promoted")
    assert through.evidence["ratio"] > alike.evidence["ratio"] == 1.38


def test_a_gain_that_costs_as_many_hits_is_none() -> None:
    """The canary meets its objectives and would be faster for equal prompts, but it does no more work."""
    tried = change(since=VERIFY_S, difference_before=Effect(0.0, 0.001))
    figures = {"gauges": MEASURED, "seconds": 50.0}
    lost = seen(
        canary(verify={**ALIKE, "rows": 4, "hit": 0.2}, **figures, attained=CURED),
        *controls(verify={**ALIKE, "rows": 4, "hit": 0.8}, **figures),
    )
    verdict = judged(lost, tried)
    assert 3 <= verdict.evidence["gainEValue"] < 20
    assert verdict.name == OPEN


def test_hits_that_a_change_loses_are_harm() -> None:
    tried = change(since=20.0, difference_before=Effect(0.0, 0.001))
    lost = arms(
        {"row_rate": 60.0, "busy": 0.5, "rows": 4, "hit": 0.2}, {"rows": 4, "hit": 0.8}, gauges=MEASURED
    )
    assert judged(lost, tried).name == "Harmful"


def test_rates_before_are_those_of_the_long_window() -> None:
    pods = [replica(f"chat-{i}", row_rate=rate) for i, rate in enumerate((200.0, 100.0, 100.0))]
    rate, differ = rates_before(
        context(seen(*pods)), (), "uid-chat-0", frozenset({"uid-chat-1", "uid-chat-2"})
    )
    assert rate.requests == pytest.approx(3600.0)
    assert differ is not None
    assert differ.log_ratio == pytest.approx(0.693, abs=0.001)
    alone = rates_before(context(seen(pods[0])), (), "uid-chat-0", frozenset())
    assert (alone[0].rate, alone[1]) == (pytest.approx(200.0), None)


def test_a_runtime_without_buckets_of_rows_ends_undecided() -> None:
    blind = {"row_rate": 0.0}
    assert judged(arms(blind, blind)).name == OPEN
    assert judged(arms(blind, blind, seconds=180.0), since=180.0).name == "Inconclusive"
    assert judged(arms({**blind, "errors": 0.3}, blind)).name == "Harmful"
