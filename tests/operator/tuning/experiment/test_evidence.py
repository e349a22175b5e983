"""Evidence: error rates of the E-values over many experiments, the bound of harm, effects."""

from __future__ import annotations

import math
import random

import pytest
from tests.operator.tuning.policies import PRODUCTION

from kvpilot_operator.tuning.experiment.evidence import (
    GAIN_EVIDENCE,
    HARM_EVIDENCE,
    Arm,
    compared,
    effect_of,
    error_evidence,
    errors_bounded,
    measures,
)
from kvpilot_operator.tuning.experiment.statistics import harm_bound, mixture_evidence
from kvpilot_operator.tuning.observation import Counts
from kvpilot_operator.tuning.state import Effect, Measure, Tally


def counted(bad: float, of: float) -> Arm:
    return Arm({"faults": Measure("faults", bad, of)}, of)


def errors_path(rate_canary: float, rate_control: float, looks: int, seed: int) -> float:
    """Largest E-value over the looks of one experiment with 40 and 80 more requests at each look."""
    draw = random.Random(seed)
    bad = [0.0, 0.0]
    worst = 0.0
    for look in range(1, looks + 1):
        bad[0] += sum(draw.random() < rate_canary for _ in range(40))
        bad[1] += sum(draw.random() < rate_control for _ in range(80))
        worst = max(worst, error_evidence(counted(bad[0], 40 * look), counted(bad[1], 80 * look)))
    return worst


def test_no_false_alarms_without_a_difference_and_alarms_with_one() -> None:
    false_alarms = sum(errors_path(0.05, 0.05, 25, seed) >= HARM_EVIDENCE for seed in range(60))
    alarms = sum(errors_path(0.15, 0.05, 25, seed) >= HARM_EVIDENCE for seed in range(20))
    assert false_alarms == 0
    assert alarms >= 19


def tally_path(effect: float, scatter: float, seed: int, intervals: int = 40) -> tuple[float, float]:
    """Largest E-values of a gain and of harm over an experiment; the arms differ by ``scatter`` at random."""
    draw = random.Random(seed)
    tally, gain, harm = Tally(), 0.0, 0.0
    before = Effect(draw.gauss(0, scatter / math.sqrt(5)), scatter**2 / 5)
    for index in range(intervals):
        tally = tally.with_interval(draw.gauss(effect, scatter) - before.log_ratio, 100, float(index))
        found = effect_of(tally, Effect(0.0, before.variance))
        if found is not None and tally.count >= 3:
            gain = max(gain, mixture_evidence(found, math.log(0.95), above=False))
            harm = max(harm, mixture_evidence(found, math.log(1.1)))
    return gain, harm


@pytest.mark.parametrize("scatter", [0.05, 0.3, 1.0])
def test_intervals_prove_nothing_where_nothing_is(scatter: float) -> None:
    paths = [tally_path(0.0, scatter, seed) for seed in range(1000)]
    assert sum(gain >= GAIN_EVIDENCE for gain, _ in paths) <= 50
    assert sum(harm >= HARM_EVIDENCE for _, harm in paths) <= 20


def alone_path(effect: float, scatter: float, seed: int, intervals: int = 18) -> tuple[float, float]:
    """The same on one replica: the intervals of its four verify times, against one of before."""
    draw = random.Random(seed)
    tally, gain, harm = Tally(), 0.0, 0.0
    before = draw.gauss(0, scatter)
    for index in range(intervals):
        tally = tally.with_interval(draw.gauss(effect, scatter) - before, 100, float(index))
        found = effect_of(tally, None, alone=True)
        if found is not None and tally.count >= 3:
            gain = max(gain, mixture_evidence(found, math.log(0.95), above=False))
            harm = max(harm, mixture_evidence(found, math.log(1.1)))
    return gain, harm


@pytest.mark.parametrize("scatter", [0.05, 0.15, 0.3])
def test_what_one_replica_showed_before_scatters_as_well(scatter: float) -> None:
    paths = [alone_path(0.0, scatter, seed) for seed in range(1000)]
    assert sum(gain >= GAIN_EVIDENCE for gain, _ in paths) <= 50
    assert sum(harm >= HARM_EVIDENCE for _, harm in paths) <= 20
    found = [alone_path(math.log(0.5), scatter / 2, seed) for seed in range(100)]
    assert sum(gain >= GAIN_EVIDENCE for gain, _ in found) >= 85


@pytest.mark.parametrize(("effect", "scatter"), [(math.log(0.5), 0.2), (math.log(0.7), 0.1)])
def test_intervals_prove_what_is_there(effect: float, scatter: float) -> None:
    paths = [tally_path(effect, scatter, seed) for seed in range(100)]
    assert sum(gain >= GAIN_EVIDENCE for gain, _ in paths) >= 95


def test_harm_is_bounded_by_counts_not_by_rates_alone() -> None:
    assert harm_bound(Measure("faults", 2, 100), Measure("faults", 2, 200)) > 0.05
    assert harm_bound(Measure("faults", 8, 400), Measure("faults", 8, 400)) < 0.05
    assert errors_bounded(counted(8, 400), counted(8, 400), PRODUCTION)
    assert not errors_bounded(counted(80, 400), counted(8, 400), PRODUCTION)


def arm(**shares: float) -> Arm:
    return Arm({name: Measure(name, share * 100, 100) for name, share in shares.items()}, 100)


def test_comparison_is_the_log_ratio_with_a_floor() -> None:
    assert compared(arm(tierLoad=0.1), arm(tierLoad=0.4), "tierLoad") == pytest.approx(math.log(0.25))
    assert compared(arm(tierLoad=0.0), arm(tierLoad=0.4), "tierLoad") == pytest.approx(math.log(0.02))
    assert compared(arm(tierLoad=0.1), arm(tierLoad=0.0), "tierLoad") is None


def outcomes(**ended: float) -> Arm:
    return Arm(
        {item.name: item for item in measures(Counts(outcomes=ended), PRODUCTION)}, sum(ended.values())
    )


def test_what_an_arm_sheds_makes_its_engines_neither_better_nor_worse() -> None:
    """Both fail 2% of what they answer, and the controls refuse half of what comes to them."""
    canary, control = outcomes(ok=1960.0, error=40.0), outcomes(ok=980.0, error=20.0, shed=1000.0)
    assert error_evidence(canary, control) < 1
    assert errors_bounded(canary, control, PRODUCTION)
    failing = outcomes(ok=400.0, error=100.0, shed=1500.0)
    assert error_evidence(failing, outcomes(ok=1900.0, error=100.0)) >= HARM_EVIDENCE, (
        "a fifth of the answers"
    )


def test_controls_that_answer_nothing_in_time_do_not_hold_a_cure_up() -> None:
    cured, collapsed = outcomes(ok=1000.0), outcomes(timeout=1000.0)
    assert errors_bounded(cured, collapsed, PRODUCTION)
    assert error_evidence(cured, collapsed) == pytest.approx(1.0)


def test_blocks_are_wasted_by_requests_that_are_served() -> None:
    seen = Counts(outcomes={"ok": 100.0, "shed": 100.0}, prefetch_wasted=50.0)
    shares = {item.name: item.share for item in measures(seen, PRODUCTION)}
    assert shares["prefetchWaste"] == 0.5


def test_errors_of_an_arm_are_those_of_the_objective() -> None:
    shedding = outcomes(ok=900.0, error=10.0, shed=80.0, timeout=10.0)
    assert shedding.share("errors") == pytest.approx(0.1)
    assert shedding.share("faults") == pytest.approx(10 / 920)
    assert not errors_bounded(shedding, outcomes(ok=1000.0), PRODUCTION, measure="errors")
