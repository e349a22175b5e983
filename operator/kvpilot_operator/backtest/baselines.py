"""What people have now, with the defaults that its documentation gives.

All see what the metrics source has scraped, as kvpilot does, and nothing when it is down.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any

from kvpilot_engine.contract import CATALOGUE
from kvpilot_operator.backtest.simulation import Simulation
from kvpilot_operator.ports import MetricsError
from kvpilot_operator.tuning.configuration import value
from kvpilot_operator.tuning.observation import Counts, Sample

WINDOW_S = 60.0
"""Window of the rates that a baseline reads, s."""

TOLERANCE = 0.1
"""The HorizontalPodAutoscaler does nothing within this distance of its target."""

DOWN_S = 300.0
"""Its stabilization window downwards, s."""


@dataclass
class Fixed:
    """Nothing is done: a fixed number of replicas."""

    tick: float = 15.0

    def step(self, simulation: Simulation) -> None:
        """Nothing."""


@dataclass
class Stabilized:
    """The number of replicas as an HPA sets it: at most doubled or 4 more at once, down by the highest wish
    of the last five minutes."""

    minimum: int
    maximum: int
    _wishes: deque[tuple[float, int]] = field(default_factory=deque)

    def set(self, simulation: Simulation, wish: int) -> None:
        """Ask for ``wish`` replicas as far as the rules allow."""
        cluster = simulation.cluster
        now, asked = cluster.now, cluster.desired_replicas
        wish = min(wish, max(2 * asked, asked + 4))
        wish = min(self.maximum, max(self.minimum, wish))
        self._wishes.append((now, wish))
        while self._wishes[0][0] <= now - DOWN_S:
            self._wishes.popleft()
        if wish < asked:
            wish = min(asked, max(earlier for _, earlier in self._wishes))
        if wish != asked:
            cluster.resize(wish)


@dataclass
class Hpa:
    """autoscaling/v2: every 15 s, ceil(replicas x metric / target) outside the tolerance.

    A replica without metrics counts as 0 on the way up and as the target on the way down.

    Args:
        metric: ``busy``, share of time in steps (what a GPU's utilisation shows), or ``inside``, requests
            that run or wait, per replica.
    """

    scale: Stabilized
    metric: str = "busy"
    target: float = 0.8
    tick: float = 15.0

    def step(self, simulation: Simulation) -> None:
        """One sync."""
        values = [self._value(sample) for sample in _samples(simulation)]
        asked = simulation.cluster.desired_replicas
        if not values:
            return
        ratio = sum(values) / len(values) / self.target
        missing = max(0, asked - len(values))
        if missing and ratio > 1:
            ratio = max(1.0, sum(values) / (len(values) + missing) / self.target)
        elif missing and ratio < 1:
            ratio = min(1.0, (sum(values) / self.target + missing) / (len(values) + missing))
        wish = asked
        if abs(ratio - 1) > TOLERANCE:
            wish = math.ceil((len(values) + missing) * ratio - 1e-9)
        self.scale.set(simulation, wish)

    def _value(self, sample: Sample) -> float:
        counts = sample.windows["window"]
        if self.metric == "busy":
            return counts.busy_seconds / max(counts.replica_seconds, 1e-9)
        return sample.gauges.waiting + sample.gauges.running


@dataclass
class Keda:
    """A ScaledObject with the prometheus trigger: the sum of a metric, polled every 30 s, as an average value
    of an HPA.

    Args:
        metric: ``waiting`` or ``inside`` requests.
    """

    scale: Stabilized
    metric: str = "waiting"
    target: float = 5.0
    polling: float = 30.0
    tick: float = 15.0
    _polled: tuple[float, float] = (-math.inf, 0.0)

    def step(self, simulation: Simulation) -> None:
        """One sync of the HPA that KEDA makes."""
        now, asked = simulation.cluster.now, simulation.cluster.desired_replicas
        if now - self._polled[0] >= self.polling:
            samples = _samples(simulation)
            if not samples:
                return
            running = sum(sample.gauges.running for sample in samples) if self.metric == "inside" else 0.0
            self._polled = (now, running + sum(sample.gauges.waiting for sample in samples))
        total = self._polled[1]
        near = abs(total / asked / self.target - 1) <= TOLERANCE
        self.scale.set(simulation, asked if near else math.ceil(total / self.target - 1e-9))


@dataclass
class Vpa:
    """VerticalPodAutoscaler's recommender on the knobs that size a replica: workers and rows for the 90th
    percentile of the requests in it, and 15% more. The number of replicas stays."""

    percentile: float = 0.9
    margin: float = 0.15
    tick: float = 60.0
    _seen: list[float] = field(default_factory=list)

    def step(self, simulation: Simulation) -> None:
        """One recommendation; it is applied where it differs by more than 10%."""
        samples = _samples(simulation)
        self._seen += [sample.gauges.running + sample.gauges.waiting for sample in samples]
        if len(self._seen) < 2:
            return
        usual = quantiles(self._seen, n=100)[round(100 * self.percentile) - 1]
        rows = math.ceil(usual * (1 + self.margin))
        present = simulation.promoted.config
        values = {name: _bounded(name, rows) for name in ("numWorkers", "batchSize")}
        if any(abs(value(present, name) - new) > TOLERANCE * new for name, new in values.items()):
            simulation.cluster.configure(values)


@dataclass
class Planner:
    """An SLA planner as NVIDIA Dynamo has it: every 180 s, the load that a line through the last intervals
    foretells, over what one replica does within the objectives by its profile.

    Args:
        profile: requests/s of one replica, all rows in use.
        use: share of it that keeps the objectives.
    """

    scale: Stabilized
    profile: float
    use: float = 0.8
    interval: float = 180.0
    tick: float = 180.0
    _rates: list[float] = field(default_factory=list)

    def step(self, simulation: Simulation) -> None:
        """One adjustment."""
        samples = _samples(simulation, self.interval)
        if not samples:
            return
        total = Counts.total(sample.windows["window"] for sample in samples)
        rate = total.arrivals / max(total.replica_seconds / len(samples), 1e-9)
        self._rates.append(rate)
        rise = self._rates[-1] - self._rates[-2] if len(self._rates) > 1 else 0.0
        expected = max(0.0, rate + rise)
        wish = math.ceil(expected / (self.use * self.profile) - 1e-9)
        simulation.cluster.resize(min(self.scale.maximum, max(self.scale.minimum, wish)))


@dataclass
class RandomSearch:
    """Random values of the capacity knobs on all replicas, each for ``hold_s``; the best one stays. An HPA
    sets the number of replicas meanwhile.

    Args:
        trials: as many as kvpilot made.
    """

    hpa: Hpa
    trials: int
    hold_s: float
    seed: int
    edge_s: float
    tick: float = 15.0
    _best: tuple[float, Mapping[str, Any]] | None = None
    _tried: Mapping[str, Any] | None = None
    _since: float | None = None
    _draw: random.Random | None = None

    def step(self, simulation: Simulation) -> None:
        """Go on with the trial, or begin the next one."""
        self.hpa.step(simulation)
        now = simulation.cluster.now
        if self._draw is None:
            self._draw = random.Random(f"{self.seed} search")
            present = simulation.promoted.config
            self._tried = {name: value(present, name) for name in SEARCHED}
            self._since = now
        if self._since is None or now - self._since < self.hold_s:
            return
        total = Counts.total(sample.windows["window"] for sample in _samples(simulation, self.hold_s))
        good = total.attainment("request", self.edge_s) or 0.0
        if self._tried is not None and (self._best is None or good > self._best[0]):
            self._best = (good, self._tried)
        if self.trials > 0:
            self.trials -= 1
            self._tried, self._since = self._drawn(), now
            simulation.cluster.configure(self._tried)
        elif self._best is not None:
            self._since = None
            simulation.cluster.configure(self._best[1])

    def _drawn(self) -> dict[str, Any]:
        assert self._draw is not None
        found = {}
        for knob in CATALOGUE:
            if knob.resource_name in SEARCHED and knob.minimum is not None and knob.maximum is not None:
                low, high = math.log(knob.minimum), math.log(knob.maximum)
                found[knob.resource_name] = round(math.exp(self._draw.uniform(low, high)))
        return found


SEARCHED = ("numWorkers", "batchSize", "maxStepTokens")
"""Knobs that the random search draws, uniform in their logarithm within the catalogue's bounds."""


@dataclass
class Oracle:
    """Knows the load: at every time the fewest replicas for what arrives until a replica that is asked for
    now serves, and a minute longer.

    Args:
        needed: replicas by minute since the start.
    """

    needed: list[int]
    start_s: float
    tick: float = 15.0

    def step(self, simulation: Simulation) -> None:
        """Ask for the largest number within the horizon."""
        first = int(simulation.seconds // 60)
        last = int((simulation.seconds + self.start_s + 60.0) // 60)
        wanted = self.needed[first : last + 1] or self.needed[-1:]
        if wanted and max(wanted) != simulation.cluster.desired_replicas:
            simulation.cluster.resize(max(wanted))


def _samples(simulation: Simulation, window: float = WINDOW_S) -> list[Sample]:
    """What the metrics source has of the replicas that serve; nothing while it is down."""
    cluster = simulation.cluster
    try:
        found = cluster.measured({"window": window})
    except MetricsError:
        return []
    ready = {engine.uid for engine in cluster.ready(cluster.now)}
    return [sample for uid, sample in found.items() if uid in ready]


def _bounded(name: str, number: int) -> int:
    knob = next(item for item in CATALOGUE if item.resource_name == name)
    return int(min(knob.maximum or number, max(knob.minimum or number, number)))
