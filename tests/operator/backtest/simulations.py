"""Simulations that the tests share, and what they all must end with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvpilot_operator.backtest.simulation import Simulation
from kvpilot_operator.tuning.assess.objectives import backlog_gone, latency_met, met_again
from kvpilot_operator.tuning.configuration import value
from kvpilot_operator.tuning.state import Phase

SMALL = {"numWorkers": 2, "batchSize": 2}
WIDE = {"numWorkers": 16, "batchSize": 16}
SCALING = {"min": 1, "max": 6}


OWN = ("load", "model", "start_s", "seed", "keep", "faults")
"""Options of ``Simulation``."""


def overload(seconds: float) -> float:
    """20 requests/s, and after 60 s what two workers per engine cannot hold but the device can."""
    return 20.0 if seconds < 60 else 120.0


def spec_of(
    config: Mapping[str, Any],
    *,
    replicas: int = 3,
    scaling: Mapping[str, Any] | None = None,
    objectives: Mapping[str, Any] | None = None,
    **tuning: Any,
) -> dict[str, Any]:
    """A spec at Fast pace; ``spec.replicas`` unless there is ``scaling``; no hit-rate target unless given."""
    return {
        "engine": {"config": dict(config)},
        "objectives": {"hitRate": "0%", **(objectives or {})},
        "tuning": {"mode": "Auto", "pace": "Fast", **tuning},
        **({"replicas": replicas} if scaling is None else {"scaling": dict(scaling)}),
    }


def simulate(config: Mapping[str, Any], *, replicas: int = 3, **options: Any) -> Simulation:
    """A simulation; options are those of ``Simulation`` and of ``spec_of``."""
    own = {
        name: options.pop(name)
        for name in ("load", "model", "start_s", "seed", "keep", "faults")
        if name in options
    }
    manifest = {
        "apiVersion": "kvpilot.io/v1alpha1",
        "kind": "KVCacheDeployment",
        "metadata": {"name": "chat", "namespace": "default", "uid": "u", "generation": 1},
        "spec": spec_of(config, replicas=replicas, **options),
    }
    return Simulation(manifest, replicas=replicas, **own)


def in_verify(**options: Any) -> Simulation:
    """A breach by too few workers, while its cure is compared with the controls."""
    sim = simulate(SMALL, load=overload, **options)
    sim.run(200, until=lambda s: s.state.phase is Phase.VERIFY)
    assert sim.state.phase is Phase.VERIFY
    return sim


def promoted() -> Simulation:
    """The same after the cure was promoted."""
    sim = simulate(SMALL, load=overload)
    sim.run(240, until=lambda s: s.promoted.generation == 2 and s.state.change is None)
    return sim


def recovered(sim: Simulation) -> bool:
    """True if the last three ticks met every latency objective and the queues are short."""
    engines, workers = sim.cluster.engines, value(sim.promoted.config, "numWorkers")
    last = [latency_met(decision.objectives) for _, decision in sim.decisions[-3:]]
    waiting = sum(len(engine.waiting) for engine in engines)
    return met_again(last) is not None and backlog_gone(waiting, len(engines), workers)


def assert_settled(sim: Simulation) -> None:
    """No change is in flight, and every engine runs what the ConfigMap holds."""
    assert sim.state.change is None
    assert {engine.generation for engine in sim.cluster.engines} == {sim.promoted.generation}
    for engine in sim.cluster.engines:
        assert {name: engine.config[name] for name in sim.promoted.config} == sim.promoted.config
