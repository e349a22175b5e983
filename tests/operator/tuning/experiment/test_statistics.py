"""Statistics of two arms: the E-value against its definition, and tails far out."""

from __future__ import annotations

import math

import pytest

from kvpilot_operator.tuning.experiment.statistics import (
    harm_bound,
    log_beta_tail,
    log_evidence,
    overdispersion,
)
from kvpilot_operator.tuning.state import Measure, Scatter


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


def test_canary_that_cures_an_overload_is_no_harm() -> None:
    found = log_evidence(Measure("p95", 0, 2000), Measure("p95", 2400, 2400))
    assert found < 0


def scatter(*bad: float, of: float = 1000.0) -> Scatter:
    found = Scatter()
    for each in bad:
        found = found.with_cell(each, of)
    return found


def test_scatter_of_failed_requests_is_pearsons() -> None:
    cells = scatter(4.0, 16.0, 10.0)
    expected = sum((bad - 10) ** 2 / (1000 * 0.01 * 0.99) for bad in (4, 16, 10))
    assert cells.chi_square == pytest.approx(expected)
    assert scatter(0.0, 0.0).chi_square == scatter(5.0).chi_square == 0.0
    assert scatter(3.0).with_cell(0.0, 0.0).count == 1, "nothing was sent there"


def test_a_cell_between_two_windows_holds_no_more_than_all_of_its_requests() -> None:
    """Prometheus extrapolates increases, so that one window less a shorter one can be any number."""
    assert scatter(3.0).with_cell(-0.2, 1.0) == scatter(3.0).with_cell(0.0, 1.0)
    assert scatter(3.0).with_cell(2.5, 0.01) == scatter(3.0).with_cell(0.01, 0.01)


@pytest.mark.parametrize(
    ("before", "since", "expected"),
    [
        (scatter(0.0, 0.0, 0.0), scatter(), 2.0),  # nothing failed: the floor
        (scatter(1.0), scatter(), 6.0),  # it did, and one cell shows nothing of how
        (scatter(*[10.0] * 41), scatter(), 2.0),  # many show that it does so evenly
        (scatter(), scatter(0.0, 40.0), 40 / 0.98),  # by the cells since, where nothing failed before
        (scatter(10.0, 10.0), scatter(0.0, 40.0), (24 + 40 / 0.98) / 6),
    ],
)
def test_overdispersion_is_that_of_the_cells_and_of_sessions_at_first(
    before: Scatter, since: Scatter, expected: float
) -> None:
    assert overdispersion(before, since) == pytest.approx(expected)


def test_clusters_make_evidence_weaker_and_bounds_wider() -> None:
    canary, control = Measure("faults", 40, 1000), Measure("faults", 20, 2000)
    assert log_evidence(canary, control, 8.0) < log_evidence(canary, control) / 3
    assert harm_bound(canary, control, 8.0) > harm_bound(canary, control)
