"""From a breach to a verdict, on simulated engines."""

from __future__ import annotations

import re

import pytest
from tests.operator.backtest.simulations import (
    SCALING,
    SMALL,
    assert_settled,
    overload,
    recovered,
    simulate,
)

from kvpilot_operator.backtest.model import EngineModel, Fault
from kvpilot_operator.tuning.configuration import value
from kvpilot_operator.tuning.decision import Push
from kvpilot_operator.tuning.state import Phase


def test_breach_by_too_few_workers_is_cured_on_a_canary_and_promoted() -> None:
    sim = simulate(SMALL, scaling=SCALING, load=overload)
    sim.run(260, until=lambda s: "Promoted" in s.outcomes() and recovered(s))

    assert sim.outcomes() == ["Started", "Promoted"], sim.report()
    started, promoted = sim.records
    assert (started.rule, started.id) == ("workers-up", "d-0001")
    assert started.diagnosis is not None
    assert (started.diagnosis.reason, started.diagnosis.stage) == ("QueueAtAdmission", "admission_wait")
    after = sim.promoted.config["numWorkers"]
    assert (
        f"trying numWorkers 2 -> {after}, batchSize 2 -> {after} on {started.canary} against"
        in started.summary
    )
    assert promoted.at - started.at <= 15, "a change of capacity is proven within seconds"
    assert promoted.id == "d-0001"
    assert promoted.evidence["verdict"] == "Promoted"
    assert promoted.evidence["gainEValue"] >= 20
    assert abs(promoted.evidence["predictionError"]) <= 0.25
    assert "p95 within 500 ms rose from 0% to" in promoted.summary
    assert promoted.summary.endswith("promoted as generation 2.")
    assert (sim.promoted.generation, sim.promoted.config) == (2, {"numWorkers": after, "batchSize": after})
    assert [(o.knob, o.based_on, o.value, o.decision) for o in sim.state.overlay] == [
        ("numWorkers", 2, after, "d-0001"),
        ("batchSize", 2, after, "d-0001"),
    ]
    assert sim.cluster.desired_replicas == 3, "a knob cured it, so no replica was added"
    assert_settled(sim)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("when", ["Started", "Promoted"])
def test_a_load_that_falls_meanwhile_is_no_harm(when: str, seed: int) -> None:
    """Steps carry fewer rows then, and advance fewer of them per second."""
    sim = simulate(SMALL, load=lambda t: 15.0 if t < 60 or when in sim.outcomes() else 120.0, seed=seed)
    sim.run(150)
    assert when in sim.outcomes(), sim.report()
    assert "Harmful" not in {record.evidence.get("verdict") for record in sim.records}, sim.report()
    assert_settled(sim)


def test_phases_of_a_change_and_order_of_its_pushes() -> None:
    sim = simulate(SMALL, load=overload).run(240)
    phases = [decision.state.phase for _, decision in sim.decisions]
    order = [phase for phase, before in zip(phases, [None, *phases], strict=False) if phase is not before]
    assert order == [
        Phase.HOLD,  # too young to be judged
        Phase.OBSERVE,
        Phase.CANARY,
        Phase.VERIFY,
        Phase.PROMOTE,
        Phase.COOLDOWN,
        Phase.WATCH,
        Phase.OBSERVE,
    ]
    pushed = [(at, action.uid) for at, d in sim.decisions for action in d.actions if isinstance(action, Push)]
    canary = pushed[0][1]
    others = {engine.uid for engine in sim.cluster.engines} - {canary}
    assert {uid for _, uid in pushed[1:]} == others, "the canary alone gets the candidate first"
    assert pushed[1][0] - pushed[0][0] >= 4, "not before it was measured"


def test_no_second_change_begins_while_the_backlog_drains() -> None:
    def surge(seconds: float) -> float:
        return 20.0 if seconds < 60 else 80.0 if seconds < 150 else 70.0

    patient = EngineModel(queue=10_000, timeout=600.0)
    sim = simulate({"numWorkers": 1, "batchSize": 1}, load=surge, model=patient)
    sim.run(600, until=lambda s: "Promoted" in s.outcomes())
    assert sum(len(engine.waiting) for engine in sim.cluster.engines) > 100
    sim.run(300, until=recovered)
    assert sim.outcomes() == ["Started", "Promoted"], sim.report()
    held = [
        at
        for at, decision in sim.decisions
        if {"Draining", "Watching"} & {h.reason for h in decision.state.holds}
    ]
    assert held, "the cooldown was over before the backlog was gone"


def test_mode_off_takes_no_action() -> None:
    sim = simulate(SMALL, scaling=SCALING, mode="Off", load=overload).run(200)
    assert sim.records == []
    assert [action for _, decision in sim.decisions for action in decision.actions] == []
    assert "Breached" in {item.state for item in sim.decisions[-1][1].objectives}


def test_mode_recommend_records_each_recommendation_once() -> None:
    sim = simulate(SMALL, scaling=SCALING, mode="Recommend", load=overload).run(200)
    keys = [(r.rule, r.changes, r.replicas) for r in sim.records]
    assert set(sim.outcomes()) == {"Recommended"}
    assert len(keys) == len(set(keys)), "nothing is advised twice"
    assert re.search(
        r"numWorkers 2 -> \d+, batchSize 2 -> \d+ should gain \d+%, which kvpilot leaves to you\.$",
        sim.records[0].summary,
    )
    assert (sim.promoted.config, sim.cluster.desired_replicas) == (SMALL, 3)


def test_harmful_change_is_reverted_and_its_value_blocked() -> None:
    harmful = EngineModel(tax=lambda config: 0.08 if value(config, "numWorkers") > 2 else 0.0)
    sim = simulate(SMALL, load=overload, model=harmful)
    sim.run(200, until=lambda s: s.state.phase is Phase.COOLDOWN)

    assert sim.outcomes() == ["Started", "Reverted"], sim.report()
    reverted = sim.records[-1]
    tried = reverted.changes[0].after
    assert f"numWorkers 2 -> {tried}, batchSize 2 -> {tried} was reverted (Harmful)" in reverted.summary
    assert reverted.at - sim.records[0].at <= 120
    assert reverted.summary.endswith("back to generation 1.")
    assert reverted.evidence["harmEValue"] >= 50
    assert [(b.knob, b.value, b.until) for b in sim.state.blocked_values] == [
        ("numWorkers", tried, reverted.at + 86_400)
    ]
    assert [r.knob for r in sim.state.reversals] == ["numWorkers"]
    assert sim.promoted.config == SMALL
    assert_settled(sim)


def test_change_without_gain_is_reverted_until_the_flap_budget_is_spent() -> None:
    no_effect = EngineModel(fault=Fault(above={"numWorkers": 2.0, "batchSize": 2.0}, inert=True))
    sim = simulate(SMALL, load=overload, model=no_effect).run(400)
    assert sim.outcomes() == ["Started", "Reverted"] * 2, sim.report()
    assert all("(NoGain)" in record.summary for record in sim.records[1::2]), sim.report()
    assert ("FlapBudgetSpent", "numWorkers was reverted 2 times in 6 hours") in [
        (hold.reason, hold.message) for hold in sim.state.holds
    ]
    assert_settled(sim)


def test_control_that_completes_few_requests_does_not_prevent_promotion() -> None:
    # One row takes 1.7 s: 0.6 requests/s an engine, 1.1 are sent. Four rows complete 2 a second.
    slow = EngineModel(step_s=lambda rows: 0.4 + 0.02 * rows)
    latency = {"p50Ms": 3000, "p95Ms": 5000, "p99Ms": 30000}
    sim = simulate(
        {"numWorkers": 1, "batchSize": 1},
        objectives={"latency": latency},
        replicas=2,
        load=lambda t: 0.8 if t < 60 else 2.2,
        model=slow,
    )
    sim.run(420, until=lambda s: s.state.phase is Phase.COOLDOWN)
    assert sim.outcomes() == ["Started", "Promoted"], sim.report()
    reported = sim.records[-1].evidence
    assert reported["control"]["judged"] < 100
    assert reported["ratio"] > 2
