"""The guard over what runs on all replicas, through the real reconciler."""

from __future__ import annotations

from typing import Any

import pytest
from tests.operator.backtest.simulations import SMALL, assert_settled, promoted, simulate, spec_of

from kvpilot_operator.backtest.model import EngineModel, Fault
from kvpilot_operator.backtest.simulation import Simulation
from kvpilot_operator.tuning.configuration import value
from kvpilot_operator.tuning.observation import Pin


def slow_down(sim: Simulation, factor: float) -> None:
    """Let every engine take so many times as long for a step."""
    for engine in sim.cluster.engines:
        engine.outlier = factor


def interfere(sim: Simulation, by: str, knob: str, value: int) -> None:
    """A pin of a knob, or an edit of the base."""
    if by == "pin":
        sim.cluster.pins = (Pin("mine", knob, value, sim.cluster.now + 600),)
    else:
        sim.cluster.edit(spec_of({**SMALL, knob: value}))


@pytest.mark.parametrize(("by", "knob", "to"), [("pin", "prefetchSize", 16), ("edit", "maxQueue", 200)])
def test_what_others_change_does_not_save_a_change_that_does_harm(by: str, knob: str, to: int) -> None:
    sim = promoted()
    made = sim.promoted.config["numWorkers"]
    slow_down(sim, 12.0)
    interfere(sim, by, knob, to)
    sim.run(40)
    back = next(record for record in sim.records if record.outcome == "Reverted")
    assert f"numWorkers 2 -> {made}, batchSize 2 -> {made} was reverted (Harmful)" in back.summary
    assert (sim.promoted.config["numWorkers"], sim.promoted.config["batchSize"]) == (2, 2)
    assert ("numWorkers", made) in {(item.knob, item.value) for item in sim.state.blocked_values}


@pytest.mark.parametrize("by", ["pin", "edit"])
def test_who_changes_the_knob_itself_ends_the_guard_over_it(by: str) -> None:
    sim = promoted()
    slow_down(sim, 12.0)
    interfere(sim, by, "numWorkers", 3)
    sim.run(40)
    assert "Reverted" not in sim.outcomes(), sim.report()


def test_a_pin_does_not_save_an_emergency_that_frees_nothing() -> None:
    full = EngineModel(memory=lambda config: 0.97)
    sim = simulate({"numWorkers": 8, "batchSize": 8}, model=full, load=lambda _: 20.0)
    sim.run(120, until=lambda s: s.state.watch is not None)
    assert sim.outcomes()[-1] == "Emergency"
    sim.cluster.pins = (Pin("mine", "prefetchSize", 16, sim.cluster.now + 600),)
    sim.run(sim.pace.settle + 10, until=lambda s: "Reverted" in s.outcomes())
    assert sim.outcomes()[1:4] == ["Pinned", "Measured", "Reverted"], sim.report()
    assert "memory did not fall" in sim.records[-1].summary
    sim.run(10)
    assert value(sim.promoted.config, "batchSize") == 8
    assert_settled(sim)


@pytest.mark.parametrize(("slower", "harmful"), [(2.0, True), (1.0, False)])
def test_an_edit_that_makes_every_engine_slower_is_reported(slower: float, harmful: bool) -> None:
    config = {"numWorkers": 8, "batchSize": 8}
    model = EngineModel(noise=0.05, fault=Fault(above={"prefetchSize": 4}, slower=slower))
    sim = simulate(config, model=model, load=lambda _: 150.0, mode="Recommend").run(80)
    sim.cluster.edit(spec_of({**config, "prefetchSize": 5}, mode="Recommend"))
    sim.run(60)
    harm = [record.summary for record in sim.records if record.outcome == "Harmful"]
    why = "the engines do less work per second than before"
    named = f"prefetchSize unset -> 5, the user's change, does harm: {why}."
    assert harm == ([named] if harmful else []), sim.report()


EIGHT = {"numWorkers": 8, "batchSize": 8}
FAILS = "the user's change, does harm: more requests fail than before."


def edited(knob: str, to: float, *, seed: int = 7, grown: float = 1.0, **options: Any) -> list[str]:
    """What is said of harm after an edit, while the load becomes ``grown`` times as much."""
    config = {**EIGHT, **options.pop("config", {})}
    rate, at = options.pop("rate", 170.0), 80.0
    model = options.pop("model", EngineModel(noise=0.05))
    load = lambda t: rate if t < at else grown * rate  # noqa: E731
    sim = simulate(config, model=model, load=load, mode="Recommend", seed=seed).run(at)
    sim.cluster.edit(spec_of({**config, knob: to}, mode="Recommend"))
    sim.run(60)
    return [record.summary for record in sim.records if record.outcome == "Harmful"]


@pytest.mark.parametrize(("knob", "to", "rate"), [("maxQueue", 1, 190.0), ("requestTimeoutS", 0.1, 170.0)])
def test_an_edit_that_makes_requests_be_shed_or_late_is_reported(knob: str, to: float, rate: float) -> None:
    assert edited(knob, to, rate=rate) == [f"{knob} unset -> {to}, {FAILS}"]


@pytest.mark.parametrize(
    ("config", "grown"),
    [({"maxQueue": 8}, 2.0), ({"requestTimeoutS": 1.0}, 2.0), ({"requestTimeoutS": 1.0}, 1.7)],
)
def test_a_load_that_grows_is_not_blamed_on_the_edit_beside_it(config: dict[str, Any], grown: float) -> None:
    """Where requests wait too long, more of them fail than arrive beyond what was seen."""
    assert edited("prefetchSize", 5, grown=grown, config=config) == []


def test_faults_are_blamed_on_an_edit_however_the_load_grows() -> None:
    model = EngineModel(noise=0.05, fault=Fault(above={"prefetchSize": 4}, errors=0.1))
    assert edited("prefetchSize", 5, grown=2.0, model=model) == [f"prefetchSize unset -> 5, {FAILS}"]


@pytest.mark.slow
@pytest.mark.parametrize("rate", [170.0, 240.0])
def test_harmless_edits_are_never_reported(rate: float) -> None:
    """With a short queue some requests are shed before and after."""
    found = [edited("prefetchSize", 5, seed=seed, rate=rate, config={"maxQueue": 4}) for seed in range(50)]
    assert found == [[]] * 50
