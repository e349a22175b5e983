"""What goes wrong in a run beside the load: replicas, scrapes, the metrics source."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from kvpilot_operator.backtest.cluster import SimulatedCluster
from kvpilot_operator.backtest.engine import SimulatedEngine
from kvpilot_operator.options import OptionError
from kvpilot_operator.tuning.observation import SourceProblem
from kvpilot_operator.tuning.reasons import METRICS_UNAVAILABLE

FaultName = Literal["slow", "hung", "silent", "stale", "restart", "outage", "gap"]

DEFAULT_S = 300.0
"""How long a fault lasts without a duration, s."""

SLOW = 1.8
"""Step time of a slow replica over that of the others."""

FAULTS_HELP = (
    "slow: one replica is 1.8 times slower; hung: it stops stepping; silent: it has no series; stale: it is "
    "not scraped; restart: it restarts; outage: the metrics source is down; gap: nothing is scraped"
)


@dataclass(frozen=True)
class TimedFault:
    """One fault from ``at`` (s since the start) for ``seconds``. It hits the first replica, or all."""

    name: FaultName
    at: float
    seconds: float

    def active(self, now: float) -> bool:
        """True while it lasts."""
        return self.at <= now < self.at + self.seconds


def parse_faults(text: str) -> tuple[TimedFault, ...]:
    """``slow@600+300,outage@1200``: names with an optional start and duration in s.

    Raises:
        OptionError: a name or a number is invalid.
    """
    return tuple(_parse(item.strip()) for item in text.split(",") if item.strip())


def _parse(item: str) -> TimedFault:
    found = re.fullmatch(r"(\w+)(?:@(\d+(?:\.\d+)?))?(?:\+(\d+(?:\.\d+)?))?", item)
    names = get_args(FaultName)
    if found is None or found[1] not in names:
        raise OptionError(
            f"--faults: must be NAME[@START[+SECONDS]] with one of {', '.join(names)}, got {item}"
        )
    name: FaultName = found[1]  # type: ignore[assignment]  # one of names
    return TimedFault(name, float(found[2] or 0.0), float(found[3] or DEFAULT_S))


class Faults:
    """Applies timed faults to a deployment, at every scrape."""

    def __init__(self, faults: Sequence[TimedFault]) -> None:
        self._faults = faults
        self._restarted: set[TimedFault] = set()

    def apply(self, cluster: SimulatedCluster, now: float) -> None:
        """Bring the deployment into the state that the faults of this time (s since the start) ask for."""
        active = {fault.name for fault in self._faults if fault.active(now)}
        down = SourceProblem(METRICS_UNAVAILABLE, "the metrics source does not answer")
        cluster.metrics_problem = down if "outage" in active else None
        for index, engine in enumerate(cluster.running()):
            hit: set[FaultName] = active if index == 0 else set()
            engine.outlier = SLOW if "slow" in hit else 1.0
            engine.hung, engine.silent = "hung" in hit, "silent" in hit
            engine.stale = "stale" in hit or "gap" in active
        for fault in self._faults:
            if fault.name == "restart" and fault.active(now) and fault not in self._restarted:
                self._restarted.add(fault)
                _restart(cluster, next(iter(cluster.ready(cluster.now)), None))


def _restart(cluster: SimulatedCluster, engine: SimulatedEngine | None) -> None:
    if engine is not None and cluster.promoted is not None:
        engine.restart(cluster.promoted)
        engine.ready_at = cluster.now + cluster.start_s
