"""A load on a simulated deployment that the real reconciler manages, on a virtual clock."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from kvpilot_operator.backtest.cluster import OperatorCrash, SimulatedCluster
from kvpilot_operator.backtest.engine import Ended, SimulatedEngine
from kvpilot_operator.backtest.faults import Faults, TimedFault
from kvpilot_operator.backtest.model import EngineModel, SimulatedRequest
from kvpilot_operator.reconcile.fleet import Fleet
from kvpilot_operator.reconcile.reconciler import NullTelemetry, Reconciler, Reconciliation
from kvpilot_operator.resource.model import KVCacheDeployment
from kvpilot_operator.status.codec import state_of
from kvpilot_operator.tuning.decision import Decision, Record
from kvpilot_operator.tuning.observation import Promoted
from kvpilot_operator.tuning.pace import PACES
from kvpilot_operator.tuning.state import TuningState

START = 1_000_000.0
"""When every simulation begins, s since the epoch."""


class Controller(Protocol):
    """What manages the deployment in place of the reconciler.

    Attributes:
        tick: seconds between two steps.
    """

    tick: float

    def step(self, simulation: Simulation) -> None:
        """Look at the deployment and act on it."""


class Simulation(NullTelemetry):
    """One resource under a load, spread round-robin as a Service does.

    Args:
        manifest: a KVCacheDeployment.
        replicas: replicas of the workload at the start.
        load: requests/s of Poisson arrivals by seconds since the start.
        requests: given arrivals in their order instead, in s since the start; they are used up.
        model: the cost model of every engine.
        start_s: from the creation of a pod until it is ready, s; ``start_spread`` is the standard deviation
            of its log.
        sticky: requests of one session go to one replica.
        on_ended: gets what became of requests, as they end.
        controller: manages the deployment once it is rolled out; None for the reconciler.
        faults: what goes wrong beside the load.
        seed: of arrivals, speeds, start times and faults.
        fleet: limits over several simulations.

    Raises:
        ManifestError: the manifest is invalid.
    """

    def __init__(
        self,
        manifest: Mapping[str, Any],
        *,
        replicas: int = 3,
        load: Callable[[float], float] = lambda seconds: 20.0,
        requests: Iterable[SimulatedRequest] | None = None,
        model: EngineModel | None = None,
        start_s: float = 5.0,
        start_spread: float = 0.0,
        sticky: bool = False,
        on_ended: Callable[[list[Ended]], None] | None = None,
        controller: Controller | None = None,
        faults: Sequence[TimedFault] = (),
        seed: int = 7,
        fleet: Fleet | None = None,
    ) -> None:
        spec = KVCacheDeployment.parse(manifest).spec
        self.pace = PACES[spec.tuning.pace]
        self.load = load
        self.cluster = SimulatedCluster(
            manifest,
            replicas,
            model or EngineModel(),
            start_s,
            START,
            start_spread=start_spread,
            scrape=self.pace.scrape,
            seed=seed,
        )
        self.cluster.drain_s = float(spec.rollout.drain_seconds)
        self.decisions: list[tuple[float, Decision]] = []
        self._on_ended, self._sticky = on_ended, sticky
        self._controller = controller
        self._faults = Faults(faults) if faults else None
        self._random = random.Random(seed)
        self._turn = 0
        self._next_arrival = START
        self._requests = None if requests is None else iter(requests)
        self._next_request = None if self._requests is None else next(self._requests, None)
        self._fleet = fleet
        self._start_operator()

    def _start_operator(self) -> None:
        ports = self.cluster
        self._reconciler = Reconciler(
            ports, ports, ports, clock=ports.clock, telemetry=self, fleet=self._fleet
        )

    @property
    def seconds(self) -> float:
        """Time since the start, s."""
        return self.cluster.now - START

    @property
    def state(self) -> TuningState:
        """The tuner's state, as the status holds it."""
        return state_of(self.cluster.snapshot().status)

    @property
    def promoted(self) -> Promoted:
        """The content of the ConfigMap."""
        assert self.cluster.promoted is not None, "the first reconcile writes it"
        return self.cluster.promoted

    @property
    def records(self) -> list[Record]:
        """All decision records, oldest first."""
        return self.cluster.records

    def reconciled(self, result: Reconciliation) -> None:
        """Keep the decision of a reconcile."""
        self.decisions.append((self.cluster.now, result.decision))

    def run(
        self, seconds: float, until: Callable[[Simulation], bool] = lambda simulation: False
    ) -> Simulation:
        """Serve and reconcile, tick by tick, until the time is over or a condition holds."""
        asyncio.run(self._run(self.cluster.now + seconds, until))
        return self

    async def _run(self, end: float, until: Callable[[Simulation], bool]) -> None:
        if self.cluster.promoted is None:
            await self._reconcile()
        controller = self._controller
        tick = self.pace.tick if controller is None else controller.tick
        while self.cluster.now < end and not until(self):
            for _ in range(max(1, round(tick / self.pace.scrape))):
                self._serve(self.cluster.now + self.pace.scrape)
            if controller is None:
                await self._reconcile()
            else:
                controller.step(self)

    async def _reconcile(self) -> None:
        try:
            await self._reconciler.run_once(self.cluster.key)
        except OperatorCrash:
            self.cluster.restart_operator()
            self._start_operator()

    def _serve(self, until: float) -> None:
        """Requests arrive and engines work until the next scrape."""
        cluster = self.cluster
        starts = {engine.ready_at for engine in cluster.engines if cluster.now < engine.ready_at < until}
        arrivals = self._arrivals(until)
        for end in (*sorted(starts), until):
            mine = [request for request in arrivals if request.at < end] if starts else arrivals
            arrivals = arrivals[len(mine) :]
            self._spread(mine, cluster.ready(cluster.now), end)
            cluster.now = end
        if self._faults is not None:
            self._faults.apply(cluster, self.seconds)
        for engine in cluster.running():
            engine.scrape(until)
        gone = cluster.drained()
        cluster.wander()
        for engine in (*cluster.running(), *gone):
            if engine.ended:
                if self._on_ended is not None:
                    self._on_ended(engine.ended)
                engine.ended.clear()

    def _spread(self, arrivals: list[SimulatedRequest], ready: list[SimulatedEngine], until: float) -> None:
        """Route arrivals to the replicas that are ready, and let all work until a time."""
        count = len(ready)
        if not count:
            if self._on_ended is not None:
                self._on_ended([(request.at, math.inf, math.inf) for request in arrivals])
        elif self._sticky:
            shares: list[list[SimulatedRequest]] = [[] for _ in ready]
            for request in arrivals:
                shares[request.session * 2654435761 % 2**32 % count].append(request)
            for engine, share in zip(ready, shares, strict=True):
                engine.run(until, share)
        else:
            for index, engine in enumerate(ready):
                engine.run(until, arrivals[(index - self._turn) % count :: count])
            self._turn = (self._turn + len(arrivals)) % count
        for _, engine in self.cluster.draining:
            engine.run(until)

    def _arrivals(self, until: float) -> list[SimulatedRequest]:
        if self._requests is not None:
            return self._given(until)
        found: list[SimulatedRequest] = []
        rate, model = self.load(self.seconds), self.cluster.model
        at = max(self._next_arrival, self.cluster.now)
        if rate > 0:
            while at < until:
                found.append(model.request(at, len(found)))
                at += self._random.expovariate(rate)
        self._next_arrival = at
        return found

    def _given(self, until: float) -> list[SimulatedRequest]:
        found: list[SimulatedRequest] = []
        request, requests = self._next_request, self._requests
        assert requests is not None
        while request is not None and (at := request.at + START) < until:
            request.at = at
            found.append(request)
            request = next(requests, None)
        self._next_request = request
        return found

    def unfinished(self, older_s: float) -> list[Ended]:
        """Requests in flight that came more than ``older_s`` ago: late, however they end."""
        cluster = self.cluster
        engines = [*cluster.ready(cluster.now), *(engine for _, engine in cluster.draining)]
        late = cluster.now - older_s
        return [
            (request.at, math.inf, math.inf)
            for engine in engines
            for request in engine.in_flight()
            if request.at < late
        ]

    def outcomes(self) -> list[str]:
        """Outcomes of all records, oldest first."""
        return [record.outcome for record in self.records]

    def report(self) -> str:
        """All records, one line each: seconds since the start, outcome, rule, summary."""
        return "\n".join(f"{r.at - START:6.0f} {r.outcome:11} {r.rule}: {r.summary}" for r in self.records)
