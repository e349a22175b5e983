"""One replica has no controls."""

from __future__ import annotations

from tests.operator.backtest.simulations import (
    SMALL,
    assert_settled,
    simulate,
)

from kvpilot_operator.backtest.model import EngineModel
from kvpilot_operator.tuning.state import Phase


def test_single_replica_gets_recommendations_only() -> None:
    sim = simulate(SMALL, replicas=1, load=lambda t: 10.0 if t < 60 else 35.0).run(120)
    assert set(sim.outcomes()) == {"Recommended"}
    assert [(hold.reason, hold.message) for hold in sim.state.holds] == [
        (
            "SingleReplica",
            "one replica has no controls; spec.tuning.singleReplica: BeforeAfter allows a change",
        )
    ]


def test_before_after_change_is_labelled_unproven() -> None:
    sim = simulate(SMALL, singleReplica="BeforeAfter", replicas=1, load=lambda t: 10.0 if t < 60 else 40.0)
    sim.run(200, until=lambda s: s.state.phase is Phase.COOLDOWN)
    assert sim.outcomes() == ["Started", "Promoted"], sim.report()
    assert "against its own past (one replica, unproven)" in sim.records[0].summary
    assert sim.records[1].summary.endswith("generation 2 (before/after on one replica, unproven).")
    assert sim.records[1].evidence["unproven"] is True
    assert_settled(sim)


def test_before_window_is_as_long_as_a_verdict_needs() -> None:
    objectives = {"latency": {"p50Ms": 1000, "p95Ms": 2000, "p99Ms": 3000}}
    long_answers = EngineModel(tokens=24, timeout=600.0)
    sim = simulate(
        SMALL,
        singleReplica="BeforeAfter",
        objectives=objectives,
        replicas=1,
        load=lambda t: 3 if t < 60 else 6,
        model=long_answers,
    )
    sim.run(400, until=lambda s: s.state.phase is Phase.COOLDOWN)
    assert sim.outcomes() == ["Started", "Promoted"], sim.report()
    assert sim.records[1].evidence["control"]["judged"] >= 100, "ten seconds hold 50 requests"
