"""The user edits the base configuration or the tuner's bounds."""

from __future__ import annotations

from tests.operator.backtest.simulations import (
    SMALL,
    WIDE,
    assert_settled,
    promoted,
    simulate,
    spec_of,
)

from kvpilot_operator.tuning.configuration import value


def test_new_base_value_replaces_the_tuned_value() -> None:
    sim = promoted()
    tuned = sim.promoted.config
    sim.cluster.edit(spec_of({"numWorkers": 16, "batchSize": 2}))
    sim.run(6)
    assert sim.promoted.config == {**tuned, "numWorkers": 16}, "the overlay of the other knob stays"
    assert (sim.records[-1].outcome, sim.records[-1].rule) == ("Reset", "user-edit")
    assert sim.records[-1].summary == (
        "The user's configuration changed in numWorkers; back to the user's value: "
        f"numWorkers (tuned to {tuned['numWorkers']}); generation 3."
    )
    assert_settled(sim)


def test_removed_field_returns_to_its_default() -> None:
    sim = simulate({**WIDE, "maxQueue": 10}, load=lambda _: 20.0).run(10)
    sim.cluster.edit(spec_of(WIDE))
    sim.run(6)
    assert sim.promoted.config == WIDE
    assert {value(engine.config, "maxQueue") for engine in sim.cluster.engines} == {256}
    settled_generations = {engine.generation for engine in sim.cluster.engines}
    assert settled_generations == {2}


def test_tuned_value_outside_new_bounds_returns_to_the_base_value() -> None:
    sim = promoted()
    tuned = sim.promoted.config
    sim.cluster.edit(spec_of(SMALL, knobs=[{"name": "numWorkers", "max": 3}]))
    sim.run(6)
    assert sim.promoted.config == {**tuned, "numWorkers": 2}
