"""The load that a replica will find once it serves."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.operator.tuning.observations import many, observe, replica

from kvpilot_operator.tuning.assess.forecast import expected, offered
from kvpilot_operator.tuning.observation import Observation
from kvpilot_operator.tuning.pace import PACES

PACE = PACES["Fast"]


def loaded(short: float, long: float, replicas: int = 3) -> Observation:
    """Requests/s of each replica in both windows."""
    pods = []
    for item, other in zip(many(replicas, rate=short), many(replicas, rate=long), strict=True):
        assert item.sample is not None and other.sample is not None
        windows = {"short": item.sample.windows["short"], "long": other.sample.windows["long"]}
        pods.append(replace(item, sample=replace(item.sample, windows=windows)))
    return observe(*pods)


def test_replicas_that_are_not_measured_get_as_many_as_the_others() -> None:
    assert offered(loaded(10, 10), "short", 3) == pytest.approx(30)
    assert offered(loaded(10, 10), "short", 4) == pytest.approx(40)
    assert offered(observe(replace(replica(), ready=False)), "short", 4) == 0


@pytest.mark.parametrize(
    ("short", "long", "horizon", "rate"),
    [
        (10.0, 10.0, 60.0, 30.0),
        (8.0, 10.0, 60.0, 30.0),  # falling: the busier window
        (10.5, 10.0, 60.0, 31.5),  # a rise within chance ends
        # 3 requests/s more within 25 s go on at 0.8 of that slope for 5 s, and from the middle of the window.
        (20.0, 15.0, 5.0, 60.0 + 0.8 * 15 / 25 * 10),
        (20.0, 10.0, 600.0, 90.0),  # at most 1.5 times as much
    ],
)
def test_only_a_significant_rise_goes_on(short: float, long: float, horizon: float, rate: float) -> None:
    assert expected(loaded(short, long), PACE, 3, horizon) == pytest.approx(rate)


def test_no_load_is_no_rise() -> None:
    assert expected(loaded(0.0, 0.0), PACE, 3, 60.0) == 0.0


def test_the_first_requests_of_the_day_are_expected_to_stay() -> None:
    assert expected(loaded(1.0, 0.0), PACE, 3, 60.0) == pytest.approx(3.0 * 1.5, abs=1.6)
