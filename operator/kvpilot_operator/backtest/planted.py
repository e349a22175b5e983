"""Planted changes: what the tuner concludes of a knob that does nothing, harms, or helps.

Every run plays the manifest with too few workers, so that the tuner proposes more of them. A fault of the
simulated device decides what more of them really does. The load rises to 0.9, 1.0 or 1.1 of the capacity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from kvpilot_operator.backtest.devices import Device, Work
from kvpilot_operator.backtest.loads import Mix, step, synthetic
from kvpilot_operator.backtest.model import Fault
from kvpilot_operator.backtest.simulation import Simulation
from kvpilot_operator.resource.model import KVCacheDeployment
from kvpilot_operator.resource.resolve import objectives_of
from kvpilot_operator.tuning.configuration import DEFAULTS, value
from kvpilot_operator.tuning.decision import Record
from kvpilot_operator.tuning.pace import PACES, Pace, PaceName

WORKERS = 2
"""Workers of a planted deployment: too few for its load."""

UTILISATIONS = (0.9, 1.0, 1.1)
"""Load over capacity, by run in turn."""

CALM = 0.5
"""Load over capacity before it rises."""

CAPACITY_KNOBS = ("numWorkers", "batchSize", "maxStepTokens")
"""Knobs whose growth the fault catches."""

ENDS = ("Promoted", "Reverted", "Aborted")

Planted = Literal["aa", "regression", "gain"]


@dataclass(frozen=True)
class PlantedRun:
    """One run.

    Attributes:
        factor: what a regression multiplies the step time by, or what a gain divides it by.
        errors: share of the requests that the change makes fail as well.
        broken_sessions: share of the sessions that fail with or without it.
    """

    manifest: Mapping[str, Any]
    planted: Planted
    factor: float
    replicas: int
    pace: PaceName
    sticky: bool
    seed: int
    utilisation: float
    errors: float = 0.0
    broken_sessions: float = 0.0


@dataclass(frozen=True)
class PlantedResult:
    """How a run ended: the verdict ("" while open, "NotStarted" without a change), and s from push to it.

    ``in_force``: at the end the candidate runs on every replica.
    """

    verdict: str
    outcome: str
    seconds: float | None
    in_force: bool
    report: str


def runs_of(
    manifest: Mapping[str, Any],
    planted: Planted,
    factor: float,
    runs: int,
    *,
    replicas: int | None,
    pace: PaceName | None,
    sticky: bool,
    seed: int,
) -> list[PlantedRun]:
    """The runs: seeds differ, and the load over capacity takes its values in turn.

    Raises:
        ManifestError: the manifest is invalid.
    """
    spec = KVCacheDeployment.parse(manifest).spec
    least = spec.scaling.minimum if spec.scaling is not None else spec.replicas or 1
    return [
        PlantedRun(
            manifest,
            planted,
            factor,
            replicas or max(2, least),
            pace or spec.tuning.pace,
            sticky,
            seed + index,
            UTILISATIONS[index % len(UTILISATIONS)],
        )
        for index in range(runs)
    ]


def play(run: PlantedRun) -> PlantedResult:
    """Play one run until its first change has ended."""
    manifest = planted_manifest(run)
    pace = PACES[run.pace]
    sim = _simulation(run, manifest, pace)
    sim.run(_length(pace), until=_over)
    return _result(sim)


def _simulation(run: PlantedRun, manifest: Mapping[str, Any], pace: Pace) -> Simulation:
    spec = KVCacheDeployment.parse(manifest).spec
    objectives, config = objectives_of(spec), manifest["spec"]["engine"]["config"]
    mix = Mix()
    work = Work(mix.prompt * (1 - mix.cached), mix.out)
    device = Device.fitting([work], objectives)
    full = device.capacity(work, config) * run.replicas
    calm = _calm_s(pace)
    load = synthetic(step(CALM * full, run.utilisation * full, calm), _length(pace), mix, run.seed)
    return Simulation(
        manifest,
        replicas=run.replicas,
        requests=load,
        model=device.model(_fault(run, config)),
        sticky=run.sticky,
        seed=run.seed,
    )


def _fault(run: PlantedRun, config: Mapping[str, Any]) -> Fault:
    above = {knob: float(value(config, knob)) for knob in CAPACITY_KNOBS}
    slower = {"aa": 1.0, "regression": run.factor, "gain": 1 / run.factor}[run.planted]
    return Fault(above, slower=slower, errors=run.errors, inert=True, broken_sessions=run.broken_sessions)


def planted_manifest(run: PlantedRun) -> dict[str, Any]:
    """The manifest with few workers, a fixed number of replicas, and mode Auto."""
    spec = dict(run.manifest["spec"])
    spec.pop("scaling", None)
    engine = dict(spec.get("engine") or {})
    config = {**(engine.get("config") or {}), "numWorkers": WORKERS}
    config["batchSize"] = max(WORKERS, int(config.get("batchSize", DEFAULTS["batchSize"])))
    tuning = {**(spec.get("tuning") or {}), "mode": "Auto", "pace": run.pace}
    spec |= {"replicas": run.replicas, "engine": {**engine, "config": config}, "tuning": tuning}
    metadata = {"namespace": "default", "uid": "u", "generation": 1, **run.manifest["metadata"]}
    return {**run.manifest, "metadata": metadata, "spec": spec}


def _calm_s(pace: Pace) -> float:
    return pace.long + 3 * pace.short


def _length(pace: Pace) -> float:
    return _calm_s(pace) + 3 * pace.long + 5 * pace.verify + pace.settle


def _over(sim: Simulation) -> bool:
    """True once a change was judged, nothing is in flight, and no watch is open."""
    ended = bool(sim.records) and sim.records[-1].outcome in ENDS
    if not ended:
        return False
    state = sim.state
    return state.change is None and getattr(state, "watch", None) is None


def _result(sim: Simulation) -> PlantedResult:
    tried = [record for record in sim.records if record.outcome in ("Started", *ENDS)]
    report = sim.report()
    if not tried:
        return PlantedResult("NotStarted", "", None, in_force=False, report=report)
    began, last = tried[0], tried[-1]
    if last.outcome not in ENDS:
        return PlantedResult("", "", None, in_force=False, report=report)
    return PlantedResult(
        str(last.evidence.get("verdict", last.outcome)),
        last.outcome,
        last.at - began.at,
        in_force=_in_force(sim, began),
        report=report,
    )


def _in_force(sim: Simulation, began: Record) -> bool:
    wanted = {change.knob: change.after for change in began.changes}
    return all(
        value(engine.config, knob) == after
        for engine in sim.cluster.engines
        for knob, after in wanted.items()
    )


def summary(results: Sequence[PlantedResult]) -> dict[str, Any]:
    """What ``--json`` writes. ``caught``: reverted or aborted, and in force on no whole fleet at the end."""
    took = [result.seconds for result in results if result.seconds is not None]

    def count(verdict: str) -> int:
        return sum(result.verdict == verdict for result in results)

    return {
        "runs": len(results),
        "promoted": sum(result.outcome == "Promoted" for result in results),
        "harmful": count("Harmful"),
        "no_gain": count("NoGain"),
        "aborted": sum(result.outcome == "Aborted" for result in results),
        "caught": sum(r.outcome in ("Reverted", "Aborted") and not r.in_force for r in results),
        "median_s": median(took) if took else None,
        "inconclusive": count("Inconclusive"),
        "open": count(""),
        "not_started": count("NotStarted"),
    }
