"""Situations in which a tuner is easily misled, each with its figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.operator.backtest.simulations import SMALL, WIDE, in_verify, simulate, spec_of

from kvpilot_operator.backtest.faults import TimedFault
from kvpilot_operator.backtest.model import EngineModel, Fault
from kvpilot_operator.backtest.simulation import START, Simulation
from kvpilot_operator.tuning.configuration import value
from kvpilot_operator.tuning.pace import PACES

GPU = Path(__file__).parents[3] / "examples" / "gpu.yaml"
HOUR = 3_600.0
TICK_S = PACES["Standard"].tick


def conditions(sim: Simulation) -> dict[str, tuple[str, str]]:
    """Conditions of the resource: reason and message of those that are true."""
    found = sim.cluster.snapshot().status.conditions
    return {item.type: (item.reason, item.message) for item in found if item.status == "True"}


def test_one_young_replica_of_twenty_does_not_hold_up_capacity() -> None:
    busy = EngineModel(step_s=lambda rows: 0.016 + 0.008 * rows, noise=0.03)  # 28 requests/s each at 16 rows
    surge = 900.0
    sim = simulate(
        {**WIDE, "maxQueue": 32},
        pace="Standard",
        replicas=20,
        scaling={"min": 20, "max": 60},
        load=lambda t: 200.0 if t < surge else 800.0,
        model=busy,
        start_s=90.0,
    )
    sim.run(surge - 60)
    sim.cluster.engines.pop(0)
    sim.cluster.converge(sim.cluster.now + 5)
    sim.run(120 + 60, until=lambda s: bool(s.records))
    (first,) = sim.records[:1]
    assert (first.rule, first.outcome) == ("replicas-up", "ScaledOut"), sim.report()
    assert first.at - (START + surge) <= 2 * TICK_S
    assert "NearlyAll" in {reason for reason, _ in conditions(sim).values()}


@pytest.mark.slow
@pytest.mark.parametrize("load", [45.0, 60.0])
def test_one_slow_replica_of_three_is_named_and_changes_no_knob(load: float) -> None:
    model = EngineModel(step_s=lambda rows: 0.016 + 0.004 * rows, noise=0.02)
    sim = simulate(
        {"numWorkers": 2, "batchSize": 2},
        pace="Standard",
        load=lambda _: load,
        model=model,
        faults=[TimedFault("slow", 0.0, 3 * HOUR)],
    ).run(2 * HOUR)
    slow = sim.cluster.engines[0].name
    assert [record.rule for record in sim.records if record.changes] == [], sim.report()
    assert sim.state.blocked_values == ()
    reason, message = conditions(sim)["ReplicaOutlier"]
    assert (reason, message.startswith(f"{slow}: its steps are slower")) == ("Differs", True)


def test_a_median_that_no_engine_reaches_is_infeasible_and_buys_nothing() -> None:
    sim = simulate(
        WIDE,
        pace="Standard",
        replicas=2,
        scaling={"min": 1, "max": 6},
        objectives={"latency": {"p50Ms": 100, "p95Ms": 30000, "p99Ms": 30000}},
        load=lambda _: 1.2,
        model=EngineModel(tokens=200.0),
    ).run(2 * HOUR)
    assert sim.cluster.desired_replicas <= 2, sim.report()
    assert [record.outcome for record in sim.records if record.outcome == "ScaledOut"] == []
    reason, message = conditions(sim)["Infeasible"]
    assert "p50: 100 ms is asked for" in message
    assert "ms could be reached" in message, (reason, message)


@pytest.mark.parametrize("pace", ["Fast", "Standard"])
def test_limits_on_the_first_token_leave_room_for_long_answers(pace: str) -> None:
    """200 tokens take 1.7 s, and the first one 10 ms: slots are short, and no replica is bought."""
    spec = yaml.safe_load(GPU.read_text())["spec"]
    surge = 900.0
    sim = simulate(
        spec["engine"]["config"],
        pace=pace,
        replicas=2,
        scaling={"min": 2, "max": 6},
        objectives=spec["objectives"],
        load=lambda t: 25.0 if t < surge else 45.0,
        model=EngineModel(
            step_s=lambda rows: 0.008 + 0.00002 * rows, tokens=200.0, prefill_s=2e-5, marginal_gain=None
        ),
        start_s=60.0,
    ).run(surge + 600)
    made = [(record.rule, record.outcome) for record in sim.records]
    assert made == [("workers-up", "Started"), ("workers-up", "Promoted")], sim.report()
    assert value(sim.promoted.config, "numWorkers") >= 48
    assert sim.cluster.desired_replicas == 2
    assert {item.state for item in sim.decisions[-1][1].objectives if item.kind.latency} == {"Met"}
    assert "Infeasible" not in conditions(sim)


@pytest.mark.parametrize("pace", ["Fast", "Standard"])
def test_a_limit_out_of_reach_does_not_keep_slots_from_the_others(pace: str) -> None:
    """Answers take 1 s alone: nothing reaches the profile's p50 of 100 ms, and more slots reach the p95."""
    surge = 900.0
    sim = simulate(
        SMALL,
        pace=pace,
        replicas=2,
        scaling={"min": 2, "max": 6},
        objectives={"latency": {"p95Ms": 5000, "p99Ms": 10000}},
        load=lambda t: 1.0 if t < surge else 8.0,
        model=EngineModel(step_s=lambda rows: 0.01 + 0.0002 * rows, tokens=100.0, marginal_gain=None),
        start_s=60.0,
    ).run(surge + 600)
    made = [(record.rule, record.outcome) for record in sim.records if record.rule != "objectives"]
    assert made == [("workers-up", "Started"), ("workers-up", "Promoted")], sim.report()
    assert sim.cluster.desired_replicas == 2
    states = {item.name: item.state for item in sim.decisions[-1][1].objectives}
    assert (states["p50"], states["p95"], states["p99"]) == ("Infeasible", "Met", "Met")


@pytest.mark.parametrize("errors", [0.02, 0.06])
def test_errors_are_no_latency_out_of_reach_and_buy_no_replica(errors: float) -> None:
    model = EngineModel(fault=Fault(above={"numWorkers": 1}, errors=errors))
    sim = simulate(WIDE, replicas=2, scaling={"min": 2, "max": 6}, load=lambda _: 30.0, model=model)
    sim.run(600)
    assert sim.decisions[-1][1].infeasible == ""
    assert (sim.records, sim.cluster.desired_replicas) == ([], 2), sim.report()


def test_light_traffic_on_a_large_fleet_is_scaled_in() -> None:
    sim = simulate(
        {"numWorkers": 64, "batchSize": 64},
        pace="Standard",
        replicas=8,
        scaling={"min": 1, "max": 8},
        objectives={"latency": {"p50Ms": 3000, "p95Ms": 5000, "p99Ms": 10000}},
        load=lambda _: 6.0,
        model=EngineModel(step_s=lambda rows: 0.009 + 0.00035 * rows, tokens=150.0, marginal_gain=None),
    ).run(1.5 * HOUR)
    assert sim.cluster.desired_replicas <= 2, sim.report()


def test_a_leak_never_scales_in() -> None:
    def memory(config: Mapping[str, Any]) -> float:
        return 0.4 if sim.seconds < 200 else 0.85 + (sim.seconds - 200) / HOUR / 5

    sim = simulate(
        WIDE,
        pace="Standard",
        replicas=4,
        scaling={"min": 1, "max": 6},
        load=lambda _: 2.0,
        model=EngineModel(memory=memory),
    )
    sim.run(HOUR)
    assert [record for record in sim.records if record.outcome == "ScaledIn"] == [], sim.report()


def test_a_leak_of_one_replica_changes_no_knob_of_all() -> None:
    model = EngineModel(step_s=lambda rows: 0.016 + 0.004 * rows)
    sim = simulate({"numWorkers": 8, "batchSize": 8}, replicas=20, load=lambda _: 40.0, model=model)
    sim.run(10)
    leaking = sim.cluster.engines[7]
    leaking.model = replace(model, memory=lambda _: 0.97)
    sim.run(120)
    assert [record for record in sim.records if record.changes] == [], sim.report()
    assert sim.state.blocked_values == ()
    reason, message = conditions(sim)["ReplicaOutlier"]
    assert (reason, message.startswith(f"{leaking.name}: its memory is far fuller")) == ("Differs", True)


def test_relief_of_memory_does_not_wait_for_a_replica_that_is_silent() -> None:
    def memory(config: Mapping[str, Any]) -> float:
        return 0.9 if sim.seconds > 120 and value(config, "maxMemoryMb") is None else 0.7

    sim = simulate(
        SMALL, load=lambda _: 5.0, model=EngineModel(memory=memory), faults=[TimedFault("silent", 20.0, HOUR)]
    )
    sim.run(300)
    _, *others = (engine.name for engine in sim.cluster.engines)
    made = [(record.rule, record.outcome) for record in sim.records[:2]]
    assert made == [("memory-relief", "Started"), ("memory-relief", "Promoted")], sim.report()
    assert {sim.records[0].canary, *sim.records[0].controls} == set(others)
    assert {value(engine.config, "maxMemoryMb") for engine in sim.cluster.engines} == {100}
    assert [hold.reason for hold in sim.state.holds] == ["MetricsMissing"]


def test_an_invalid_edit_takes_the_candidate_off_within_two_ticks() -> None:
    sim = in_verify()
    broken = spec_of(SMALL)
    broken["engine"]["config"]["numWorkers"] = -1
    sim.cluster.edit(broken)
    sim.run(2 * PACES["Fast"].tick)
    assert {value(engine.config, "numWorkers") for engine in sim.cluster.engines} == {2}


def test_ten_replicas_are_two_within_an_hour_of_the_night() -> None:
    night = 1_800.0
    sim = simulate(
        WIDE,
        pace="Standard",
        replicas=10,
        scaling={"min": 2, "max": 10},
        objectives={"latency": {"p50Ms": 30000, "p95Ms": 30000, "p99Ms": 30000}},
        load=lambda t: 60.0 if t < night else 3.0,
        model=EngineModel(step_s=lambda rows: 0.03 + 0.01 * rows, tokens=30.0, marginal_gain=None),
        start_s=90.0,
    )
    sim.cluster.drain_s = 140.0
    sim.run(night)
    assert sim.cluster.desired_replicas >= 9, sim.report()
    sim.run(HOUR, until=lambda s: s.cluster.desired_replicas == 2)
    assert sim.cluster.desired_replicas == 2, sim.report()


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(60.0, 120.0), (20.0, 120.0)])
def test_a_surge_at_standard_pace_costs_three_violation_minutes(before: float, after: float) -> None:
    sim = simulate(SMALL, pace="Standard", load=lambda t: before if t < 1_800 else after)
    sim.run(1_800 + 2 * HOUR)
    breached = [
        at for at, d in sim.decisions if any(o.state == "Breached" and o.kind.latency for o in d.objectives)
    ]
    assert breached, "the surge is more than the workers hold"
    assert len(breached) * TICK_S / 60 <= 3, sim.report()


def test_an_outlier_is_replaced_once_where_that_is_allowed() -> None:
    model = EngineModel(step_s=lambda rows: 0.016 + 0.004 * rows)
    for allowed in (False, True):
        sim = simulate(SMALL, load=lambda _: 30.0, model=model, recycleOutliers=allowed)
        sim.run(4)
        slow = sim.cluster.engines[1]
        slow.outlier = 2.0
        sim.run(120)
        recycled = [record.summary for record in sim.records if record.outcome == "Recycled"]
        why = f"{slow.name} is replaced: its steps are slower than those of the other replicas."
        assert recycled == ([why] if allowed else []), sim.report()
        assert (slow in sim.cluster.engines) is not allowed
