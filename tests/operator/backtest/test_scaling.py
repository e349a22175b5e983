"""The number of replicas, on simulated engines."""

from __future__ import annotations

import re
from itertools import pairwise

from tests.operator.backtest.simulations import (
    SCALING,
    SMALL,
    WIDE,
    overload,
    simulate,
)
from tests.operator.tuning.observations import DOWN

from kvpilot_engine.contract import CATALOGUE
from kvpilot_operator.backtest.model import EngineModel
from kvpilot_operator.backtest.simulation import START, Simulation
from kvpilot_operator.tuning.decision import Record
from kvpilot_operator.tuning.observation import Boost
from kvpilot_operator.tuning.pace import PACES

IDLE_S = PACES["Fast"].idle


def made(sim: Simulation) -> list[Record]:
    """What was done, without the results of it."""
    return [record for record in sim.records if record.outcome != "Measured"]


def test_saturated_device_scales_out_at_once_and_aborts_the_experiment() -> None:
    slow = EngineModel(step_s=lambda rows: 0.016 + 0.008 * rows)
    sim = simulate(
        WIDE, scaling=SCALING, replicas=2, load=lambda t: 20.0 if t < 60 else 240.0, model=slow
    ).run(130)
    assert "ScaledOut" in sim.outcomes(), sim.report()
    out = next(record for record in sim.records if record.outcome == "ScaledOut")
    assert out.rule == "replicas-up"
    assert "replicas complete" in out.summary
    assert out.replicas == (2, 5), "at most 1.25 times what the windows show"
    assert sim.cluster.desired_replicas == 6, "the maximum"
    for record in sim.records:
        if record.outcome == "Aborted":
            assert "(ScalingOut: capacity is added first)" in record.summary
    assert sim.state.blocked_values == ()


def test_pending_replicas_count_as_capacity() -> None:
    slow = EngineModel(step_s=lambda rows: 0.016 + 0.008 * rows)
    sim = simulate(
        WIDE,
        scaling={"min": 1, "max": 50},
        load=lambda t: 20.0 if t < 60 else 100.0,
        model=slow,
        replicas=1,
    )
    sim.cluster.schedulable = 1
    sim.run(180)
    asked = [record.replicas for record in sim.records if record.outcome == "ScaledOut"]
    assert asked, sim.report()
    assert sim.cluster.desired_replicas <= 8, (
        "100 requests/s need 4.5 of these engines, and the queue some more"
    )
    sim.run(300)
    assert [record.replicas for record in sim.records if record.outcome == "ScaledOut"] == asked


def test_overflow_without_a_remedy_scales_out() -> None:
    pinned = [{"name": knob.resource_name, "tune": False} for knob in CATALOGUE]
    sim = simulate(SMALL, scaling=SCALING, knobs=pinned, load=overload)
    sim.run(150)
    assert {(r.outcome, r.rule) for r in made(sim)} == {("ScaledOut", "replicas-up")}
    assert "no knob promises relief" in made(sim)[0].summary
    assert re.search(r"requests/s are expected within \d+ s, and 4 replicas complete", made(sim)[1].summary)


def test_idle_replicas_are_removed_one_by_one_down_to_the_minimum() -> None:
    sim = simulate(WIDE, scaling={"min": 2, "max": 6}, replicas=4, load=lambda t: 30.0 if t < 60 else 0.0)
    sim.run(400)
    first, second = made(sim)
    assert (first.replicas, second.replicas) == ((4, 3), (3, 2)), sim.report()
    assert (first.outcome, second.outcome) == ("ScaledIn", "ScaledIn")
    assert first.at - START >= 40 + IDLE_S, "not before it was idle for long"
    assert second.at - first.at >= IDLE_S / 3, "at most three within one look-back"


def test_what_comes_of_a_scaling_is_what_was_predicted() -> None:
    """Every scaling has a result; what was seen alone lies in its interval or near it."""
    sim = simulate(WIDE, scaling={"min": 2, "max": 6}, replicas=5, load=lambda t: 150.0 if t < 60 else 40.0)
    sim.run(500)
    results = {r.id: r for r in sim.records if r.outcome == "Measured"}
    assert {r.id for r in made(sim)} == set(results), sim.report()
    for result in results.values():
        seen, evidence = result.evidence["measured"], result.evidence
        assert evidence["predictedLow"] <= seen <= evidence["predictedHigh"], result.summary
        assert abs(evidence["predictionError"]) < 0.05


def test_metrics_outage_restarts_the_look_back() -> None:
    sim = simulate(WIDE, scaling=SCALING, replicas=3, load=lambda _: 0.0).run(100)
    sim.cluster.metrics_problem = DOWN
    sim.run(200)
    assert sim.records == [], "no scale-in without data"
    sim.cluster.metrics_problem = None
    back = sim.cluster.now
    sim.run(200, until=lambda s: bool(s.records))
    assert sim.records[0].outcome == "ScaledIn"
    assert sim.records[0].at - back >= IDLE_S


def test_direction_out_only_never_scales_in() -> None:
    sim = simulate(WIDE, scaling={**SCALING, "direction": "OutOnly"}, replicas=3, load=lambda _: 0.0).run(300)
    assert (sim.records, sim.cluster.desired_replicas) == ([], 3)


def test_boost_raises_the_minimum_and_decays_one_by_one() -> None:
    sim = simulate(WIDE, scaling=SCALING, replicas=1, load=lambda _: 20.0).run(60)
    sim.cluster.boosts = (Boost("alert-x", 4, sim.cluster.now + 100),)
    sim.run(20)
    assert (sim.cluster.desired_replicas, sim.records[0].rule) == (4, "boost")
    assert sim.records[0].summary == "Override alert-x asks for at least 4; replicas 1 -> 4."
    sim.run(76)
    assert sim.cluster.desired_replicas == 4
    expired = sim.cluster.now
    sim.run(200)
    down = [r for r in sim.records if r.outcome == "ScaledIn"]
    assert [r.rule for r in down][:2] == ["boost-decay", "boost-decay"]
    assert down[0].at - expired < 60, "what a boost added does not wait for the idle time"
    assert all(b.at - a.at >= IDLE_S / 3 for a, b in pairwise(down))
    assert sim.cluster.desired_replicas < 4
