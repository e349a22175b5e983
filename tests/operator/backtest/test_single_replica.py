"""One replica has no controls."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.operator.backtest.simulations import (
    SMALL,
    assert_settled,
    simulate,
)

from kvpilot_operator.backtest.model import EngineModel
from kvpilot_operator.backtest.planted import Planted, play, runs_of
from kvpilot_operator.resource.load import load_document
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


@pytest.mark.parametrize(
    ("planted", "factor", "promoted"), [("gain", 1.5, 6), ("aa", 1.0, 0), ("regression", 1.5, 0)]
)
def test_one_replica_proves_a_planted_gain_against_its_past(
    planted: Planted, factor: float, promoted: int
) -> None:
    manifest = load_document(Path("examples/production.yaml"))
    manifest["spec"]["tuning"] = {"singleReplica": "BeforeAfter"}
    jobs = runs_of(manifest, planted, factor, 6, replicas=1, pace="Fast", sticky=False, seed=1)
    found = [play(job) for job in jobs]
    assert sum(result.outcome == "Promoted" for result in found) == promoted, [item.report for item in found]
