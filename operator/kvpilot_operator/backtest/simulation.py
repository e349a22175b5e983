"""A small simulated deployment on a virtual clock, to drive ``decide`` from end to end.

Engines are queues with worker slots and a batch: every step advances up to ``batchSize`` rows and takes
``step_s(rows)``. Arrivals are Poisson with a fixed seed and are spread round-robin, as a Service would. The
simulation acts on decisions as the loop does: status first, then actions.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from kvpilot_engine.contract import CATALOGUE
from kvpilot_engine.contract.metrics import EDGES_S, Stage
from kvpilot_operator.tuning.configuration import value
from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.decision import Decision, Push, Record, Scale, WriteConfig
from kvpilot_operator.tuning.observation import (
    Boost,
    Counts,
    EngineView,
    Gauges,
    Observation,
    Pod,
    Promoted,
    Sample,
)
from kvpilot_operator.tuning.pace import PACES
from kvpilot_operator.tuning.policy import KnobBounds, Objectives, Policy, Scaling
from kvpilot_operator.tuning.state import Phase, TuningState

CATALOGUE_BOUNDS = {
    knob.resource_name: KnobBounds(knob.resource_name, knob.minimum, knob.maximum) for knob in CATALOGUE
}

PRODUCTION = Objectives(
    signal="request",
    latency={"p50": (0.1, 0.5), "p95": (0.5, 0.95), "p99": (1.0, 0.99)},
    throughput=100,
    floor=50,
    hit_rate=0.7,
    memory=0.8,
    errors=0.01,
)


def policy_of(**changes: Any) -> Policy:
    """An Auto policy at Fast pace with two to six replicas; no target for the hit rate unless given."""
    objectives = changes.pop("objectives", replace(PRODUCTION, hit_rate=0.0))
    given: dict[str, Any] = {
        "objectives": objectives,
        "mode": "Auto",
        "pace": PACES["Fast"],
        "bounds": CATALOGUE_BOUNDS,
        "scaling": Scaling(1, 6),
        **changes,
    }
    return Policy(**given)


@dataclass
class Request:
    """One request: when it came, where it is, and what each stage took so far."""

    at: float
    steps: int
    left: int = 0
    stages: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """What the simulated device and cache cost, by configuration.

    ``tax``: s added to a step; ``tier_s``: s of tier load per request, ``decoding`` of it in the codec;
    ``prefetched``: blocks used and wasted per request; ``hits``: share of the prompt tokens.
    """

    step_s: Callable[[int], float] = lambda rows: 0.016 + 0.0008 * rows
    tokens: int = 4
    marginal_gain: Callable[[int], float] = lambda rows: 0.9 if rows < 16 else 0.05
    tax: Callable[[Mapping[str, Any]], float] = lambda config: 0.0
    memory: Callable[[Mapping[str, Any]], float] = lambda config: 0.3
    tier_s: Callable[[Mapping[str, Any]], float] = lambda config: 0.0
    decoding: float = 0.0
    prefetched: Callable[[Mapping[str, Any]], tuple[float, float]] = lambda config: (0.0, 0.0)
    hits: Callable[[Mapping[str, Any]], float] = lambda config: 0.5
    ceiling: float = 0.8
    queue: int = 256
    timeout: float = 60.0


class Engine:
    """One simulated engine. ``counters`` only grow; windows are differences of their history."""

    def __init__(self, uid: str, name: str, promoted: Promoted, model: Model, at: float):
        self.uid, self.name, self.model = uid, name, model
        self.config, self.generation, self.epoch = dict(promoted.config), promoted.generation, 0
        self.waiting: deque[Request] = deque()
        self.held: list[Request] = []
        self.counters: dict[str, float] = {}
        self.history: deque[tuple[float, dict[str, float]]] = deque([(at, {})])
        self.born = at
        self.restarts = 0
        self.ready_at = at
        self.clock = at
        self.step_left = 0.0
        self.rows: list[Request] = []
        self.last_rows = 0

    def add(self, name: str, amount: float) -> None:
        self.counters[name] = self.counters.get(name, 0.0) + amount

    def offer(self, now: float) -> None:
        self.add("arrivals", 1)
        if len(self.waiting) >= self.model.queue:
            self.add("outcome:shed", 1)
            return
        self.waiting.append(Request(now, self.model.tokens, self.model.tokens))

    def run(self, until: float) -> None:
        """Work until a time, in whole steps."""
        workers, batch = value(self.config, "numWorkers"), value(self.config, "batchSize")
        tax = self.model.tax(self.config)
        while self.clock < until:
            while self.waiting and len(self.held) < workers and self.waiting[0].at <= self.clock:
                request = self.waiting.popleft()
                request.stages["admission_wait"] = self.clock - request.at
                self.held.append(request)
            rows = self.held[:batch]
            if not rows:
                self.clock = until
                break
            took = self.model.step_s(len(rows)) + tax
            self.add("busy", took)
            self.add("steps", 1)
            self.add("rows", len(rows))
            self.last_rows = len(rows)
            for index, request in enumerate(self.held):
                stage = (
                    "batch_wait"
                    if index >= batch
                    else "prefill"
                    if request.left == request.steps
                    else "decode"
                )
                request.stages[stage] = request.stages.get(stage, 0.0) + took
            self.clock += took
            for request in rows:
                request.left -= 1
                if request.left == 0:
                    self._end(request)
            self.held = [request for request in self.held if request.left > 0]

    def _end(self, request: Request) -> None:
        loading = self.model.tier_s(self.config)
        request.stages["tier_load"] = loading
        took = self.clock - request.at + loading
        used, wasted = self.model.prefetched(self.config)
        for name, amount in (
            ("decoding", loading * self.model.decoding),
            ("used", used),
            ("wasted", wasted),
            ("query", 100.0),
            ("hit", 100.0 * self.model.hits(self.config)),
            ("ceiling", 100.0 * self.model.ceiling),
            ("evicted", 1.0),
        ):
            self.add(name, amount)
        late = took > self.model.timeout
        self.add("outcome:timeout" if late else "outcome:ok", 1)
        smallest = bisect_left(EDGES_S, took)
        if not late and smallest < len(EDGES_S):
            self.add(f"within:{EDGES_S[smallest]}", 1)
        for stage, seconds in request.stages.items():
            self.add(f"stage:{stage}", seconds)

    def scrape(self, now: float) -> None:
        self.history.append((now, dict(self.counters)))
        while len(self.history) > 2 and self.history[1][0] <= now - 700:
            self.history.popleft()

    def counts(self, now: float, length: float) -> Counts:
        start = next((item for item in reversed(self.history) if item[0] <= now - length), self.history[0])
        last = self.history[-1]
        increase = {name: total - start[1].get(name, 0.0) for name, total in last[1].items()}

        def named(prefix: str) -> dict[str, float]:
            return {k.removeprefix(prefix): v for k, v in increase.items() if k.startswith(prefix)}

        ended = named("within:")
        within = dict(zip(EDGES_S, accumulate(ended.get(str(edge), 0.0) for edge in EDGES_S), strict=True))
        return Counts(
            pod_seconds=max(last[0] - start[0], 1e-9),
            arrivals=increase.get("arrivals", 0.0),
            outcomes=named("outcome:"),
            request_within=within,
            first_token_within=within,
            stage_seconds={stage.value: 0.0 for stage in Stage} | named("stage:"),
            query_tokens=increase.get("query", 0.0),
            hit_tokens=increase.get("hit", 0.0),
            ceiling_tokens=increase.get("ceiling", 0.0),
            evicted_pages=increase.get("evicted", 0.0),
            prefetch_used=increase.get("used", 0.0),
            prefetch_wasted=increase.get("wasted", 0.0),
            decode_seconds=increase.get("decoding", 0.0),
            busy_seconds=increase.get("busy", 0.0),
            steps=increase.get("steps", 0.0),
            step_rows=increase.get("rows", 0.0),
        )

    def pod(self, now: float, windows: Mapping[str, float]) -> Pod:
        if now < self.ready_at:
            return Pod(self.uid, self.name, ready=False, created_at=self.born)
        sample = Sample(
            windows={name: self.counts(now, length) for name, length in windows.items()},
            gauges=Gauges(
                waiting=float(len(self.waiting)),
                running=float(len(self.held)),
                memory_ratio=self.model.memory(self.config),
                marginal_gain=self.model.marginal_gain(self.last_rows),
                cached_bytes=200 * 2**20,
                budget_bytes=256 * 2**20,
                generation=self.generation,
                memory_limit_bytes=1000 * 2**20,
            ),
            age_s=0.5,
            coverage_s=now - self.ready_at,
        )
        view = EngineView(
            self.uid, self.generation, self.epoch, dict(self.config), False, {"maxTokens": 65536}
        )
        return Pod(
            self.uid,
            self.name,
            True,
            created_at=self.born,
            restarts=self.restarts,
            engine=view,
            sample=sample,
        )


class Simulation:
    """A deployment, its load, and the loop around ``decide``.

    ``crash`` is asked before every effect (status, or one action); True loses it, as if the operator died.
    """

    def __init__(
        self,
        base: Mapping[str, Any],
        policy: Policy,
        *,
        replicas: int = 3,
        load: Callable[[float], float] = lambda now: 20.0,
        model: Model | None = None,
        start_s: float = 5.0,
        seed: int = 7,
    ) -> None:
        self.base, self.policy, self.load, self.model = dict(base), policy, load, model or Model()
        self.start_s, self.now = start_s, 1000.0
        self.origin = self.now
        self.random = random.Random(seed)
        self.promoted = Promoted(1, dict(base))
        self.state = TuningState()
        self.replicas = replicas
        self.made = 0
        self.engines: list[Engine] = []
        self.boosts: tuple[Boost, ...] = ()
        self.paused_by = ""
        self.metrics_problem = ""
        self.turn = 0
        self.next_arrival = self.now
        self.records: list[Record] = []
        self.decisions: list[tuple[float, Decision]] = []
        self.crash: Callable[[], bool] = lambda: False
        self.schedulable = 99
        self._converge_pods(ready_at=self.now)

    def _converge_pods(self, ready_at: float) -> None:
        while len(self.engines) > self.replicas:
            self.engines.pop()
        while len(self.engines) < min(self.replicas, self.schedulable):
            engine = Engine(f"u{self.made}", f"chat-{self.made}", self.promoted, self.model, self.now)
            engine.ready_at = ready_at
            engine.born = engine.clock = ready_at
            engine.history = deque([(ready_at, {})])
            self.made += 1
            self.engines.append(engine)

    def _serve(self, until: float) -> None:
        rate = self.load(self.now - self.origin)
        self.next_arrival = max(self.next_arrival, self.now)
        while rate > 0 and self.next_arrival < until:
            ready = [engine for engine in self.engines if engine.ready_at <= self.next_arrival]
            if ready:
                self.turn += 1
                engine = ready[self.turn % len(ready)]
                engine.run(self.next_arrival)
                engine.offer(self.next_arrival)
            self.next_arrival += self.random.expovariate(rate)
        for engine in self.engines:
            engine.run(until)
            if until >= engine.ready_at:
                engine.scrape(until)

    def observe(self) -> Observation:
        pace = self.policy.pace
        windows = {"short": pace.short, "long": pace.long}
        if self.state.change is not None and self.state.phase is Phase.VERIFY:
            windows["verify"] = max(self.now - self.state.change.phase_since, pace.short)
        pods = [engine.pod(self.now, windows) for engine in self.engines]
        return Observation(
            at=self.now,
            pods=tuple(pods),
            base=self.base,
            promoted=self.promoted,
            replicas=self.replicas,
            metrics_problem=self.metrics_problem,
            paused_by=self.paused_by,
            boosts=tuple(b for b in self.boosts if b.expires_at > self.now),
        )

    def look(self) -> Decision:
        """One pass of the loop."""
        for _ in range(12):
            decision = decide(self.observe(), self.state, self.policy, self.now)
            self.decisions.append((self.now, decision))
            if (decision.state != self.state or decision.actions) and self.crash():
                return decision
            self.state = decision.state
            for action in decision.actions:
                if self.crash():
                    return decision
                self._act(action)
            self.records.extend(decision.records)
            if not decision.again:
                break
        return decision

    def _act(self, action: Push | WriteConfig | Scale) -> None:
        match action:
            case Push(uid, generation, epoch, values):
                for engine in self.engines:
                    if engine.uid == uid and engine.ready_at <= self.now and epoch >= engine.epoch:
                        engine.config = {**engine.config, **values}
                        engine.generation, engine.epoch = generation, epoch
            case WriteConfig(generation, values):
                self.promoted = Promoted(generation, dict(values))
            case Scale(replicas, _):
                self.replicas = replicas
                self._converge_pods(self.now + self.start_s)

    def run(self, seconds: float, until: Callable[[Simulation], bool] = lambda sim: False) -> Simulation:
        """Advance by ticks until the time is over or a condition holds."""
        end = self.now + seconds
        while self.now < end and not until(self):
            for _ in range(int(self.policy.pace.tick)):
                self._serve(self.now + 1.0)
                self.now += 1.0
            self.look()
        return self

    def restart(self, engine: Engine) -> None:
        """The container of a pod restarts: it starts from the ConfigMap."""
        engine.config, engine.generation = dict(self.promoted.config), self.promoted.generation
        engine.epoch, engine.restarts = 0, engine.restarts + 1
        engine.waiting.clear()
        engine.held = []

    def outcomes(self) -> list[str]:
        return [record.outcome for record in self.records]

    def told(self) -> str:
        return "\n".join(
            f"{r.at - self.origin:6.0f} {r.outcome:11} {r.rule}: {r.summary}" for r in self.records
        )
