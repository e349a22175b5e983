"""A steady state has no effects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from tests.operator.backtest.simulations import WIDE, promoted, simulate

SETTLED_S = 900


def test_steady_state_after_a_change_has_no_effects() -> None:
    sim = promoted()
    sim.run(80)
    before = len(sim.decisions)
    state = sim.state
    sim.run(60)
    later = [decision for _, decision in sim.decisions[before:]]
    assert len(later) == 30
    assert all(decision.actions == () and decision.records == () for decision in later)
    assert {decision.state for decision in later} == {state}


STEADY = [
    pytest.param(2.0, None, id="replicas fixed"),
    pytest.param(2.0, {"min": 3, "max": 6}, id="idle at the minimum"),
    pytest.param(30.0, {"min": 1, "max": 6}, id="as many replicas as needed"),
]


def status_writes(seconds: int, rate: float, scaling: Mapping[str, Any] | None) -> list[Any]:
    """Statuses written within ``seconds`` at the Standard pace, after the first quarter of an hour."""
    sim = simulate(WIDE, pace="Standard", scaling=scaling, load=lambda _: rate).run(SETTLED_S)
    settled = len(sim.cluster.status_writes)
    assert settled > 0
    sim.run(seconds)
    assert len(sim.decisions) == 1 + (SETTLED_S + seconds) / 15, "it was reconciled at every tick"
    last = sim.decisions[-1][1]
    assert [item.name for item in last.objectives if item.state != "Met"] == []
    return sim.cluster.status_writes[settled:]


@pytest.mark.parametrize(("rate", "scaling"), STEADY)
def test_steady_hour_writes_no_status(rate: float, scaling: Mapping[str, Any] | None) -> None:
    assert status_writes(3_600, rate, scaling) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("rate", "scaling"), STEADY[:2])
def test_steady_day_writes_no_status(rate: float, scaling: Mapping[str, Any] | None) -> None:
    assert status_writes(86_400, rate, scaling) == []
