"""Random worlds in which the truth is known: what a candidate really does, who fails, and what is needed.

A world has a fault that one rule cures, and things happen to it: replicas that lie, hang or restart, sources
that fail, operators that die before or after the write of the state, users who edit, clocks that jump.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

from tests.operator.tuning.invariants import Invariants, Step
from tests.operator.tuning.observations import DOWN, counts, curve, gauges
from tests.operator.tuning.policies import CATALOGUE_BOUNDS, PRODUCTION, policy_of

from kvpilot_operator.status.history import last_numbers
from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.decision import Decision, Push, Scale, WriteConfig
from kvpilot_operator.tuning.experiment.ends import TAKEN_BACK
from kvpilot_operator.tuning.observation import (
    Counts,
    EngineView,
    Gauges,
    Observation,
    ObservedReplica,
    Promoted,
    Sample,
)
from kvpilot_operator.tuning.policy import KnobBounds, Policy, Scaling
from kvpilot_operator.tuning.state import TuningState
from kvpilot_operator.tuning.windows import windows_of

BOUNDS = {**CATALOGUE_BOUNDS, "numWorkers": KnobBounds("numWorkers", 2, 12)}
POLICY = policy_of(bounds=BOUNDS, scaling=Scaling(1, 8))
FIXED = replace(POLICY, scaling=None)
HITS = replace(FIXED, objectives=replace(PRODUCTION, hit_rate=0.7))

START_S, YOUNG_S = 8.0, 60.0
"""A new replica serves after the first, and has been measured for a long window after the second."""

GOOD = {"p50": 1.0, "p95": 1.0, "p99": 1.0}
LATE = {"p50": 0.2, "p95": 0.4, "p99": 0.5}


EFFECTS = ("cures", "cures", "nothing", "harms", "fails", "betrays", "betrays")
"""What a candidate really does; one that betrays is good until it runs everywhere."""


@dataclass(frozen=True)
class Regime:
    """A load and a configuration that go wrong in one way, or in none.

    Attributes:
        figures: of ``counts`` for each replica; gauges apart.
        gauge: changes of the gauges.
        cured: what a cure makes of the figures and gauges.
        lengths: seconds between two ticks, by chance.
        effects: what a candidate may really do, by chance.
        harm: what a harmful candidate makes of the step rate, less than its rule gives up on purpose.
    """

    name: str
    config: Mapping[str, Any]
    figures: Mapping[str, Any]
    gauge: Mapping[str, Any] = field(default_factory=dict)
    cured: Mapping[str, Any] = field(default_factory=dict)
    policy: Policy = FIXED
    replicas: tuple[int, ...] = (2, 3, 4, 6)
    lengths: tuple[float, ...] = (2.0, 4.0, 10.0)
    with_curve: bool = False
    effects: tuple[str, ...] = EFFECTS
    harm: float = 0.3


BASE = {"numWorkers": 4, "batchSize": 4, "prefetchSize": 8}
QUEUED = {"admission_wait": 0.5, "decode": 0.04}
LOADING = {"tier_load": 0.5, "decode": 0.06}
SERVED = {"stages": {"prefill": 0.01, "decode": 0.04}, "attained": GOOD}
STEPS = {"rows": 4, "row_rate": 200.0}
REGIMES: tuple[Regime, ...] = (
    Regime("calm", BASE, {**SERVED, **STEPS, "rate": 5.0, "busy": 0.3}, policy=POLICY),
    Regime(
        "workers",
        BASE,
        {"stages": QUEUED, "attained": LATE, **STEPS},
        {"waiting": 9.0},
        {**SERVED, "row_rate": 800.0},
    ),
    Regime(
        "batch",
        {**BASE, "numWorkers": 16},
        {"stages": {"batch_wait": 0.5, "decode": 0.04}, "attained": LATE, **STEPS},
        {"waiting": 9.0},
        {**SERVED, "row_rate": 800.0},
    ),
    Regime(
        "step tokens",
        {**BASE, "maxStepTokens": 256},
        {"stages": {"prefill": 0.5, "decode": 0.04}, "attained": LATE, "step_tokens": 250.0},
        {},
        {**SERVED, "step_tokens": 100.0},
    ),
    Regime(
        "prefetch",
        BASE,
        {"stages": LOADING, "attained": LATE, "prefetched": (3.0, 0.5), **STEPS},
        {},
        {"stages": {"tier_load": 0.05, "decode": 0.06}, "attained": GOOD},
    ),
    Regime(
        "wavering",
        BASE,
        {"stages": LOADING, "attained": LATE, "prefetched": (3.0, 0.5), **STEPS},
        lengths=(30.0, 40.0),
        effects=("wavers",),
    ),
    Regime(
        "waste",
        {**BASE, "prefetchSize": 32},
        {**SERVED, "prefetched": (0.2, 3.0), **STEPS},
        {},
        {"prefetched": (0.2, 0.3)},
    ),
    Regime(
        "codec",
        {**BASE, "prefetchSize": 64, "compressionRatio": 0.3},
        {"stages": LOADING, "attained": LATE, "codec": 0.4, **STEPS},
        {},
        {"stages": {"tier_load": 0.05, "decode": 0.06}, "attained": GOOD},
    ),
    Regime(
        "few hits",
        BASE,
        {**SERVED, "hit": 0.4, "ceiling": 0.9, "evicted": 1.0, **STEPS},
        {},
        {"hit": 0.85},
        HITS,
    ),
    Regime(
        "fixed strategy",
        {**BASE, "cacheStrategy": "fifo", "maxTokens": 65536, "hostMemoryMb": 0},
        {**SERVED, "hit": 0.4, "ceiling": 0.9, "evicted": 1.0, **STEPS},
        {},
        {"hit": 0.85},
        HITS,
    ),
    Regime(
        "few blocks",
        {**BASE, "compressionRatio": 1.0},
        {**SERVED, "hit": 0.4, "ceiling": 0.9, "evicted": 1.0, **STEPS},
        {"memory_ratio": 0.7},
        {"hit": 0.85},
        HITS,
    ),
    Regime(
        "crowded",
        {"numWorkers": 24, "batchSize": 24},
        {
            "stages": {"prefill": 0.02, "decode": 0.5},
            "attained": {"p50": 0.2, "p95": 0.9, "p99": 1.0},
            "rows": 16,
            "row_rate": 320.0,
            "rate": 12.0,
            "busy": 0.15,
        },
        {},
        {"stages": {"prefill": 0.02, "decode": 0.05}, "attained": GOOD, "row_rate": 160.0},  # fewer rows
        with_curve=True,
        harm=0.1,
    ),
    Regime(
        "memory",
        BASE,
        {**SERVED, **STEPS},
        {"memory_ratio": 0.85},
        {"memory_ratio": 0.6, "row_rate": 110.0},  # fewer hits, so that steps carry more prefill
        harm=0.1,
    ),
    Regime(
        "exhausted",
        {**BASE, "batchSize": 128},
        {**SERVED, **STEPS},
        {"memory_ratio": 0.97},
        {"memory_ratio": 0.6},
        lengths=(10.0, 20.0, 400.0),
    ),
    Regime(
        "saturated",
        {"numWorkers": 24, "batchSize": 24},
        {"stages": QUEUED, "attained": LATE, "busy": 0.97, **STEPS},
        {"waiting": 9.0, "marginal_gain": 0.05},
        policy=POLICY,
        replicas=(1, 2, 3, 4),
        lengths=(10.0, 20.0),
    ),
    Regime(
        "idle",
        {"numWorkers": 16, "batchSize": 16},
        {**SERVED, "rate": 1.0, "busy": 0.05, **STEPS},
        policy=POLICY,
        replicas=(3, 5, 8),
        lengths=(4.0, 10.0, 14.0),
    ),
    Regime("no traffic", BASE, {"rate": 0.0}, policy=POLICY, replicas=(3, 6), lengths=(4.0, 10.0)),
)
"""One for each rule, one in which a change shows nothing for sure, and days on which nothing is wrong."""

FAULTS = ("nan", "missing", "stale", "silent", "restart", "unready", "hung", "young", "refuses")
"""What happens to one replica."""

EVENTS = (
    *FAULTS,
    *("source", "manager", "paused", "invalid", "mode", "edit", "rolling", "late", "back", "delete", "shift"),
    *("lost actions", "half actions", "crash", "lost status"),
)

BUSY = 0.1
"""How likely an engine does not take a push; the next decision pushes again."""

RELAPSE = 0.15
"""How likely the load outgrows a cure within a tick."""

GAINS = frozenset({"cures", "betrays"})


@lru_cache(maxsize=4096)
def _counted(seconds: float, items: tuple[tuple[str, Any], ...]) -> Counts:
    given = {name: dict(item) if isinstance(item, frozenset) else item for name, item in items}
    return counts(seconds, **given)


def counted(seconds: float, figures: Mapping[str, Any]) -> Counts:
    """``counts``, remembered: most replicas show what others show."""
    keyed = tuple(
        (name, frozenset(item.items()) if isinstance(item, Mapping) else item)
        for name, item in sorted(figures.items())
    )
    return _counted(seconds, keyed)


class World:
    """A deployment of one regime; actions take effect unless an event says otherwise.

    Args:
        seed: of everything that happens; one seed gives one history.
        events: share of the ticks at which something happens.
    """

    def __init__(self, seed: int, regime: Regime, *, events: float = 0.1) -> None:
        self.random = random.Random(f"{regime.name} {seed}")
        self.seed, self.regime, self.events = seed, regime, events
        self.now = 100_000.0
        self.base = dict(regime.config)
        self.promoted = Promoted(1, dict(regime.config))
        self.state = TuningState()
        self.engines: dict[str, EngineView] = {}
        self.created: dict[str, float] = {}
        self.restarts: dict[str, int] = {}
        self.effects: dict[int, str] = {}
        self.recorded = (0, 0)
        self.bad = ""
        self.cured = self.even = False
        self.fault, self.fault_left = "", 0
        self.with_curve = regime.with_curve or self.random.random() < 0.5
        self.invariants = Invariants()
        self.scale(self.random.choice(regime.replicas), self.now - 1000)
        self.desired = len(self.engines)

    def scale(self, replicas: int, created: float) -> None:
        """Take the last replicas away, or start new ones from what is promoted."""
        self.desired = replicas
        while len(self.engines) > replicas:
            self.engines.popitem()
        while len(self.engines) < replicas:
            name = f"chat-{len(self.created)}"
            self.engines[name] = EngineView(
                name, self.promoted.generation, 0, dict(self.promoted.config), False, {}
            )
            self.created[name] = created

    def ticks(self, number: int) -> Iterator[Step]:
        """Go on for so many ticks; every decision is checked.

        Raises:
            AssertionError: a decision must not be; the message names the world.
        """
        for index in range(number):
            try:
                yield self.tick()
            except AssertionError as error:
                raise AssertionError(
                    f"world {self.regime.name}/{self.seed}, tick {index}: {error}"
                ) from error

    def tick(self) -> Step:
        """What happens, what is observed, what is decided, and what becomes of it."""
        event = self._event()
        self.even = not self.even
        self.cured = self.cured and self.random.random() > RELAPSE
        self.now += self.random.choice(self.regime.lengths)
        self._happen(event)
        policy = self.regime.policy if event != "mode" else replace(self.regime.policy, mode="Recommend")
        observation = self.observe(event)
        decision = decide(observation, self.state, policy, observation.at)
        step = Step(observation, self.state, policy, decision)
        self.invariants.check(step)
        self._check_truth(step)
        if event == "crash":  # nothing was written, so its number is free
            self.invariants.started -= {record.id for record in decision.records}
        else:
            self.state = decision.state
            kept = [asdict(record) for record in decision.records]
            self.recorded = tuple(map(max, zip(self.recorded, last_numbers(kept), strict=True)))
        self.act(decision, event)
        return step

    def _event(self) -> str:
        if self.fault_left:
            self.fault_left -= 1
            return self.fault
        if self.random.random() >= self.events:
            return ""
        event = self.random.choice(EVENTS)
        if event in {*FAULTS, "source", "paused", "invalid", "manager", "rolling"}:
            self.fault, self.fault_left = event, self.random.choice((0, 1, 3, 8))
        return event

    def _happen(self, event: str) -> None:
        first = next(iter(self.engines), None)
        match event:
            case "late":
                self.now += self.random.choice((130.0, 3000.0))
            case "back":
                self.now -= 15.0
            case "edit":
                self.base = {**self.base, "gcThreshold": self.random.choice((0.7, 0.8, 0.9))}
            case "lost status":
                self.state = TuningState()
                self.invariants.forget()
            case "shift":
                self.cured = False
            case "delete" if first is not None:
                del self.engines[first]
                self.scale(self.desired, self.now)
            case "restart" if first is not None and self.fault_left == 0:
                self.engines[first] = replace(
                    self.engines[first],
                    generation=self.promoted.generation,
                    config=dict(self.promoted.config),
                    epoch=0,
                )
                self.restarts[first] = self.restarts.get(first, 0) + 1

    def observe(self, event: str = "") -> Observation:
        """What the ports would show now."""
        windows = windows_of(self.state, self.regime.policy.pace, self.now)
        replicas = tuple(
            self._replica(name, windows, event if index == 0 else "")
            for index, name in enumerate(self.engines)
        )
        return Observation(
            at=self.now,
            replicas=replicas,
            base=self.base,
            promoted=self.promoted,
            desired_replicas=self.desired,
            spec_replicas=None if self.regime.policy.scaling is not None else self.desired,
            metrics_problem=DOWN if event == "source" else None,
            paused_by="stop" if event == "paused" else "",
            spec_error="spec.x: bad" if event == "invalid" else "",
            rolling_out=event == "rolling",
            replicas_managed_by="kubectl" if event == "manager" else "",
            recorded_decision=self.recorded[0] if self.state == TuningState() else 0,
            recorded_generation=self.recorded[1] if self.state == TuningState() else 0,
            conflict_since=self.now - 2 * self.regime.policy.pace.takeover if event == "manager" else None,
        )

    def effect_on(self, name: str) -> str:
        """What the configuration that an engine runs really does."""
        engine = self.engines[name]
        if engine.generation != self.promoted.generation:
            return self.effects.get(engine.generation, "nothing")
        return self.bad or ("cures" if self.cured else "nothing")

    def _replica(self, name: str, windows: Mapping[str, float], fault: str) -> ObservedReplica:
        effect = self.effect_on(name)
        figures = dict(self.regime.figures)
        gauge = dict(self.regime.gauge)
        if effect in GAINS:
            changed = self.regime.cured
            figures |= {key: item for key, item in changed.items() if key != "memory_ratio"}
            gauge |= {key: item for key, item in changed.items() if key == "memory_ratio"}
            gauge["waiting"] = 0.0
        elif effect == "harms":
            figures["stages"] = {key: 2 * item for key, item in figures.get("stages", {}).items()}
            if "row_rate" in figures:
                figures["row_rate"] *= self.regime.harm
        elif effect == "fails":
            figures["errors"] = 0.3
        elif effect == "wavers":  # far better and far worse in turn
            times = 0.4 if self.even else 2.5
            figures["stages"] = {key: times * item for key, item in figures["stages"].items()}
        return self._faulty(self._healthy(name, windows, figures, gauge), fault)

    def _healthy(
        self, name: str, windows: Mapping[str, float], figures: Mapping[str, Any], gauge: Mapping[str, Any]
    ) -> ObservedReplica:
        age = self.now - self.created[name]
        engine = self.engines[name]
        running = float(engine.config.get("numWorkers", 4))
        shown: Gauges = gauges(
            running=running if figures.get("rate") != 0.0 else 0.0,
            curve=curve() if self.with_curve and "row_rate" in figures else {},
            **gauge,
        )
        sample = Sample(
            {window: counted(length, figures) for window, length in windows.items()},
            shown,
            0.5,
            min(YOUNG_S, age),
        )
        return ObservedReplica(
            f"uid-{name}",
            name,
            ready=age >= START_S,
            created_at=self.created[name],
            restarts=self.restarts.get(name, 0),
            engine=engine if age >= START_S else None,
            sample=sample if age >= START_S else None,
        )

    def _faulty(self, item: ObservedReplica, fault: str) -> ObservedReplica:  # noqa: PLR0911 - per fault
        sample = item.sample
        if sample is None:
            return item
        match fault:
            case "nan":
                return replace(item, sample=replace(sample, gauges=replace(sample.gauges, waiting=math.nan)))
            case "missing":
                return replace(item, sample=None)
            case "stale":
                return replace(item, sample=replace(sample, age_s=100.0))
            case "young":
                return replace(item, sample=replace(sample, coverage_s=5.0))
            case "silent":
                return replace(item, engine=None)
            case "unready":
                return replace(item, ready=False)
            case "hung":
                stuck = {window: counted(60.0, {"done": 0.0}) for window in sample.windows}
                stuck["short"] = counted(10.0, {"done": 0.0})
                waits = replace(sample.gauges, waiting=40.0, running=4.0)
                return replace(item, sample=replace(sample, windows=stuck, gauges=waits))
            case _:
                return item

    def act(self, decision: Decision, event: str = "") -> None:
        """The actions take effect: all, some or none of them."""
        change = self.state.change
        if change is not None:
            self.effects.setdefault(change.generation, self._drawn(change.generation))
        actions = decision.actions
        if event == "half actions":
            actions = actions[: len(actions) // 2]
        for action in () if event in {"lost actions", "crash"} else actions:
            match action:
                case Push(uid, generation, epoch, values):
                    name = uid.removeprefix("uid-")
                    if event != "refuses" or name != next(iter(self.engines), None):
                        self._take(name, generation, epoch, values)
                case WriteConfig(generation, values):
                    self._promote(generation, values)
                case Scale(replicas, _):
                    self.scale(replicas, self.now)

    def _drawn(self, generation: int) -> str:
        return random.Random(f"{self.regime.name} {self.seed} {generation}").choice(self.regime.effects)

    def _take(self, name: str, generation: int, epoch: int, values: Mapping[str, Any]) -> None:
        engine = self.engines.get(name)
        if engine is not None and epoch >= engine.epoch and self.random.random() > BUSY:
            config = {**engine.config, **values}
            self.engines[name] = replace(engine, generation=generation, epoch=epoch, config=config)

    def _promote(self, generation: int, values: Mapping[str, Any]) -> None:
        change = self.state.change
        own = change is not None and change.generation == generation
        back = own and change is not None and change.verdict == TAKEN_BACK
        effect = self.effects.get(generation, "nothing") if own and not back else "nothing"
        self.bad = "harms" if effect == "betrays" else effect if effect in {"harms", "fails"} else ""
        self.cured = self.cured or effect == "cures"
        self.promoted = Promoted(generation, dict(values))

    def _check_truth(self, step: Step) -> None:
        """Without noise a verdict is right, that of the watch as well; what wavers may look good."""
        change = step.before.change
        effect = "nothing" if change is None else self.effects.get(change.generation, "nothing")
        for record in step.decision.records:
            harmful = record.outcome == "Reverted" and record.evidence["verdict"] == "Harmful"
            if record.outcome == "Promoted":
                assert effect in {*GAINS, "wavers"}, f"promoted what {effect}: {record.summary}"
            if harmful and change is not None:
                assert effect not in GAINS, f"called harmful what {effect}: {record.summary}"
            if harmful and change is None:
                assert self.bad, f"taken back though it does no harm: {record.summary}"
