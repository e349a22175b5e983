"""Evidence: the E-value against its definition and its error rates, the bound of harm, gains."""

from __future__ import annotations

import math
import random

import pytest
from tests.tuning.simulation import PRODUCTION

from kvpilot_operator.tuning.evidence import (
    HARM_EVIDENCE,
    Arm,
    gain,
    harm_bound,
    harm_evidence,
    harmless,
    log_beta_tail,
    log_evidence,
)
from kvpilot_operator.tuning.state import Measure


def integral(
    a: float, b: float, low: float, power: tuple[float, float] = (0.0, 0.0), steps: int = 40_000
) -> float:
    """Integral of t^(a-1+k) (1-t)^(b-1+m) over (low, 1) by the midpoint rule after t = sin^2(u)."""
    start = math.asin(math.sqrt(low))
    width = (math.pi / 2 - start) / steps
    total = 0.0
    for i in range(steps):
        u = start + (i + 0.5) * width
        t = math.sin(u) ** 2
        total += t ** (a - 0.5 + power[0]) * (1 - t) ** (b - 0.5 + power[1]) * 2
    return total * width


@pytest.mark.parametrize(
    ("bad_canary", "n_canary", "bad_control", "n_control"),
    [(12, 100, 4, 200), (0, 100, 30, 200), (20, 150, 20, 150), (3, 90, 0, 30)],
)
def test_evidence_is_the_truncated_bayes_factor(
    bad_canary: float, n_canary: float, bad_control: float, n_control: float
) -> None:
    # By definition: the mean over the prior (cut to t > t0) of the likelihood ratio against t0.
    k, m = bad_canary / 2, bad_control / 2
    t0 = n_canary / (n_canary + n_control)
    mean = integral(0.5, 0.5, t0, (k, m)) / integral(0.5, 0.5, t0)
    expected = math.log(mean) - k * math.log(t0) - m * math.log(1 - t0)
    found = log_evidence(Measure("p95", bad_canary, n_canary), Measure("p95", bad_control, n_control))
    assert found == pytest.approx(expected, abs=1e-3)


def test_tails_are_right_far_out() -> None:
    assert log_beta_tail(0.4, 0.5, 0.5) == pytest.approx(
        math.log(1 - 2 / math.pi * math.asin(math.sqrt(0.4)))
    )
    # P(t > 0.5) of Beta(1, 2000) is 0.5 ** 2000: far below the smallest float.
    assert log_beta_tail(0.5, 1.0, 2000.0) == pytest.approx(2000 * math.log(0.5), rel=1e-9)
    assert (log_beta_tail(0.0, 1, 1), log_beta_tail(1.0, 1, 1)) == (0.0, -math.inf)


def test_a_canary_that_cures_an_overload_is_no_harm() -> None:
    found = log_evidence(Measure("p95", 0, 2000), Measure("p95", 2400, 2400))
    assert found < 0


def counted(bad: float, of: float) -> Arm:
    names = (*PRODUCTION.latency, "errors")
    return Arm({name: Measure(name, bad if name != "errors" else 0.0, of) for name in names}, of)


def path(rate_canary: float, rate_control: float, looks: int, seed: int) -> float:
    """Largest E-value over the looks of one experiment with 40 and 80 more requests at each look."""
    draw = random.Random(seed)
    bad = [0.0, 0.0]
    worst = 0.0
    for look in range(1, looks + 1):
        bad[0] += sum(draw.random() < rate_canary for _ in range(40))
        bad[1] += sum(draw.random() < rate_control for _ in range(80))
        worst = max(worst, harm_evidence(counted(bad[0], 40 * look), counted(bad[1], 80 * look), PRODUCTION))
    return worst


def test_no_false_alarms_without_a_difference_and_alarms_with_one() -> None:
    false_alarms = sum(path(0.05, 0.05, 25, seed) >= HARM_EVIDENCE for seed in range(60))
    alarms = sum(path(0.15, 0.05, 25, seed) >= HARM_EVIDENCE for seed in range(20))
    assert false_alarms == 0
    assert alarms >= 19


def test_harm_is_bounded_by_counts_not_by_rates_alone() -> None:
    assert harm_bound(Measure("p95", 2, 100), Measure("p95", 2, 200)) > 0.05
    assert harm_bound(Measure("p95", 8, 400), Measure("p95", 8, 400)) < 0.05
    assert harmless(counted(8, 400), counted(8, 400), PRODUCTION)
    assert not harmless(counted(80, 400), counted(8, 400), PRODUCTION)


def arm(**shares: float) -> Arm:
    return Arm({name: Measure(name, share * 100, 100) for name, share in shares.items()}, 100)


def test_gain_is_the_fall_of_bad_requests_or_of_time() -> None:
    assert gain(arm(p95=0.01, seconds=0.3), arm(p95=0.5, seconds=0.6), "p95") == pytest.approx(0.98)
    # All still miss the edge, and yet each takes half the time.
    assert gain(arm(p95=1.0, seconds=2.0), arm(p95=1.0, seconds=4.0), "p95") == pytest.approx(0.5)
    assert gain(arm(memory=0.7, seconds=0.1), arm(memory=0.9, seconds=0.9), "memory") == pytest.approx(2 / 9)
    assert gain(arm(hitRate=0.4), arm(hitRate=0.0), "hitRate") is None
