"""An invalid edit of the spec: the resource goes on from the last spec that was in force, and says so."""

from __future__ import annotations

from typing import Any

from tests.operator.backtest.simulations import SMALL, in_verify, simulate, spec_of

from kvpilot_operator.backtest.simulation import Simulation
from kvpilot_operator.tuning.state import Phase

FAULT = "spec.tuning.disabledRules.0: no such rule"


def invalid_spec(**scaling: Any) -> dict[str, Any]:
    """A spec that the definition accepts and the operator does not: it names a rule that does not exist."""
    return spec_of(SMALL, disabledRules=["no-such-rule"], **scaling)


def conditions(sim: Simulation) -> dict[str, Any]:
    return {item.type: item for item in sim.cluster.snapshot().status.conditions}


def test_invalid_edit_in_verify_aborts_the_experiment_and_frees_the_canary() -> None:
    sim = in_verify()
    sim.cluster.edit(invalid_spec())
    sim.run(10)
    aborted = sim.records[-1]
    assert aborted.outcome == "Aborted"
    assert f"was aborted (SpecInvalid: {FAULT}" in aborted.summary
    assert [engine.config["numWorkers"] for engine in sim.cluster.engines] == [2, 2, 2]
    assert sim.state.change is None
    assert sim.state.phase is Phase.HOLD
    assert [hold.reason for hold in sim.state.holds][:1] == ["SpecInvalid"]
    ready = conditions(sim)["Ready"]
    assert (ready.status, ready.reason, ready.observed_generation) == ("False", "InvalidSpec", 2)
    assert ready.message.startswith(FAULT)
    assert ready.message.endswith("; generation 1 stays in force")
    assert sim.cluster.snapshot().status.observed_generation == 1


def test_invalid_edit_keeps_the_bounds_of_the_last_valid_spec() -> None:
    sim = simulate(SMALL, scaling={"min": 2, "max": 3}, replicas=3, load=lambda _: 5.0).run(120)
    sim.cluster.edit(invalid_spec(scaling={"min": 6, "max": 9}))
    sim.cluster.desired_replicas = 1  # a `kubectl scale` of the workload
    sim.cluster.converge(sim.cluster.now)
    sim.run(10)
    assert sim.cluster.desired_replicas == 2


def test_invalid_edit_survives_a_restart_of_the_operator() -> None:
    sim = in_verify()
    sim.cluster.edit(invalid_spec())
    deaths = iter([True])
    sim.cluster.crash = lambda: next(deaths, False)
    sim.run(20)
    assert [engine.config["numWorkers"] for engine in sim.cluster.engines] == [2, 2, 2]
    assert conditions(sim)["Ready"].reason == "InvalidSpec"


def test_invalid_spec_writes_no_status_while_nothing_changes() -> None:
    sim = simulate(SMALL, load=lambda _: 5.0).run(120)
    sim.cluster.edit(invalid_spec())
    sim.run(20)
    writes = len(sim.cluster.status_writes)
    sim.run(60)
    assert len(sim.cluster.status_writes) == writes


def test_valid_edit_after_an_invalid_one_is_in_force() -> None:
    sim = simulate(SMALL, load=lambda _: 5.0).run(60)
    sim.cluster.edit(invalid_spec())
    sim.run(10)
    sim.cluster.edit(spec_of({**SMALL, "maxTokens": 8192}))
    sim.run(10)
    assert sim.promoted.config["maxTokens"] == 8192
    assert conditions(sim)["Ready"].reason == "Serving"
    assert sim.cluster.snapshot().status.observed_generation == 3


def test_resource_without_a_valid_spec_is_only_reported() -> None:
    sim = simulate(SMALL)
    sim.cluster.edit(invalid_spec())
    sim.cluster.promoted = None
    sim.run(0)
    assert (sim.cluster.promoted, sim.cluster.records) == (None, [])
