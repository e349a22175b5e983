"""Approvals, pins and rollbacks, through the real reconciler."""

from __future__ import annotations

from typing import Any

from tests.operator.backtest.simulations import SMALL, assert_settled, overload, promoted, simulate

from kvpilot_engine.contract import ApplyReport, ConfigPatch
from kvpilot_operator.backtest.simulation import Simulation
from kvpilot_operator.status.snapshot import Replica
from kvpilot_operator.tuning.observation import Approval, Pin, Rollback


def test_mode_approve_asks_and_then_does_what_auto_does() -> None:
    sim = simulate(SMALL, load=overload, mode="Approve")
    sim.run(120, until=lambda s: bool(s.state.pending))
    (pending,) = sim.state.pending
    condition = sim.cluster.snapshot().status.condition("ApprovalPending")
    assert condition is not None
    assert condition.status == "True"
    assert f"kvpilot approve chat {pending.id}" in condition.message
    assert any(
        event.reason == "ApprovalPending" and pending.id in event.message for event in sim.cluster.events
    )
    sim.run(20)
    assert {engine.generation for engine in sim.cluster.engines} == {1}, "nothing is done before"
    sim.cluster.approvals = (Approval("yes", pending.id, "ada"),)
    sim.run(120, until=lambda s: "Promoted" in s.outcomes() and s.state.change is None)
    assert sim.outcomes() == ["Proposed", "Started", "Promoted"], sim.report()
    assert {record.id for record in sim.records} == {pending.id}
    assert sim.records[1].summary.endswith("Approved by ada.")
    assert_settled(sim)


def test_an_approved_experiment_is_aborted_when_the_mode_no_longer_permits_it() -> None:
    sim = simulate(SMALL, load=overload, mode="Approve")
    sim.run(120, until=lambda s: bool(s.state.pending))
    sim.cluster.approvals = (Approval("yes", sim.state.pending[0].id, "ada"),)
    sim.run(60, until=lambda s: "Started" in s.outcomes())
    spec = sim.cluster.manifest["spec"]
    sim.cluster.edit({**spec, "tuning": {**spec["tuning"], "mode": "Recommend"}})
    sim.run(20)
    assert "ModeChanged" in next(r for r in sim.records if r.outcome == "Aborted").summary
    assert_settled(sim)


def test_a_pin_holds_on_all_replicas_and_gives_the_tuned_value_back() -> None:
    sim = promoted()
    tuned = sim.promoted.config["numWorkers"]
    sim.cluster.pins = (Pin("mine", "numWorkers", 3, sim.cluster.now + 60),)
    sim.run(10)
    assert sim.promoted.config["numWorkers"] == 3
    assert_settled(sim)
    sim.run(70)
    assert sim.promoted.config["numWorkers"] == tuned
    assert_settled(sim)
    assert [o for o in sim.outcomes() if "inned" in o] == ["Pinned", "Unpinned"]


def test_a_rollback_survives_a_crash_before_its_config_map_is_written() -> None:
    sim = promoted()
    written = [item.number for item in sim.state.generations]
    assert written == [1, 2]
    sim.cluster.rollback = Rollback("undo", 1, "ada")
    writes = iter([False, True])
    sim.cluster.crash = lambda: next(writes, False)
    sim.run(30)
    assert sim.promoted.config["numWorkers"] == SMALL["numWorkers"]
    assert sim.outcomes().count("RolledBack") <= 1
    assert sim.state.handled == ("undo",)
    assert any(item.knob == "numWorkers" for item in sim.state.blocked_values)
    assert_settled(sim)


def test_cache_that_pushes_drop_is_charged_to_the_budget() -> None:
    sim = simulate(SMALL, load=lambda _: 5.0, budgets={"cacheLostPerDay": "1Gi"})
    sim.run(70)
    apply = sim.cluster.apply

    async def losing(replica: Replica, patch: ConfigPatch) -> ApplyReport:
        report = await apply(replica, patch)
        return report.model_copy(update={"blocks_kept": 3, "blocks_lost": 1})

    sim.cluster.apply = losing  # type: ignore[method-assign]
    cached = held(sim)
    sim.cluster.pins = (Pin("mine", "maxTokens", 2048, sim.cluster.now + 600),)
    sim.run(20)
    (spent,) = sim.state.spent
    assert spent.what == "cacheLost"
    assert cached / 4 * 0.9 <= spent.amount <= cached / 4 * 1.1
    writes = len(sim.cluster.status_writes)
    sim.run(10)
    assert len(sim.cluster.status_writes) == writes, "it is charged once"


def held(sim: Simulation) -> float:
    samples: dict[str, Any] = {e.uid: e.sample(sim.cluster.now, {"short": 10.0}) for e in sim.cluster.engines}
    return float(sum(sample.gauges.cached_bytes for sample in samples.values()))
