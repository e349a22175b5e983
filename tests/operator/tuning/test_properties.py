"""What must hold whatever is observed: a deployment that obeys, lags, restarts, is edited and goes blind."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import Phase as Generation
from hypothesis import strategies as st
from tests.tuning.observations import GOOD, gauges, pod
from tests.tuning.simulation import CATALOGUE_BOUNDS, policy_of

from kvpilot_engine.contract.metrics import Stage
from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.decision import Decision, Push, Record, Scale, WriteConfig
from kvpilot_operator.tuning.guards import SIX_HOURS, distrust
from kvpilot_operator.tuning.observation import EngineView, Observation, Pod, Promoted
from kvpilot_operator.tuning.policy import KnobBounds, Policy, Scaling
from kvpilot_operator.tuning.state import Phase, TuningState

BASE = {"numWorkers": 4, "batchSize": 4, "prefetchSize": 8}
BOUNDS = {**CATALOGUE_BOUNDS, "numWorkers": KnobBounds("numWorkers", 2, 24)}
POLICY = policy_of(bounds=BOUNDS, scaling=Scaling(1, 8))


@dataclass(frozen=True)
class Tick:
    """One look: how load and engines do, what is broken, and whether the decision takes effect."""

    passed: float
    rate: float
    attained: float
    effect: str
    stages: tuple[float, ...]
    done: float
    busy: float
    memory: float
    hit: float
    wasted: float
    waiting: float
    fault: str
    obey: bool
    paused: bool
    edit: bool


LOADS: dict[str, st.SearchStrategy[Any]] = {
    "rate": st.sampled_from([0.0, 0.5, 5.0, 20.0, 50.0]),
    "attained": st.sampled_from([0.0, 0.4, 0.97, 1.0]),
    "effect": st.sampled_from(["cures", "cures", "nothing", "harms"]),
    "stages": st.tuples(*[st.sampled_from([0.0, 0.02, 0.5]) for _ in Stage]),
    "done": st.sampled_from([0.4, 0.9, 1.0, 1.0]),
    "busy": st.sampled_from([0.2, 0.2, 0.95]),
    "memory": st.sampled_from([0.3, 0.3, 0.7, 0.85, 0.97]),
    "hit": st.sampled_from([0.1, 0.5, 0.9]),
    "wasted": st.sampled_from([0.0, 0.0, 3.0]),
    "waiting": st.sampled_from([0.0, 3.0, 40.0]),
}
EVENTS: list[dict[str, Any]] = [
    *[{"fault": name} for name in ("nan", "missing", "stale", "source", "silent", "restart", "unready")],
    {"obey": False},
    {"paused": True},
    {"edit": True},
]


@st.composite
def scripts(draw: st.DrawFn, longest: int) -> list[Tick]:
    """A load that changes now and then, looked at again and again, and now and then something happens."""
    load = {name: draw(strategy) for name, strategy in LOADS.items()}
    script = []
    for _ in range(draw(st.integers(1, longest))):
        if draw(st.integers(0, 7)) == 0:
            name = draw(st.sampled_from(sorted(LOADS)))
            load = {**load, name: draw(LOADS[name])}
        event = draw(st.sampled_from(EVENTS)) if draw(st.integers(0, 5)) == 0 else {}
        passed = draw(st.sampled_from([2.0, 10.0, 20.0, 50.0, 130.0, 3000.0]))
        script.append(Tick(**{**QUIET, "passed": passed, **load, **event}))
    return script


QUIET: dict[str, Any] = {"fault": "", "obey": True, "paused": False, "edit": False}


@dataclass
class World:
    """Pods and their configuration; decisions take effect unless a tick says otherwise."""

    now: float = 1_000.0
    promoted: Promoted = field(default_factory=lambda: Promoted(1, dict(BASE)))
    base: dict[str, Any] = field(default_factory=lambda: dict(BASE))
    engines: dict[str, EngineView] = field(default_factory=dict)
    replicas: int = 3
    restarts: dict[str, int] = field(default_factory=dict)
    made: int = 0

    def __post_init__(self) -> None:
        self.scale(self.replicas)

    def scale(self, replicas: int) -> None:
        self.replicas = replicas
        while len(self.engines) > replicas:
            self.engines.popitem()
        while len(self.engines) < replicas:
            name = f"chat-{self.made}"
            self.engines[name] = EngineView(
                name, self.promoted.generation, 0, self.promoted.config, False, {}
            )
            self.made += 1

    def observe(self, tick: Tick, state: TuningState) -> Observation:
        self.now += tick.passed
        if tick.edit:
            self.base = {**self.base, "batchSize": 4 if self.base["batchSize"] == 5 else 5}
        first = next(iter(self.engines))
        if tick.fault == "restart":
            engine = self.engines[first]
            self.engines[first] = replace(
                engine, generation=self.promoted.generation, config=self.promoted.config, epoch=0
            )
            self.restarts[first] = self.restarts.get(first, 0) + 1
        pods = tuple(self._pod(name, tick, state, broken=name == first) for name in self.engines)
        return Observation(
            at=self.now,
            pods=pods,
            base=self.base,
            promoted=self.promoted,
            replicas=self.replicas,
            metrics_problem="down" if tick.fault == "source" else "",
            paused_by="stop" if tick.paused else "",
        )

    def _pod(self, name: str, tick: Tick, state: TuningState, *, broken: bool) -> Pod:
        tried = state.change is not None and f"uid-{name}" == state.change.canary_uid
        effect = tick.effect if tried else "nothing"
        good = {"cures": 1.0, "nothing": tick.attained, "harms": 0.0}[effect]
        left = 0.3 if effect == "cures" else 1.0
        item = pod(
            name,
            rate=tick.rate,
            done=tick.done,
            attained=dict.fromkeys(GOOD, good),
            stages={stage.value: seconds * left for stage, seconds in zip(Stage, tick.stages, strict=True)},
            busy=tick.busy,
            hit=tick.hit,
            prefetched=(0.5, tick.wasted * left),
            evicted=1.0,
            verify={} if state.phase is Phase.VERIFY else None,
            gauges=gauges(
                memory_ratio=tick.memory * (0.75 if effect == "cures" else 1.0),
                waiting=tick.waiting,
                running=4.0,
                marginal_gain=0.05,
            ),
        )
        assert item.sample is not None
        item = replace(item, engine=self.engines[name], restarts=self.restarts.get(name, 0))
        match tick.fault if broken else "":
            case "nan":
                spoiled = replace(item.sample, gauges=replace(item.sample.gauges, memory_ratio=math.nan))
                return replace(item, sample=spoiled)
            case "missing":
                return replace(item, sample=None)
            case "stale":
                return replace(item, sample=replace(item.sample, age_s=100.0))
            case "silent":
                return replace(item, engine=None)
            case "unready":
                return replace(item, ready=False)
            case _:
                return item

    def act(self, decision: Decision) -> None:
        for action in decision.actions:
            match action:
                case Push(uid, generation, epoch, values):
                    name = uid.removeprefix("uid-")
                    engine = self.engines.get(name)
                    if engine is not None and epoch >= engine.epoch:
                        config = {**engine.config, **values}
                        self.engines[name] = replace(
                            engine, generation=generation, epoch=epoch, config=config
                        )
                case WriteConfig(generation, values):
                    self.promoted = Promoted(generation, dict(values))
                case Scale(replicas, _):
                    self.scale(replicas)


Step = tuple[Observation, TuningState, Decision]


def history(script: list[Tick], world: World, policy: Policy = POLICY) -> Iterator[Step]:
    state = TuningState()
    for tick in script:
        observation = world.observe(tick, state)
        decision = decide(observation, state, policy, observation.at)
        yield observation, state, decision
        state = decision.state
        if tick.obey:
            world.act(decision)


def in_bounds(values: Any) -> bool:
    return all(
        limits.minimum <= values[name] <= limits.maximum
        for name, limits in BOUNDS.items()
        if name in values
        and limits.minimum is not None
        and limits.maximum is not None
        and values[name] is not None
    )


relaxed = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=[Generation.explicit, Generation.generate],  # shrinking a long script takes minutes
    suppress_health_check=[HealthCheck.too_slow],
)


@relaxed
@given(scripts(40))
def test_every_step_is_safe(script: list[Tick]) -> None:
    records: list[Record] = []
    for observation, before, decision in history(script, World()):
        after = decision.state
        trusted = distrust(observation, POLICY) is None
        scales = [action for action in decision.actions if isinstance(action, Scale)]
        for scale in scales:
            assert trusted or scale.replicas > observation.replicas, "no scale-in without data"
            if scale.replicas < observation.replicas:
                assert before.change is None and after.change is None, "no scale-in during an experiment"
                assert scale.replicas == observation.replicas - 1
                assert observation.replicas == len(observation.ready)
            assert 1 <= scale.replicas <= 8
        assert after.epoch >= before.epoch
        assert after.last_generation >= before.last_generation
        if after.change is not None:
            assert after.change.generation <= after.last_generation
            assert after.change.epoch == after.epoch
            if before.change is not None and after.change.id != before.change.id:
                assert after.phase is Phase.EMERGENCY, (
                    "one change in flight; only an emergency takes its place"
                )
        for action in decision.actions:
            if isinstance(action, Push | WriteConfig):
                assert in_bounds(action.values), action
        if not trusted:
            assert not [r for r in decision.records if r.outcome in {"Started", "Promoted", "ScaledIn"}]
        assert len(after.holds) <= 5 and len(after.barred) <= 16 and len(after.reversals) <= 16
        assert len(after.scale_down) <= 10 and len(after.told) <= 16
        records.extend(decision.records)
    flaps = [(r.changes[0].knob, r.at) for r in records if r.outcome == "Reverted"]
    for knob, at in flaps:
        within = [one for one, when in flaps if one == knob and at - SIX_HOURS < when <= at]
        assert len(within) <= POLICY.reversals_per_knob_6h, "the flap bound"
    numbers = [record.id for record in records if record.outcome == "Started"]
    assert len(numbers) == len(set(numbers))


CALM = Tick(
    passed=20.0, rate=20.0, attained=1.0, effect="nothing", stages=(0.0, 0.0, 0.0, 0.02, 0.06, 0.0),
    done=1.0, busy=0.5, memory=0.3, hit=0.9, wasted=0.0, waiting=0.0, fault="", obey=True, paused=False,
    edit=False,
)  # fmt: skip


@relaxed
@given(scripts(25))
def test_whatever_happened_it_ends_at_what_is_promoted(script: list[Tick]) -> None:
    world = World()
    steps = list(history([*script, *[CALM] * 25], world))
    last = steps[-1][2]
    assert last.state.change is None, last.state
    assert {engine.generation for engine in world.engines.values()} == {world.promoted.generation}
    for engine in world.engines.values():
        assert {name: engine.config[name] for name in world.promoted.config} == world.promoted.config
    overlaid = {**world.base, **{entry.knob: entry.value for entry in last.state.overlay}}
    assert overlaid == world.promoted.config


@relaxed
@given(scripts(25))
def test_the_same_observation_again_changes_nothing_more(script: list[Tick]) -> None:
    world = World()
    state = TuningState()
    for observation, _, decision in history(script, world):
        state = decision.state
        for _ in range(4):  # a change that is called off may take a second look to end
            again = decide(observation, state, POLICY, observation.at)
            settled = again.state == state
            state = again.state
            if settled:
                break
        assert settled
        assert again.records == (), "what was told is not told again"


@relaxed
@given(scripts(25), st.integers(0, 19))
def test_a_lost_status_never_uses_an_epoch_or_generation_again(script: list[Tick], at: int) -> None:
    world = World()
    state, highest = TuningState(), 0
    for index, tick in enumerate(script):
        if index == at:
            state = TuningState()
        observation = world.observe(tick, state)
        decision = decide(observation, state, POLICY, observation.at)
        if index == at:
            seen = [item.engine for item in observation.pods if item.engine is not None]
            highest = max([world.promoted.generation, *(engine.generation for engine in seen)])
            assert decision.state.last_generation >= highest
            assert decision.state.epoch >= max((engine.epoch for engine in seen), default=0)
        state = decision.state
        if tick.obey:
            world.act(decision)
