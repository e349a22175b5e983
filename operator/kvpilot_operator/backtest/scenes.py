"""A scene: manifest, load and device of a comparison. Every controller plays the same one for each seed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from kvpilot_operator.backtest.calibration import recorded_device
from kvpilot_operator.backtest.devices import UNLOADED_SHARES, Device, Work
from kvpilot_operator.backtest.engine import SimulatedEngine
from kvpilot_operator.backtest.loads import Mix, Rate, ramp, sine, spike, step, synthetic
from kvpilot_operator.backtest.model import SimulatedRequest
from kvpilot_operator.backtest.recording import is_recording, read_recording
from kvpilot_operator.backtest.traces import RecordedRequest, recorded, replayed
from kvpilot_operator.load.workload import LoadError
from kvpilot_operator.options import OptionError
from kvpilot_operator.resource.model import KVCacheDeployment
from kvpilot_operator.resource.resolve import base_config, objectives_of
from kvpilot_operator.tuning.observation import Promoted
from kvpilot_operator.tuning.pace import PACES, Pace
from kvpilot_operator.tuning.policy import Objectives

SyntheticName = Literal["step", "ramp", "spike", "diurnal", "sine"]
SYNTHETIC: tuple[SyntheticName, ...] = get_args(SyntheticName)

DeviceName = Literal["recorded", "fitting"]
"""The device on which the engines of a recording ran, or one that fits the objectives."""

USE = 0.85
"""Share of its capacity that fixed sizes and planners give a replica: replicas differ, and so do seconds."""

MIN_USE = 0.6
"""A device is made faster until a replica keeps the objectives at this share of its throughput."""

LEAST_USE = 0.05
"""Share of its throughput that a replica counts with which keeps the objectives at no rate."""

BUSY = 50
"""Requests of a recorded minute whose sizes the device must suit."""

PROFILE_REQUESTS, PROFILE_STEPS = 2000, 7
"""Requests of one estimate of a rate, and steps of the bisection."""

LENGTH_S = 6000.0
"""A synthetic load at the Standard pace; a tenth of it at the Fast pace, s."""


@dataclass(frozen=True)
class LoadSpec:
    """A load by name or from a file.

    Attributes:
        scale: requests for each recorded one; None makes the busiest minute fill the deployment.
        seconds: stop after this long; None plays all of it.
    """

    synthetic: SyntheticName | None = None
    trace: Path | None = None
    scale: float | None = None
    seconds: float | None = None

    @property
    def title(self) -> str:
        """Its name for people."""
        return self.synthetic or (self.trace.name if self.trace is not None else "")


@dataclass(frozen=True)
class Scene:
    """What is played.

    Attributes:
        device_name, device_why: which device it is, and its source, or why it is not the recorded one.
        least, most: bounds of the number of replicas; equal without ``spec.scaling``.
        capacity: requests/s that one replica with the given configuration serves within the objectives.
        scale: of a trace.
        first, peak, mean: requests/s of the first minute, of the busiest one, and over all.
        seconds: length of the load.
    """

    load: LoadSpec
    pace: Pace
    objectives: Objectives
    device: Device
    device_name: DeviceName
    device_why: str
    work: Work
    config: Mapping[str, Any]
    least: int
    most: int
    capacity: float
    scale: float
    first: float
    peak: float
    mean: float
    seconds: float

    def requests(self, seed: int) -> Iterator[SimulatedRequest]:
        """The load, in s since the start."""
        if self.load.trace is not None:
            return replayed(recorded(self.load.trace, seed), self.scale, self.seconds, seed)
        return synthetic(self.rate, self.seconds, Mix(), seed)

    def rate(self, at: float) -> float:
        """Requests/s of a synthetic load."""
        assert self.load.synthetic is not None
        return _rate(self.load.synthetic, self.least * USE * self.capacity, self.seconds)(at)

    def replicas_for(self, rate: float, use: float = USE) -> int:
        """Replicas for a rate with the given configuration, without bounds."""
        return max(1, math.ceil(rate / (use * self.capacity) - 1e-9))

    @property
    def replicas_at_start(self) -> int:
        """Replicas for the first minute: the deployment ran before the load began."""
        return min(self.most, max(self.least, self.replicas_for(self.first)))

    def needed(self, seed: int, use: float) -> list[int]:
        """Replicas for what arrives in each minute, weighed by what each request costs; within bounds."""
        usual = self.device.latency_s(self.work, 1)
        minutes = [0.0] * (math.ceil(self.seconds / 60.0) + 1)
        for request in self.requests(seed):
            cost = self.device.latency_s(self.device.work(request.prompt, request.cached, request.out), 1)
            minutes[int(request.at // 60)] += cost / usual
        return [min(self.most, max(self.least, self.replicas_for(count / 60.0, use))) for count in minutes]


@lru_cache(8)
def _trace(path: Path) -> tuple[RecordedRequest, ...]:
    found = tuple(recorded(path, 0))
    if not found:  # a trace holds one at least, a recording may have seen none
        raise LoadError(f"recording {path}: holds no request")
    return found


def scene_of(manifest: Mapping[str, Any], load: LoadSpec, device_name: DeviceName | None = None) -> Scene:
    """The scene of a manifest under a load.

    Args:
        device_name: None is the recorded device where the load is a recording that tells it.

    Raises:
        OptionError: the recorded device is asked for, and the load does not tell it.
        ManifestError, LoadError: one of the files is invalid.
    """
    spec = KVCacheDeployment.parse(manifest).spec
    objectives, pace = objectives_of(spec), PACES[spec.tuning.pace]
    config = base_config(spec).model_dump(by_alias=True, exclude_unset=True, mode="json")
    fixed = spec.replicas or 1
    least, most = (fixed, fixed) if spec.scaling is None else (spec.scaling.minimum, spec.scaling.maximum)
    device, why = _recorded_device(load, device_name)
    if load.trace is None:
        mix = Mix()
        works = [Device().work(mix.prompt, mix.prompt * mix.cached, mix.out)]
        groups: Sequence[Sequence[Work]] = [works]
        requests = tuple(synthetic(lambda t: 100.0, PROFILE_REQUESTS / 100, mix, 0, noise=0.0))
    else:
        trace = _trace(load.trace)
        works = _works(trace, device or Device())
        groups = _minutes(trace, works)
        requests = _profiled(trace)
    work = Work.mean(works)
    name: DeviceName = "fitting" if device is None else "recorded"
    if device is None:
        device, capacity = _fitting_device(groups, work, requests, objectives, config)
    else:
        capacity = _capacity(device, requests, objectives, config, device.capacity(work, config))
    found = Scene(
        load, pace, objectives, device, name, why, work, config, least, most, capacity,
        scale=1.0, first=0.0, peak=0.0, mean=0.0, seconds=0.0,
    )  # fmt: skip
    return _with_trace(found) if load.trace is not None else _with_rates(found)


def _recorded_device(load: LoadSpec, name: DeviceName | None) -> tuple[Device | None, str]:
    """The device of a recording and its source, or None for one that fits, and why.

    Raises:
        OptionError: it is asked for, and the load does not tell it.
    """
    if name == "fitting":
        return None, "as asked for"
    if load.trace is None or not is_recording(load.trace):
        why = "the load is no recording of `kvpilot record`"
    else:
        try:
            found = recorded_device(read_recording(load.trace))
        except ValueError as error:
            if isinstance(error, LoadError):
                raise
            why = f"recording {load.trace}: {error}"
        else:
            source = (
                f"{found.intervals} intervals; a fit to half of them misses the others by {found.error:.1%}"
            )
            return found.device, source
    if name is not None:
        raise OptionError(f"--device: recorded is not possible: {why}; allowed: fitting")
    return None, why


def _with_rates(scene: Scene) -> Scene:
    length = LENGTH_S if scene.pace is PACES["Standard"] else LENGTH_S / 10
    scene = replace(scene, seconds=min(length, scene.load.seconds or length))
    rates = [scene.rate(60.0 * minute) for minute in range(math.ceil(scene.seconds / 60))]
    return replace(scene, first=rates[0], peak=max(rates), mean=sum(rates) / len(rates))


def _with_trace(scene: Scene) -> Scene:
    assert scene.load.trace is not None
    trace = _trace(scene.load.trace)
    seconds = min(trace[-1].at, scene.load.seconds or trace[-1].at)
    minutes = [0] * (int(seconds // 60) + 1)
    for item in trace:
        if item.at <= seconds:
            minutes[int(item.at // 60)] += 1
    if not any(minutes):  # a trace begins with a request, a recording may begin with a gap or idle
        raise LoadError(
            f"recording {scene.load.trace}: no request arrives in its first {seconds:g} s (--duration); the "
            f"first one arrives after {trace[0].at:.0f} s"
        )
    peak, mean = max(minutes) / 60.0, sum(minutes) / max(seconds, 60.0)
    # As much as twice the least number of replicas serves; without scaling, more than the knobs as given can.
    full = min(scene.most, 2 * scene.least) * USE if scene.most > scene.least else 1.2 * scene.least
    scale = scene.load.scale or full * scene.capacity / peak
    first = minutes[0] / 60.0
    return replace(
        scene, scale=scale, first=scale * first, peak=scale * peak, mean=scale * mean, seconds=seconds
    )


def _profiled(trace: Sequence[RecordedRequest]) -> tuple[SimulatedRequest, ...]:
    """Requests of a trace in random order, at one per second."""
    draw = random.Random("profile")
    chosen = [draw.choice(trace) for _ in range(PROFILE_REQUESTS)]
    return tuple(
        SimulatedRequest(float(index), item.prompt, item.cached, item.out)
        for index, item in enumerate(chosen)
    )


def _works(trace: Sequence[RecordedRequest], device: Device) -> list[Work]:
    """What each request costs."""
    return [device.work(item.prompt, item.cached, item.out) for item in trace]


def _minutes(trace: Sequence[RecordedRequest], works: Sequence[Work]) -> list[Sequence[Work]]:
    """What the requests of each busy minute cost; all in one group where no minute is busy."""
    found: dict[int, list[Work]] = {}
    for item, work in zip(trace, works, strict=True):
        found.setdefault(int(item.at // 60), []).append(work)
    return [group for group in found.values() if len(group) >= BUSY] or [works]


def _fitting_device(
    groups: Sequence[Sequence[Work]],
    work: Work,
    requests: Sequence[SimulatedRequest],
    objectives: Objectives,
    config: Mapping[str, Any],
) -> tuple[Device, float]:
    """The slowest device that keeps the objectives at a fair share of its throughput, and its capacity.

    It keeps them in each group, when idle: a minute of long answers must not be missed whatever one does.
    """
    for share in UNLOADED_SHARES:
        fitting = (Device.fitting(works, objectives, share) for works in groups)
        device = min(fitting, key=lambda candidate: candidate.base_s)
        most = device.capacity(work, config)
        capacity = _capacity(device, requests, objectives, config, most)
        if capacity >= MIN_USE * most:
            break
    return device, capacity


def _capacity(
    device: Device,
    requests: Sequence[SimulatedRequest],
    objectives: Objectives,
    config: Mapping[str, Any],
    most: float,
) -> float:
    """The largest rate up to ``most`` at which one replica keeps the latency objectives, by bisection.

    It is `LEAST_USE` of ``most`` at least.
    """
    low, high = 0.0, most
    for _ in range(PROFILE_STEPS):
        rate = (low + high) / 2
        if _keeps(device, requests, objectives, config, rate):
            low = rate
        else:
            high = rate
    return max(low, LEAST_USE * most)


def _keeps(
    device: Device,
    requests: Sequence[SimulatedRequest],
    objectives: Objectives,
    config: Mapping[str, Any],
    rate: float,
) -> bool:
    """True if one replica keeps the objectives while these requests come at a rate (1/s)."""
    draw = random.Random("arrivals").expovariate
    engine = SimulatedEngine("profile", "profile", Promoted(1, config), device.model(), 0.0)
    engine.warm()
    at, arrivals = 0.0, []
    for request in requests:
        at += draw(rate)
        arrivals.append(replace(request, at=at))
    engine.run(at + 3600.0, arrivals)
    engine.meter()
    signal = 1 if objectives.signal == "request" else 2
    return all(
        sum(item[signal] <= edge for item in engine.ended) >= share * len(engine.ended)
        for edge, share in objectives.latency.values()
    )


def _rate(name: SyntheticName, unit: float, seconds: float) -> Rate:
    """Synthetic rates, by what the least number of replicas serves."""
    match name:
        case "step":
            return step(0.75 * unit, 1.9 * unit, 0.3 * seconds)
        case "ramp":
            return ramp(0.6 * unit, 2.0 * unit, 0.2 * seconds, 0.3 * seconds)
        case "spike":
            peak, low = 1.8 * unit, 0.75 * unit
            first, second = (spike(low, peak, part * seconds, 0.1 * seconds) for part in (0.3, 0.75))
            return lambda t: max(first(t), second(t))
        case "diurnal":
            return sine(1.1 * unit, 0.75, seconds / 2)
        case "sine":  # around what they serve within the objectives
            return sine(unit / USE, 0.15, seconds / 10)
