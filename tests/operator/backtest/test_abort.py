"""Events that end an experiment without a verdict on its value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.operator.backtest.simulations import (
    SMALL,
    WIDE,
    assert_settled,
    in_verify,
    simulate,
    spec_of,
)
from tests.operator.tuning.observations import DOWN

from kvpilot_operator.backtest.model import EngineModel, Fault
from kvpilot_operator.backtest.simulation import Simulation
from kvpilot_operator.tuning.configuration import value
from kvpilot_operator.tuning.state import Phase

VERIFY_S, LONG_S = 45.0, 60.0


def delete_pod(sim: Simulation, *, canary: bool) -> None:
    """The canary, or one of its controls, is deleted; the workload replaces it."""
    change = sim.state.change
    assert change is not None
    engines = sim.cluster.engines
    engines.remove(next(item for item in engines if (item.uid == change.canary_uid) == canary))
    sim.cluster.converge(sim.cluster.now + 5)


ABORTS: list[tuple[str, Callable[[Simulation], Any], str]] = [
    ("CanaryLost", lambda s: delete_pod(s, canary=True), "the canary is gone"),
    ("ControlLost", lambda s: delete_pod(s, canary=False), "a control is gone"),
    (
        "ReplicaRestarted",
        lambda s: s.cluster.engines[2].restart(s.promoted),
        "a replica of the experiment restarted",
    ),
    ("Paused", lambda s: setattr(s.cluster, "paused_by", "stop"), "override stop is in force"),
    ("ModeChanged", lambda s: s.cluster.edit(spec_of(SMALL, mode="Off")), "the mode is Off"),
    ("SpecChanged", lambda s: s.cluster.edit(spec_of({**SMALL, "maxTokens": 8192})), "the user changed the"),
]


@pytest.mark.parametrize(("reason", "happen", "message"), ABORTS, ids=[item[0] for item in ABORTS])
def test_abort_names_its_reason_and_blocks_no_value(
    reason: str, happen: Callable[[Simulation], Any], message: str
) -> None:
    sim = in_verify()
    happen(sim)
    sim.run(10)
    aborted = next(record for record in sim.records if record.outcome == "Aborted")
    assert f"was aborted ({reason}: {message}" in aborted.summary
    assert aborted.evidence["verdict"] == reason
    assert sim.state.blocked_values == sim.state.reversals == ()
    assert sim.promoted.config["numWorkers"] == 2
    assert_settled(sim)


LOADING = EngineModel(tier_s=lambda c: 4.0 / (4 + value(c, "prefetchSize")), prefetched=lambda c: (2.0, 0.1))


def test_an_outage_while_it_settles_is_waited_for() -> None:
    sim = simulate(WIDE, load=lambda _: 30.0, model=LOADING)
    sim.run(120, until=lambda s: s.state.phase is Phase.SETTLE)
    sim.cluster.metrics_problem = DOWN
    sim.run(6 * VERIFY_S)
    assert (sim.state.phase, sim.outcomes()) == (Phase.SETTLE, ["Started"])
    sim.cluster.metrics_problem = None
    sim.run(4 * VERIFY_S, until=lambda s: len(s.records) > 1)
    assert sim.outcomes()[1] == "Promoted", sim.report()


def test_an_outage_without_end_ends_it() -> None:
    sim = simulate(WIDE, load=lambda _: 30.0, model=LOADING)
    sim.run(120, until=lambda s: s.state.phase is Phase.SETTLE)
    sim.cluster.metrics_problem = DOWN
    sim.run(9 * VERIFY_S)
    assert sim.records[-1].evidence["verdict"] == "Unobserved", sim.report()
    assert DOWN.message in sim.records[-1].summary
    assert_settled(sim)


def test_a_candidate_that_hangs_is_taken_off_within_a_long_window() -> None:
    sim = in_verify(model=NO_EFFECT)
    change = sim.state.change
    assert change is not None
    next(engine for engine in sim.cluster.engines if engine.uid == change.canary_uid).hung = True
    sim.run(2 * LONG_S + 20, until=lambda s: len(s.records) > 1)
    assert sim.records[1].evidence["verdict"] == "CanaryStalled", sim.report()


NO_EFFECT = EngineModel(fault=Fault(above={"numWorkers": 2.0, "batchSize": 2.0}, inert=True))


def test_experiment_without_requests_blocks_no_value() -> None:
    sim = in_verify(model=NO_EFFECT)
    sim.load = lambda _: 0.5
    sim.run(240, until=lambda s: len(s.records) > 1)
    assert sim.outcomes()[1] in {"Aborted", "Reverted"}, sim.report()
    assert sim.records[1].evidence["verdict"] in {"BreachGone", "TooFewRequests", "Inconclusive"}
    assert sim.state.blocked_values == ()


def test_breach_that_ends_by_itself_promotes_nothing() -> None:
    sim = simulate(SMALL, load=lambda t: 120.0 if 60 <= t < 66 else 20.0, model=NO_EFFECT)
    sim.run(260, until=lambda s: s.state.phase is Phase.COOLDOWN)
    assert sim.outcomes()[0] == "Started"
    assert sim.records[-1].evidence["verdict"] in {"BreachGone", "NoGain"}, sim.report()
    assert_settled(sim)


def test_metrics_outage_during_an_experiment_aborts_it() -> None:
    sim = in_verify()
    sim.cluster.metrics_problem = DOWN
    sim.run(240, until=lambda s: s.state.change is None)
    assert sim.outcomes() == ["Started"], "it is waited for"
    sim.run(240, until=lambda s: s.state.change is None)
    assert f"(Unobserved: it could not be measured: {DOWN.message})" in sim.records[-1].summary
    assert sim.state.phase is Phase.HOLD
    assert_settled(sim)
