"""``decide`` driven from end to end against simulated engines: breach -> diagnosis -> change -> verdict."""

from __future__ import annotations

from tests.tuning.simulation import Simulation, policy_of

TOO_FEW = {"numWorkers": 2, "batchSize": 2}


def overload(seconds: float) -> float:
    """20 requests/s, and after 90 s what two workers cannot hold but the device can."""
    return 20.0 if seconds < 90 else 120.0


def test_breach_by_too_few_workers_is_cured_on_a_canary_and_promoted() -> None:
    sim = Simulation(TOO_FEW, policy_of(), load=overload).run(260)

    assert sim.outcomes() == ["Started", "Promoted"], sim.told()
    started, promoted = sim.records
    assert (started.rule, started.id) == ("workers-up", "d-0001")
    assert started.diagnosis is not None
    assert (started.diagnosis.reason, started.diagnosis.stage) == ("QueueAtAdmission", "admission_wait")
    assert "trying numWorkers 2 -> 4, batchSize 2 -> 4 on chat-0 against chat-1, chat-2" in started.summary
    assert promoted.id == "d-0001"
    assert "p95 within 500 ms rose from 0% to 100%" in promoted.summary
    assert promoted.summary.endswith("promoted as generation 2.")
    assert (sim.promoted.generation, sim.promoted.config) == (2, {"numWorkers": 4, "batchSize": 4})
    assert {engine.generation for engine in sim.engines} == {2}
    assert sim.replicas == 3, "a knob cured it, so no replica was added"
    assert sim.state.met_ticks == 3
