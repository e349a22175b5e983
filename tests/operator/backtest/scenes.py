"""One simulation for each way in which a decision can end, for tests of what is said of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tests.operator.backtest.simulations import SCALING, SMALL, WIDE, in_verify, overload, promoted, simulate

from kvpilot_operator.backtest.model import EngineModel, Fault
from kvpilot_operator.backtest.simulation import Simulation
from kvpilot_operator.tuning.configuration import value
from kvpilot_operator.tuning.observation import Approval, Boost, Pin, Rollback
from kvpilot_operator.tuning.state import Phase

HOUR = 3600.0
NO_EFFECT = EngineModel(fault=Fault(above={"numWorkers": 2.0, "batchSize": 2.0}, inert=True))


def harmful() -> Simulation:
    taxed = EngineModel(tax=lambda config: 0.08 if value(config, "numWorkers") > 2 else 0.0)
    sim = simulate(SMALL, load=overload, model=taxed)
    return sim.run(200, until=lambda s: s.state.phase is Phase.COOLDOWN)


def no_gain() -> Simulation:
    """Twice, so that the flap budget is spent."""
    return simulate(SMALL, load=overload, model=NO_EFFECT).run(400)


def inconclusive() -> Simulation:
    sim = in_verify(model=NO_EFFECT)
    sim.load = lambda _: 0.5
    return sim.run(240, until=lambda s: len(s.records) > 1)


def aborted() -> Simulation:
    sim = in_verify()
    sim.cluster.engines[2].restart(sim.promoted)
    return sim.run(10)


def emergency() -> Simulation:
    model = EngineModel(memory=lambda c: 0.6 + 0.4 * value(c, "batchSize") / 16)
    return simulate(WIDE, load=lambda _: 30.0, model=model).run(120)


def relieved() -> Simulation:
    model = EngineModel(memory=lambda c: 0.5 + 0.4 * min(1.0, (value(c, "maxMemoryMb") or 200) / 200))
    sim = simulate(WIDE, load=lambda _: 30.0, model=model)
    return sim.run(150, until=lambda s: s.state.phase is Phase.COOLDOWN)


def infeasible() -> Simulation:
    return simulate(
        WIDE,
        objectives={"latency": {"p50Ms": 100, "p95Ms": 30000, "p99Ms": 30000}},
        load=lambda _: 1.2,
        model=EngineModel(tokens=200.0),
        mode="Auto",
    ).run(400)


def scaled_out() -> Simulation:
    slow = EngineModel(step_s=lambda rows: 0.016 + 0.008 * rows)
    load = {False: 20.0, True: 240.0}
    return simulate(WIDE, scaling=SCALING, replicas=2, load=lambda t: load[t >= 60], model=slow).run(130)


def scaled_in() -> Simulation:
    sim = simulate(WIDE, scaling={"min": 2, "max": 6}, replicas=4, load=lambda t: 30.0 if t < 60 else 0.0)
    return sim.run(400)


def boosted() -> Simulation:
    sim = simulate(WIDE, scaling={"min": 1, "max": 6}, replicas=2, load=lambda _: 5.0)
    sim.cluster.boosts = (Boost("launch", 4, sim.cluster.now + 60),)
    return sim.run(30)


def rolled_back() -> Simulation:
    sim = promoted()
    sim.cluster.rollback = Rollback("undo", 1, "ada")
    return sim.run(30)


def refused() -> Simulation:
    sim = promoted()
    sim.cluster.rollback = Rollback("undo", 2, "ada")
    return sim.run(30)


def pinned() -> Simulation:
    sim = promoted()
    sim.cluster.pins = (Pin("mine", "numWorkers", 3, sim.cluster.now + 60),)
    return sim.run(10)


def unpinned() -> Simulation:
    return pinned().run(70)


def edited() -> Simulation:
    """A value of the user that takes the place of a tuned one."""
    sim = promoted()
    spec = sim.cluster.manifest["spec"]
    sim.cluster.edit({**spec, "engine": {"config": {**SMALL, "numWorkers": 12}}})
    return sim.run(20)


def proposed() -> Simulation:
    sim = simulate(SMALL, load=overload, mode="Approve")
    return sim.run(120, until=lambda s: bool(s.state.pending))


def approved() -> Simulation:
    sim = proposed()
    sim.cluster.approvals = (Approval("yes", sim.state.pending[0].id, "ada"),)
    return sim.run(120, until=lambda s: "Promoted" in s.outcomes() and s.state.change is None)


def withdrawn() -> Simulation:
    sim = proposed()
    spec = sim.cluster.manifest["spec"]
    sim.cluster.edit({**spec, "tuning": {**spec["tuning"], "mode": "Auto"}})
    return sim.run(20)


def recommended() -> Simulation:
    return simulate(SMALL, scaling=SCALING, mode="Recommend", load=overload).run(200)


SCENES: Mapping[str, tuple[Callable[[], Simulation], str]] = {
    "promoted": (promoted, "Promoted"),
    "harmful": (harmful, "Reverted"),
    "no gain": (no_gain, "Reverted"),
    "inconclusive": (inconclusive, "Aborted"),
    "aborted": (aborted, "Aborted"),
    "emergency": (emergency, "Emergency"),
    "memory relieved": (relieved, "Promoted"),
    "infeasible": (infeasible, "Infeasible"),
    "scaled out": (scaled_out, "ScaledOut"),
    "scaled in": (scaled_in, "ScaledIn"),
    "boosted": (boosted, "ScaledOut"),
    "rolled back": (rolled_back, "RolledBack"),
    "refused": (refused, "Refused"),
    "pinned": (pinned, "Pinned"),
    "unpinned": (unpinned, "Unpinned"),
    "edited": (edited, "Reset"),
    "proposed": (proposed, "Proposed"),
    "approved": (approved, "Promoted"),
    "withdrawn": (withdrawn, "Withdrawn"),
    "recommended": (recommended, "Recommended"),
}
"""By name: the simulation, and the outcome that one of its decisions has."""
