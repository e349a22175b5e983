"""The operator crashes, the status is lost, an engine restarts."""

from __future__ import annotations

import copy
import itertools
from typing import Any

from tests.operator.backtest.simulations import (
    SMALL,
    assert_settled,
    in_verify,
    overload,
    promoted,
    simulate,
)

from kvpilot_operator.backtest.simulation import Simulation
from kvpilot_operator.tuning.decision import Push
from kvpilot_operator.tuning.observation import Promoted


def test_crash_before_any_effect_still_ends_promoted() -> None:
    """The operator dies before its n-th write, for every n: the next one goes on from what is there."""
    at_breach = simulate(SMALL, load=overload).run(58)
    effects = 0

    def count() -> bool:
        nonlocal effects
        effects += 1
        return False

    free = copy.deepcopy(at_breach)
    free.cluster.crash = count
    free.run(100, until=lambda s: s.promoted.generation == 2 and s.state.change is None)
    assert free.promoted.generation == 2, free.report()
    assert effects >= 10
    for fatal in range(1, effects + 1):
        left = fatal

        def dies() -> bool:
            nonlocal left
            left -= 1
            return left == 0

        sim = copy.deepcopy(at_breach)
        sim.cluster.crash = dies
        sim.run(110, until=lambda s: s.promoted.generation == 2 and s.state.change is None)
        assert sim.promoted.config["numWorkers"] > 2, (fatal, sim.report())
        assert_settled(sim)


def test_lost_status_restarts_from_the_config_map_after_one_cooldown() -> None:
    sim = in_verify()
    sim.cluster.lose_status()
    sim.run(4)
    assert sim.state.cooldown_until > sim.cluster.now
    assert sim.state.last_generation == 2, "the canary's generation is not used again"
    assert sim.state.next_decision == 2, "nor the number of its decision"
    assert (sim.promoted.config, sim.promoted.generation) == (SMALL, 1)
    assert sim.outcomes() == ["Started"], "nothing is recorded as the user's edit"
    assert_settled(sim)


def test_lost_status_keeps_the_promoted_configuration() -> None:
    sim = simulate(SMALL, load=overload)
    sim.run(240, until=lambda s: s.promoted.generation == 2 and s.state.change is None)
    tuned = sim.promoted.config
    assert tuned["numWorkers"] > 2
    sim.cluster.lose_status()
    sim.run(4)
    assert sim.promoted.config == tuned
    assert {(o.knob, o.based_on, o.value) for o in sim.state.overlay} == {
        ("numWorkers", 2, tuned["numWorkers"]),
        ("batchSize", 2, tuned["batchSize"]),
    }
    assert [hold.reason for hold in sim.state.holds] == ["Cooldown"]
    assert_settled(sim)


def test_deleted_config_map_comes_back_with_what_was_promoted() -> None:
    sim = promoted()
    before = sim.promoted
    told, decided = len(sim.records), len(sim.decisions)
    sim.cluster.promoted = None
    sim.run(4)
    assert sim.promoted == before, "and not as generation 1 with the user's base"
    assert len(sim.records) == told, "nothing is recorded as the user's edit"
    actions = [action for _, decision in sim.decisions[decided:] for action in decision.actions]
    assert not [action for action in actions if isinstance(action, Push)], "engines run it already"
    assert_settled(sim)


def edited(sim: Simulation, **config: Any) -> None:
    """The user changes fields of the base."""
    spec = copy.deepcopy(dict(sim.cluster.manifest["spec"]))
    spec["engine"]["config"] |= config
    sim.cluster.edit(spec)


def test_edit_that_meets_a_lost_status_wins_and_leaves_other_tuned_values() -> None:
    sim = promoted()
    batch = sim.promoted.config["batchSize"]
    assert batch > 2
    edited(sim, numWorkers=3, maxTokens=16384)
    sim.cluster.lose_status()
    sim.run(6)
    assert sim.promoted.config == {**SMALL, "numWorkers": 3, "maxTokens": 16384, "batchSize": batch}
    assert {(o.knob, o.based_on, o.value) for o in sim.state.overlay} == {("batchSize", 2, batch)}
    (reset,) = [record for record in sim.records if record.outcome == "Reset"]
    assert reset.summary == (
        "The user's configuration changed in maxTokens, numWorkers; back to the user's value: "
        f"numWorkers (tuned to {batch}); generation {sim.promoted.generation}."
    )
    assert_settled(sim)


def _dies_without_status(sim: Simulation, fatal: int) -> None:
    """Let the operator die before its n-th effect, and the status be lost then."""
    effects = itertools.count(1)

    def dies() -> bool:
        if dead := next(effects) == fatal:
            sim.cluster.lose_status()
        return dead

    sim.cluster.crash = dies


def test_edit_wins_although_the_status_is_lost_before_any_effect() -> None:
    """The operator dies before its n-th write after the edit, and the status is lost with it, for every n."""
    at_edit = promoted()
    edited(at_edit, numWorkers=3, maxTokens=16384)
    wanted = {**at_edit.promoted.config, "numWorkers": 3, "maxTokens": 16384}
    for fatal in range(1, 14):
        sim = copy.deepcopy(at_edit)
        _dies_without_status(sim, fatal)
        sim.run(20)
        assert sim.promoted.config == wanted, (fatal, sim.report())
        assert {(o.knob, o.based_on) for o in sim.state.overlay} == {("batchSize", 2)}, fatal
        assert sim.cluster.accepted is not None
        assert sim.cluster.accepted.spec == sim.cluster.manifest["spec"]
        assert_settled(sim)


def test_generations_go_on_from_the_engines_when_status_and_config_map_are_lost() -> None:
    sim = promoted()
    edited(sim, gcThreshold=0.7)
    sim.run(4)
    before = sim.promoted.generation
    assert before == 3
    sim.cluster.lose_status()
    sim.cluster.promoted = sim.cluster.accepted = None
    sim.cluster.records.clear()
    sim.run(4)
    assert sim.promoted.config == {**SMALL, "gcThreshold": 0.7}, "what was tuned is lost"
    assert sim.promoted.generation > before, "no generation names two configurations"
    assert_settled(sim)


def test_edit_that_meets_a_lost_config_map_is_a_generation_of_its_own() -> None:
    sim = promoted()
    before = sim.promoted
    edited(sim, maxTokens=16384)
    sim.cluster.promoted = sim.cluster.accepted = None
    sim.run(4)
    assert sim.promoted == Promoted(before.generation + 1, {**before.config, "maxTokens": 16384})
    assert sim.outcomes()[-1] == "Reset"
    assert_settled(sim)


def test_engine_with_an_old_configuration_gets_the_promoted_one() -> None:
    sim = promoted()
    sim.cluster.engines[1].config, sim.cluster.engines[1].generation = dict(SMALL), 1
    sim.run(2)
    assert_settled(sim)
