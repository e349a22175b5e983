"""The controllers that kvpilot is compared with, against the rules that their documentation gives."""

from __future__ import annotations

from typing import Any

import pytest
from tests.operator.backtest.simulations import SMALL, WIDE, spec_of

from kvpilot_operator.backtest import baselines
from kvpilot_operator.backtest.baselines import (
    Fixed,
    Hpa,
    Keda,
    Oracle,
    Planner,
    RandomSearch,
    Stabilized,
    Vpa,
)
from kvpilot_operator.backtest.faults import TimedFault
from kvpilot_operator.backtest.simulation import START, Controller, Simulation


def play(controller: Controller, seconds: float = 300, **options: Any) -> Simulation:
    config = options.pop("config", WIDE)
    manifest = {
        "apiVersion": "kvpilot.io/v1alpha1",
        "kind": "KVCacheDeployment",
        "metadata": {"name": "chat", "namespace": "default", "uid": "u", "generation": 1},
        "spec": spec_of(config, scaling={"min": 1, "max": 10}),
    }
    return Simulation(manifest, controller=controller, **options).run(seconds)


def scaled(sim: Simulation) -> list[tuple[int, int]]:
    return [(before, after) for _, before, after in sim.cluster.scalings]


def test_fixed_replicas_are_never_changed() -> None:
    sim = play(Fixed(), replicas=2, load=lambda _: 200.0)
    assert (scaled(sim), sim.records) == ([], [])


def test_hpa_asks_for_the_ratio_of_metric_and_target() -> None:
    # 66 requests/s on one engine with 4 steps of 17 ms each: some 3 in work, so 3 replicas for 1 of each.
    sim = play(
        Hpa(Stabilized(1, 10), "inside", 2.0), replicas=1, load=lambda _: 90.0, seconds=30, start_s=1000
    )
    inside = sum(engine.inside for engine in sim.cluster.engines)
    assert scaled(sim)[0][0] == 1
    assert 2 <= sim.cluster.desired_replicas <= 1 + inside


@pytest.mark.parametrize(("share", "changed"), [(1.0, False), (0.6, True)])
def test_hpa_within_its_tolerance_does_nothing(share: float, changed: bool) -> None:
    measured = play(Fixed(), replicas=4, load=lambda _: 80.0)
    windows = [item.windows["w"] for item in measured.cluster.measured({"w": 240.0}).values()]
    busy = sum(window.busy_seconds / window.replica_seconds for window in windows) / 4
    sim = play(Hpa(Stabilized(1, 10), "busy", share * busy), replicas=4, load=lambda _: 80.0)
    assert bool(scaled(sim)) is changed


def test_replicas_fall_by_the_highest_wish_of_five_minutes() -> None:
    sim = play(Hpa(Stabilized(1, 10)), replicas=6, load=lambda t: 200.0 if t < 120 else 5.0, seconds=600)
    down = [at - START for at, before, after in sim.cluster.scalings if after < before]
    assert down and down[0] >= 120 + 280


def test_replicas_double_at_most_or_grow_by_four() -> None:
    scale = Stabilized(1, 100)
    sim = play(Fixed(), replicas=1, seconds=2, load=lambda _: 0.0)
    for expected in (5, 10, 20):
        scale.set(sim, 1000)
        assert sim.cluster.desired_replicas == expected


def test_keda_sees_a_queue_only_when_it_polls() -> None:
    sim = play(Keda(Stabilized(1, 4)), replicas=1, config=SMALL, load=lambda _: 60.0, seconds=120, start_s=5)
    times = {at - START for at, *_ in sim.cluster.scalings}
    assert times and times <= {15.0, 45.0, 75.0, 105.0}


def test_planner_foretells_a_ramp() -> None:
    planner = Planner(Stabilized(1, 20), profile=50.0, use=0.8)
    sim = play(planner, replicas=2, load=lambda t: 20 + t / 10, seconds=720)
    # After 720 s the mean of the last interval is 83/s; the line adds 18: 101 / 40 = 3 replicas.
    assert sim.cluster.desired_replicas == 3


def test_vpa_sizes_for_the_ninetieth_percentile_and_15_percent() -> None:
    sim = play(Vpa(), replicas=2, config=SMALL, load=lambda _: 80.0, seconds=400)
    workers = sim.promoted.config["numWorkers"]
    assert workers > SMALL["numWorkers"]
    assert {engine.config["numWorkers"] for engine in sim.cluster.engines} == {workers}
    assert scaled(sim) == []


def test_random_search_makes_its_trials_and_keeps_the_best() -> None:
    search = RandomSearch(Hpa(Stabilized(1, 3)), trials=2, hold_s=30.0, seed=3, edge_s=0.5)
    sim = play(search, replicas=2, config=SMALL, load=lambda _: 60.0, seconds=200)
    assert sim.promoted.generation == 1 + 2 + 1, "two trials, and the best of all again"
    assert search._best is not None
    assert search._best[1].items() <= sim.promoted.config.items()


def test_oracle_asks_before_the_load_comes() -> None:
    sim = play(Oracle([2, 2, 2, 5, 5, 2, 2, 2], start_s=30.0), replicas=2, seconds=420)
    asked = [(at - START, after) for at, _, after in sim.cluster.scalings]
    assert asked[0] == (90.0, 5), "a minute and the start-up time before"
    assert asked[-1][1] == 2


@pytest.mark.parametrize(
    "controller", [Hpa(Stabilized(1, 10)), Keda(Stabilized(1, 10)), Planner(Stabilized(1, 9), 5)]
)
def test_no_baseline_acts_without_metrics(controller: Controller) -> None:
    sim = play(controller, replicas=3, load=lambda _: 200.0, faults=[TimedFault("outage", 0.0, 1e6)])
    assert scaled(sim) == []


def test_searched_knobs_are_drawn_within_their_bounds() -> None:
    search = RandomSearch(Hpa(Stabilized(1, 3)), trials=50, hold_s=2.0, seed=3, edge_s=0.5, tick=2.0)
    sim = play(search, replicas=2, seconds=120)
    config = sim.promoted.config
    assert set(baselines.SEARCHED) <= set(config)
    assert 1 <= config["numWorkers"] <= 128 and 1 <= config["batchSize"] <= 256
