"""One scene, several controllers, many seeds: what each was worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from kvpilot_operator.backtest import baselines
from kvpilot_operator.backtest.faults import TimedFault
from kvpilot_operator.backtest.parallel import in_parallel
from kvpilot_operator.backtest.scenes import SYNTHETIC, USE, LoadSpec, Scene, SyntheticName, scene_of
from kvpilot_operator.backtest.score import Judge, Windows, reversals, score, wrong_direction
from kvpilot_operator.backtest.simulation import START, Controller, Simulation
from kvpilot_operator.options import OptionError

TUNED = "kvpilot"

START_S, START_SPREAD = 60.0, 0.25
"""From the creation of a pod until it is ready, s, and the standard deviation of its log."""

TRIALS = 4
"""Trials of the random search where kvpilot did not play the same seed."""

TRAINING_SEED = 100_001
"""Seeds from here on are for training only."""

WEIGHT = 3.0
"""The lambda at which parameters are chosen."""

ORACLE_USES = (0.6, 0.7, 0.8, 0.9, 1.0)
"""The oracle picks the best of these in hindsight."""


@dataclass(frozen=True)
class ContestRun:
    """One controller on one seed. ``parameters`` are those of the controller, "" for its defaults."""

    manifest: Mapping[str, Any]
    scene: Scene
    controller: str
    parameters: str
    seed: int
    start_s: float = START_S
    faults: tuple[TimedFault, ...] = ()
    sticky: bool = False
    trials: int = TRIALS


Row = dict[str, Any]

DEFAULTS: Mapping[str, str] = {
    "hpa": "busy:0.8",
    "keda": "waiting:5",
    "dynamo": f"{USE:g}",
    "vpa": "0.9",
    "static-mean": "",
    "static-peak": "",
    "random-search": "busy:0.8",
    "oracle": "",
    "do-nothing": "",
    "always-max": "",
}
"""Every baseline with its default parameters: metric and target, use of a replica, percentile."""

GRID: Mapping[str, tuple[str, ...]] = {
    "hpa": (
        *(f"busy:{target}" for target in (0.5, 0.65, 0.8, 0.9)),
        *(f"inside:{target}" for target in (2, 3, 4, 6, 8, 12)),
    ),
    "keda": (
        *(f"waiting:{target}" for target in (0.5, 1, 2, 5, 10)),
        *(f"inside:{target}" for target in (2, 3, 4, 6, 8, 12)),
    ),
    "dynamo": ("0.6", "0.7", "0.8", "0.9"),
    "vpa": ("0.9", "0.95", "0.99"),
}
"""Parameters that training chooses from."""


def parse_against(text: str) -> tuple[str, ...]:
    """``hpa,keda``: the baselines to play against.

    Raises:
        OptionError: a name is unknown.
    """
    names = tuple(dict.fromkeys(item.strip() for item in text.split(",") if item.strip()))
    for name in names:
        if name not in DEFAULTS and name != TUNED:
            raise OptionError(f"--against: must be of {', '.join(DEFAULTS)}, got {name}")
    return tuple(name for name in names if name != TUNED)


def parse_loads(text: str) -> tuple[SyntheticName, ...]:
    """``step,ramp``: synthetic loads to play in turn.

    Raises:
        OptionError: a name is unknown, or none is given.
    """
    names = tuple(dict.fromkeys(item.strip() for item in text.split(",")))
    known: dict[str, SyntheticName] = {name: name for name in SYNTHETIC}
    for name in names:
        if name not in known:
            raise OptionError(f"--load: must be of {', '.join(SYNTHETIC)}, got {name or 'nothing'}")
    return tuple(known[name] for name in names)


def play(run: ContestRun) -> Row:
    """Play one run and score it."""
    if run.controller != "oracle":
        return _play(run)
    rows = [_play(replace(run, parameters=str(use))) for use in ORACLE_USES]
    return min(rows, key=lambda row: score(row, WEIGHT))


def _play(run: ContestRun) -> Row:
    scene = run.scene
    replicas, controller = _controller(run, scene)
    judge = Judge(scene.objectives, START, START + scene.seconds, scene.pace)
    sim = Simulation(
        prepared(run.manifest),
        replicas=replicas,
        requests=scene.requests(run.seed),
        model=scene.device.model(),
        start_s=run.start_s,
        start_spread=START_SPREAD if run.start_s else 0.0,
        sticky=run.sticky,
        on_ended=judge.add,
        controller=controller,
        faults=run.faults,
        seed=run.seed,
    )
    sim.run(scene.seconds)
    latest = max((edge for edge, _ in scene.objectives.latency.values()), default=0.0)
    judge.add(sim.unfinished(latest))
    return _row(run, sim, judge.windows())


def _row(run: ContestRun, sim: Simulation, windows: Windows) -> Row:
    outcomes = sim.outcomes()
    held = sum(1 for _, decision in sim.decisions if decision.state.holds)
    return {
        "controller": run.controller,
        "seed": run.seed,
        "violation_minutes": windows.violation_minutes,
        "gpu_hours": sim.cluster.paid_s() / 3600.0,
        "time_to_cure_s": windows.time_to_cure_s,
        "reversals": reversals(sim.cluster.scalings) + outcomes.count("Reverted"),
        "wrong_direction": wrong_direction(sim.cluster.scalings, windows),
        "hold_minutes": held * run.scene.pace.tick / 60.0 if run.controller == TUNED else 0.0,
        "trials": outcomes.count("Started"),
        "parameters": run.parameters,
    }


def prepared(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest as the API server holds it, in mode Auto."""
    spec = manifest["spec"]
    metadata = {"namespace": "default", "uid": "u", "generation": 1, **manifest["metadata"]}
    tuning = {**(spec.get("tuning") or {}), "mode": "Auto"}
    return {**manifest, "metadata": metadata, "spec": {**spec, "tuning": tuning}}


def _controller(run: ContestRun, scene: Scene) -> tuple[int, Controller | None]:
    """Replicas at the start, and what manages them; None is kvpilot."""
    least, most, parameters = scene.replicas_at_start, scene.most, run.parameters
    made: Mapping[str, Callable[[], tuple[int, Controller | None]]] = {
        TUNED: lambda: (least, None),
        "hpa": lambda: (least, _hpa(scene, parameters)),
        "keda": lambda: (least, baselines.Keda(_scale(scene), *_metric(parameters))),
        "dynamo": lambda: (
            least,
            baselines.Planner(_scale(scene), scene.capacity, float(parameters)),
        ),
        "vpa": lambda: (least, baselines.Vpa(float(parameters))),
        "static-mean": lambda: (min(most, scene.replicas_for(scene.mean)), baselines.Fixed()),
        "static-peak": lambda: (min(most, scene.replicas_for(scene.peak)), baselines.Fixed()),
        "always-max": lambda: (most, baselines.Fixed()),
        "do-nothing": lambda: (scene.least, baselines.Fixed()),
        "random-search": lambda: (least, _search(run, scene)),
        "oracle": lambda: _oracle(run, scene),
    }
    return made[run.controller]()


def _scale(scene: Scene) -> baselines.Stabilized:
    return baselines.Stabilized(scene.least, scene.most)


def _metric(parameters: str) -> tuple[str, float]:
    metric, target = parameters.split(":")
    return metric, float(target)


def _hpa(scene: Scene, parameters: str) -> baselines.Hpa:
    return baselines.Hpa(_scale(scene), *_metric(parameters))


def _search(run: ContestRun, scene: Scene) -> baselines.RandomSearch:
    edges = [edge for name, (edge, _) in scene.objectives.latency.items() if name == "p95"]
    edge = edges[0] if edges else max((e for e, _ in scene.objectives.latency.values()), default=1.0)
    hold = scene.pace.settle + scene.pace.verify
    return baselines.RandomSearch(_hpa(scene, run.parameters), run.trials, hold, run.seed, edge)


def _oracle(run: ContestRun, scene: Scene) -> tuple[int, Controller]:
    needed = scene.needed(run.seed, float(run.parameters))
    return max(needed[:2]), baselines.Oracle(needed, run.start_s)


def contest(
    base: ContestRun, against: Sequence[str], seeds: Sequence[int], parameters: Mapping[str, str]
) -> Iterator[Row]:
    """All runs of kvpilot and the baselines; the random search gets as many trials as kvpilot made."""
    first = [TUNED, *(name for name in against if name != "random-search")]
    jobs = [
        replace(base, controller=name, parameters=parameters.get(name, ""), seed=seed)
        for name in first
        for seed in seeds
    ]
    trials: dict[int, int] = {}
    for row in in_parallel(play, jobs):
        if row["controller"] == TUNED:
            trials[row["seed"]] = row["trials"]
        yield row
    if "random-search" in against:
        search = replace(base, controller="random-search", parameters=parameters["random-search"])
        yield from in_parallel(play, [replace(search, seed=s, trials=trials.get(s, TRIALS)) for s in seeds])


def train(base: ContestRun, against: Sequence[str]) -> Iterator[tuple[str, str, float]]:
    """The parameters of each baseline with the best score over the synthetic loads on other seeds.

    Yields name, parameters and score of every candidate.
    """
    scenes = [scene_of(base.manifest, LoadSpec(synthetic=load)) for load in SYNTHETIC]
    grid = [(name, given) for name in against for given in GRID.get(name, ())]
    jobs = [
        replace(base, scene=scene, controller=name, parameters=given, seed=TRAINING_SEED + index, faults=())
        for name, given in grid
        for index, scene in enumerate(scenes)
    ]
    rows = in_parallel(play, jobs)
    for name, given in grid:
        yield name, given, fmean(score(next(rows), WEIGHT) for _ in SYNTHETIC)


def best(candidates: Sequence[tuple[str, str, float]]) -> dict[str, str]:
    """The parameters with the least score by name."""
    found: dict[str, tuple[float, str]] = {}
    for name, given, points in candidates:
        if points < found.get(name, (math.inf, ""))[0]:
            found[name] = (points, given)
    return {name: given for name, (_, given) in found.items()}
