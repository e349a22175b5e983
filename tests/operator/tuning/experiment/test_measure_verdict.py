"""Verdicts by a measure of both arms, interval by interval, and by memory as it is."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from tests.operator.tuning.experiments import canary, change, context, controls, seen
from tests.operator.tuning.observations import BAD, GOOD, NOW, gauges, replica
from tests.operator.tuning.policies import PRODUCTION

from kvpilot_operator.tuning.experiment.measure_verdict import (
    difference_before,
    judge_measure,
    judge_memory,
    with_interval,
    with_scatter,
)
from kvpilot_operator.tuning.experiment.verdict import OPEN, Verdict
from kvpilot_operator.tuning.observation import Observation
from kvpilot_operator.tuning.state import Change, Effect, Tally

SHORT_S, VERIFY_S, READING_SD = 10.0, 45.0, 0.02


def loading(one: float, other: float, **figures: Any) -> Observation:
    """Both arms, which spend so many seconds per request in tier loads."""
    figures = {"attained": BAD, "seconds": 50.0, **figures}
    return seen(
        canary(stages={"tier_load": one, "decode": 0.06}, verify={}, **figures),
        *controls(stages={"tier_load": other, "decode": 0.06}, verify={}, **figures),
    )


def trying(since: float = 50.0, **fields: Any) -> Change:
    return change(**{"since": since, "measure": "tierLoad", "ratio": 0.0, "predicted_gain": 0.5, **fields})


def intervals(effect: float, count: int = 5, scatter: float = 0.05, requests: float = 200.0) -> Tally:
    """So many intervals of one mean, alternately above and below it."""
    tally = Tally()
    for index in range(count):
        tally = tally.with_interval(effect + scatter * (-1) ** index, requests, NOW)
    return tally


def judged(tally: Tally, observation: Observation | None = None, **fields: Any) -> Verdict:
    return judge_measure(context(observation or loading(0.5, 0.5)), trying(tally=tally, **fields))


def test_an_interval_is_a_whole_short_window() -> None:
    seen_now = context(loading(0.2, 0.4))
    early = trying(since=SHORT_S - 1)
    assert with_interval(seen_now, early) == early
    first = with_interval(seen_now, trying(since=SHORT_S))
    assert (first.tally.count, first.tally.at) == (1, NOW)
    assert first.tally.mean == pytest.approx(math.log(0.5))
    assert first.tally.requests == pytest.approx(200.0), "of the smaller arm"
    assert with_interval(seen_now, first) == first, "the same window counts once"
    later = replace(seen_now, now=NOW + SHORT_S)
    assert with_interval(later, first).tally.count == 2


def test_an_interval_without_the_measure_is_none() -> None:
    assert with_interval(context(loading(0.2, 0.0)), trying()).tally.count == 0


def test_what_the_arms_differed_by_before_is_taken_out_of_each_interval() -> None:
    tried = trying(difference_before=Effect(math.log(0.8), 0.01))
    # The canary took 0.8 of the time before, and takes 0.4 of it now: half as much by the change.
    tally = with_interval(context(loading(0.16, 0.4)), tried).tally
    assert tally.mean == pytest.approx(math.log(0.5))


def test_an_interval_begins_anew_after_a_push() -> None:
    """Half of the controls got the candidate 4 s ago: what the short window holds of them is from before."""
    widened = trying(since=200.0, measured_from=NOW - 4, tally=replace(intervals(0.0), at=NOW - 60))
    seen_now = context(loading(0.2, 0.4))
    assert with_interval(seen_now, widened) == widened
    later = replace(seen_now, now=NOW + SHORT_S - 4)
    assert with_interval(later, widened).tally.count == 6


def test_the_time_in_work_is_compared_beside_what_should_improve() -> None:
    tried = trying(work_before=Effect(math.log(0.5), 0.01))
    work = with_interval(context(loading(0.24, 0.24)), tried).work
    assert (work.count, work.mean) == (1, pytest.approx(math.log(2))), "it took half as long before"
    whole = with_interval(context(loading(0.24, 0.24)), trying(measure="seconds"))
    assert (whole.tally.count, whole.work) == (1, Tally())


def test_faults_scatter_by_replica_and_long_window() -> None:
    failing = context(seen(canary(errors=0.1), *controls(errors=0.05)))
    tried = trying(since=60.0)
    assert with_scatter(failing, replace(tried, measured_from=NOW - 59)).scatter.count == 0
    found = with_scatter(failing, tried)
    assert (found.scatter.count, found.scatter.bad, found.scatter.of) == (1, pytest.approx(120), 1200.0)
    assert (found.scatter_before.count, found.scatter_before.bad) == (2, pytest.approx(120))
    assert with_scatter(failing, found) == found, "the same window counts once"
    assert with_scatter(context(seen(canary(), *controls())), tried) == tried, "nothing fails"


def test_after_the_swap_the_same_machine_stands_on_the_other_side() -> None:
    """The first canary is 0.8 times the other by itself: after the swap it is the control."""
    before = Effect(math.log(0.8), 0.01)
    tally = with_interval(
        context(loading(0.5 * 0.4, 0.8 * 0.4)), trying(difference_before=before, crossed_at=NOW - 60)
    ).tally
    assert tally.mean == pytest.approx(math.log(0.5))


def test_difference_before_is_that_of_the_long_window() -> None:
    pods = [replica(f"chat-{i}", stages={"tier_load": seconds}) for i, seconds in enumerate((0.2, 0.4, 0.4))]
    others = frozenset({"uid-chat-1", "uid-chat-2"})
    found = difference_before(context(seen(*pods)), "tierLoad", "uid-chat-0", others, ())
    assert found is not None
    assert found.log_ratio == pytest.approx(math.log(0.5))
    assert found.variance == pytest.approx(2 * 2.0 / 1200)
    assert difference_before(context(seen(*pods)), "tierLoad", "uid-chat-0", frozenset(), ()) is None
    idle = [
        replica(f"chat-{i}", rate=0.0, gauges=gauges(memory_ratio=m)) for i, m in enumerate((0.6, 0.8, 0.8))
    ]
    assert difference_before(context(seen(*idle)), "memory", "uid-chat-0", others, ()) == Effect(
        pytest.approx(math.log(0.75)), pytest.approx(READING_SD**2)
    )


@pytest.mark.parametrize(
    ("tally", "name"),
    [
        (intervals(math.log(0.5)), "Promoted"),
        (intervals(math.log(0.5), count=2), OPEN),  # three intervals at least
        (intervals(math.log(1.5)), "Harmful"),
        (intervals(0.0), "NoGain"),
        (intervals(math.log(0.85), scatter=0.5), OPEN),
        (intervals(math.log(0.9), count=20), "NoGain"),  # half of the predicted gain is 25%
    ],
)
def test_intervals_decide(tally: Tally, name: str) -> None:
    verdict = judged(tally)
    assert (verdict.name, verdict.aborted) == (name, False)
    assert verdict.evidence["intervals"] == tally.count


def test_evidence_says_gain_interval_and_error_of_the_prediction() -> None:
    evidence = judged(intervals(math.log(0.5), scatter=0.0)).evidence
    assert evidence["gain"] == pytest.approx(0.5)
    assert evidence["gainLow"] < 0.5 < evidence["gainHigh"]
    assert (evidence["predictedGain"], evidence["predictionError"]) == (0.5, 0.0)
    assert evidence["measure"] == "tierLoad"


def test_a_vague_difference_before_makes_the_evidence_weaker() -> None:
    sure = judged(intervals(math.log(0.5))).evidence["gainEValue"]
    vague = judged(intervals(math.log(0.5)), difference_before=Effect(0.0, 0.2)).evidence["gainEValue"]
    assert vague < sure / 10


def test_errors_and_lost_capacity_are_harm_whatever_the_measure_says() -> None:
    gain = intervals(math.log(0.5))
    ok = loading(0.2, 0.4)
    failing = replace(ok, replicas=(canary(verify={"errors": 0.2}, seconds=50.0), *ok.replicas[1:]))
    assert judged(gain, failing).name == "Harmful"
    slow = replace(
        ok,
        replicas=(
            canary(verify={"row_rate": 40.0}, seconds=50.0),
            *controls(verify={"row_rate": 100.0}, seconds=50.0),
        ),
    )
    assert judged(gain, slow).name == "Harmful"


@pytest.mark.parametrize(
    ("rule", "ratio", "harmful"),
    [("workers-down", 0.4, False), ("memory-relief", 0.4, False), ("workers-down", 0.0, True)],
)
def test_capacity_is_given_up_as_far_as_the_change_says_so(rule: str, ratio: float, harmful: bool) -> None:
    slow = seen(
        canary(verify={"row_rate": 40.0}, seconds=50.0),
        *controls(verify={"row_rate": 100.0}, seconds=50.0),
    )
    verdict = judged(intervals(math.log(0.5)), slow, rule=rule, ratio=ratio)
    assert (verdict.name == "Harmful") is harmful


HITS = {"measure": "hitRate", "objective": "hitRate", "predicted_gain": 0.3}


def test_hits_that_cost_more_time_than_they_save_are_harm() -> None:
    """As with blocks that hold longer at a higher compression level, and take longer to load."""
    hits = intervals(math.log(0.5))

    def judged_by(work: Tally) -> Verdict:
        low = context(loading(0.5, 0.5, hit=0.3), objectives=PRODUCTION)
        return judge_measure(low, trying(tally=hits, work=work, **HITS))

    slower = judged_by(intervals(math.log(1.5)))
    assert (slower.name, slower.aborted) == ("Harmful", False)
    assert slower.effect == "the hit rate stayed at 30%, but requests are longer in work"
    perhaps = judged_by(intervals(math.log(1.2), scatter=0.3))
    assert perhaps.name == OPEN, "it may be, so that it is not promoted either"
    assert judged_by(intervals(math.log(1.05))).name == "Promoted"


def test_a_gain_that_sheds_is_not_promoted() -> None:
    """Fewer slots: those that are served are served faster."""
    ok = loading(0.2, 0.4)
    shedding = replace(ok, replicas=(canary(verify={"shed": 0.1}, seconds=50.0), *ok.replicas[1:]))
    assert judged(intervals(math.log(0.5)), ok, measure="seconds").name == "Promoted"
    assert judged(intervals(math.log(0.5)), shedding, measure="seconds").name == OPEN


def test_few_errors_still_hold_a_gain_up() -> None:
    few = loading(0.2, 0.4, rate=1.0)
    failing = replace(
        few, replicas=(canary(verify={"errors": 0.06}, rate=1.0, seconds=50.0), *few.replicas[1:])
    )
    assert judged(intervals(math.log(0.5)), failing).name == OPEN


def test_a_breach_that_is_gone_without_the_change_ends_it_after_a_verify_time() -> None:
    calm = loading(0.5, 0.5, attained=GOOD)
    verdict = judged(intervals(math.log(0.5)), calm)
    assert (verdict.name, verdict.aborted) == ("BreachGone", True)
    assert judged(intervals(math.log(0.5)), calm, since=VERIFY_S - 1).name == "Promoted"


def test_what_was_not_shown_in_time_ends() -> None:
    late = {"since": 4 * VERIFY_S}
    few = judged(intervals(math.log(0.5), count=2), **late)
    assert (few.name, few.aborted) == ("TooFewRequests", True)
    vague = judged(intervals(math.log(0.85), scatter=0.5), **late)
    assert (vague.name, vague.aborted) == ("Inconclusive", False)


def arms_with(one: float, other: float, **figures: Any) -> Observation:
    """Both arms with these memory ratios."""
    return seen(
        canary(gauges=gauges(memory_ratio=one), verify=figures, seconds=50.0),
        *controls(gauges=gauges(memory_ratio=other), verify={}, seconds=50.0),
    )


def memory(
    *readings: float,
    other: float = 0.9,
    since: float = 30.0,
    before: Effect | None = None,
    predicted: float = 0.2,
    **figures: Any,
) -> Verdict:
    """The verdict after readings of the canary, one in each short window, against steady controls."""
    tried = trying(
        since=since, measure="memory", objective="memory", predicted_gain=predicted, difference_before=before
    )
    for number, ratio in enumerate(readings, 1):
        now = NOW - since + number * SHORT_S
        tried = with_interval(replace(context(arms_with(ratio, other)), now=now), tried)
    return judge_memory(context(arms_with(readings[-1], other, **figures)), tried)


def test_memory_is_proven_by_readings_that_agree() -> None:
    verdict = memory(0.72, 0.72, 0.72)
    assert (verdict.name, verdict.effect) == ("Promoted", "memory fell from 90% to 72%")
    assert memory(0.72, 0.72).name == OPEN, "two of them"
    assert memory(0.8, 0.8, 0.8).name == "Promoted", "half of the predicted fall"


@pytest.mark.parametrize("predicted", [0.05, 0.07, 0.1, 0.3])
def test_a_fall_of_memory_as_small_as_predicted_is_proven(predicted: float) -> None:
    equal = Effect(0.0, READING_SD**2)
    fallen, little = ([0.9 * (1 - part * predicted)] * 3 for part in (1.0, 0.6))
    assert memory(*fallen, before=equal, predicted=predicted).name == "Promoted"
    late = memory(*little, before=equal, predicted=predicted, since=4 * VERIFY_S)
    assert late.name == ("Inconclusive" if predicted <= 0.1 else "Promoted"), "it could be none"


def test_evidence_of_memory_has_gain_interval_and_error_of_the_prediction() -> None:
    evidence = memory(0.72, 0.72, 0.72).evidence
    assert (evidence["gain"], evidence["predictedGain"], evidence["predictionError"]) == (0.2, 0.2, 0.0)
    assert evidence["gainLow"] < 0.2 < evidence["gainHigh"]
    assert (evidence["measure"], evidence["intervals"]) == ("memory", 3)


def test_readings_that_do_not_agree_prove_nothing() -> None:
    assert memory(0.86, 0.72, 0.72).name == OPEN, "it fell after the first"
    assert memory(0.86, 0.72, 0.72, 0.72, since=40.0).name == "Promoted"
    assert memory(0.72, 0.86, 0.72, since=40.0).name == OPEN
    swinging = {"since": 4 * VERIFY_S}
    late = memory(0.72, 0.86, 0.72, 0.86, 0.72, **swinging)
    assert (late.name, late.aborted) == ("Inconclusive", False)


def test_memory_that_differed_before_has_not_fallen() -> None:
    lower = Effect(math.log(0.8), READING_SD**2)
    assert memory(0.72, 0.72, 0.72, before=lower).name == OPEN
    assert memory(0.72, 0.72, 0.72, since=VERIFY_S, before=lower).name == "NoGain"
    more = memory(0.72, 0.72, 0.72, before=Effect(math.log(1.25), READING_SD**2))
    assert more.evidence["gain"] == pytest.approx(0.36)
    assert memory(0.648, 0.648, 0.648, before=lower).name == "Promoted", "a tenth less than it was"


def test_memory_that_does_not_fall_in_a_verify_time_is_no_gain() -> None:
    assert memory(0.85, 0.85, 0.85).name == OPEN
    assert memory(0.85, 0.85, 0.85, since=VERIFY_S).name == "NoGain"


def test_a_cut_that_makes_requests_fail_is_harm() -> None:
    assert memory(0.72, 0.72, 0.72, errors=0.2).name == "Harmful"
