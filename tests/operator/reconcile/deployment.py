"""A simulated deployment under the real reconciler, and all that happens to both."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal
from unittest import mock

from tests.operator.backtest.simulations import SMALL, WIDE, spec_of
from tests.operator.reconcile.effects import Effects, StateReader
from tests.operator.reconcile.faulty_ports import HIDING, FaultyPorts, Mishap, Moment
from tests.operator.tuning.invariants import TRYING, Step
from tests.operator.tuning.paths import paths

from kvpilot_operator.backtest.cluster import OperatorCrash
from kvpilot_operator.backtest.engine import SimulatedEngine
from kvpilot_operator.backtest.model import EngineModel, Fault
from kvpilot_operator.backtest.simulation import Simulation
from kvpilot_operator.ports import Conflict
from kvpilot_operator.reconcile import reconciler
from kvpilot_operator.reconcile.fleet import Fleet
from kvpilot_operator.reconcile.reconciler import Reconciler, Reconciliation
from kvpilot_operator.resource.model import KVCacheDeployment
from kvpilot_operator.resource.resolve import base_config
from kvpilot_operator.resource.times import to_rfc3339
from kvpilot_operator.status.overrides import Overrides, overrides_of
from kvpilot_operator.status.snapshot import Snapshot
from kvpilot_operator.tuning import decide
from kvpilot_operator.tuning.assess.trust import STALE_SCRAPES
from kvpilot_operator.tuning.configuration import value
from kvpilot_operator.tuning.context import REPORT_COOLDOWNS
from kvpilot_operator.tuning.decision import Decision
from kvpilot_operator.tuning.observation import Observation, SourceProblem
from kvpilot_operator.tuning.pace import PACES
from kvpilot_operator.tuning.policy import Policy
from kvpilot_operator.tuning.reasons import METRICS_UNAVAILABLE
from kvpilot_operator.tuning.state import Phase, TuningState

FAST = PACES["Fast"]

TRUTH_FAULTS = ("hung", "silent", "stale", "slow")
"""Faults of one replica that the simulated engine itself has."""

Level = Literal["none", "light", "usual", "heavy"]


QUICK = EngineModel()


@dataclass(frozen=True)
class Scene:
    """A configuration, a device and a load that go wrong in one way.

    Attributes:
        loads: requests/s of the whole deployment by level.
    """

    name: str
    config: Mapping[str, Any]
    loads: tuple[float, float, float, float]
    model: EngineModel = QUICK
    replicas: int = 3
    spec: Mapping[str, Any] = field(default_factory=dict)

    def rate(self, level: Level) -> float:
        """Requests/s at a level."""
        return self.loads[("none", "light", "usual", "heavy").index(level)]


QUEUES = (0.0, 5.0, 20.0, 120.0)
STEADY = (0.0, 5.0, 30.0, 30.0)
SLOW = EngineModel(step_s=lambda rows: 0.016 + 0.008 * rows)
SCENES = (
    Scene("few workers", SMALL, QUEUES),
    Scene("few workers, scaled", SMALL, QUEUES, spec={"scaling": {"min": 1, "max": 6}}),
    Scene(
        "workers harm",
        SMALL,
        QUEUES,
        EngineModel(tax=lambda config: 0.08 if value(config, "numWorkers") > 2 else 0.0),
    ),
    Scene(
        "workers do nothing",
        SMALL,
        QUEUES,
        EngineModel(fault=Fault({"numWorkers": 2.0, "batchSize": 2.0}, inert=True)),
        replicas=2,
    ),
    Scene("saturated", WIDE, (0.0, 5.0, 20.0, 240.0), SLOW, 2, {"scaling": {"min": 1, "max": 6}}),
    Scene("scaled in", WIDE, (0.0, 5.0, 30.0, 60.0), replicas=5, spec={"scaling": {"min": 2, "max": 6}}),
    Scene(
        "memory",
        WIDE,
        STEADY,
        EngineModel(memory=lambda c: 0.5 + 0.4 * min(1.0, (value(c, "maxMemoryMb") or 200) / 200)),
    ),
    Scene("exhausted", WIDE, STEADY, EngineModel(memory=lambda c: 0.6 + 0.4 * value(c, "batchSize") / 16)),
    Scene("no relief", WIDE, STEADY, EngineModel(memory=lambda c: 0.97)),
    Scene(
        "prefetch",
        WIDE,
        STEADY,
        EngineModel(tier_s=lambda c: 4.0 / (4 + value(c, "prefetchSize")), prefetched=lambda c: (2.0, 0.1)),
    ),
    Scene(
        "few hits",
        WIDE,
        STEADY,
        EngineModel(hits=lambda c: min(0.8, value(c, "maxTokens") / 8192)),
        spec={"objectives": {"hitRate": "70%"}},
    ),
    Scene("few rows", {"numWorkers": 16, "batchSize": 2}, (0.0, 5.0, 82.0, 82.0)),
    Scene(
        "short steps",
        {**WIDE, "maxStepTokens": 128},
        (0.0, 2.0, 5.0, 30.0),
        EngineModel(prefill_s=2e-5, prompt=1000.0),
    ),
    Scene(
        "crowded",
        {"numWorkers": 24, "batchSize": 24},
        (0.0, 5.0, 60.0, 120.0),
        EngineModel(step_s=lambda rows: 0.02 if rows <= 8 else 0.12),  # beyond 8 rows their work spills
    ),
    Scene(
        "waste",
        {**WIDE, "prefetchSize": 32},
        STEADY,
        EngineModel(prefetched=lambda c: (0.5, value(c, "prefetchSize") / 8)),
    ),
    Scene(
        "codec",
        {**WIDE, "compressionRatio": 0.32},
        STEADY,
        EngineModel(
            tier_s=lambda c: 0.8 * (1 - value(c, "compressionRatio")),
            decoding=0.9,
            prefetched=lambda c: (1.0, 1.0),
        ),
    ),
    Scene(
        "few blocks",
        {**WIDE, "compressionRatio": 1.0},
        STEADY,
        EngineModel(hits=lambda c: 0.8 - 0.3 * value(c, "compressionRatio")),
        spec={"objectives": {"hitRate": "60%"}},
    ),
    Scene(
        "fixed strategy",
        {**WIDE, "cacheStrategy": "fifo"},
        STEADY,
        EngineModel(hits=lambda c: 0.75 if value(c, "cacheStrategy") == "adaptive" else 0.5),
        spec={"objectives": {"hitRate": "60%"}},
    ),
    Scene("one replica", SMALL, (0.0, 5.0, 10.0, 40.0), replicas=1, spec={"singleReplica": "BeforeAfter"}),
)


@dataclass
class ActiveFault:
    """A fault of one replica, or of the source ("" for its uid), until a time of the deployment's clock."""

    name: str
    uid: str
    until: float


class Deployment(Simulation):
    """A scene that is managed.

    Attributes:
        skew: by how much the operator's clock is ahead of the deployment's, s.
        off: why the kill switch is on; "" while it is off.
        overrides: manifests of the overrides that exist.
        other_manager: the field manager that wrote the number of replicas; "" for kvpilot.
        refused_generations: spec generations of which the API server refuses an object.
        leak: share of the memory limit that every engine has leaked.
        through: reconciles in a row in which nothing failed and nothing came between.
        took: how often each path was taken.
    """

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.level: Level = "usual"
        self.skew = self.leak = 0.0
        self.off = self.other_manager = ""
        self.rolling_out = self.resized = False
        self.overrides: list[dict[str, Any]] = []
        self.faults: list[ActiveFault] = []
        self.refused_generations: set[int] = set()
        self.through = 0
        self.took: Counter[str] = Counter()
        self.failure: BaseException | None = None
        self.spec = spec_of(scene.config, replicas=scene.replicas, **scene.spec)
        self._based: tuple[Any, dict[str, Any]] = None, {}
        self._state_of = StateReader()
        self.ports = FaultyPorts(self)
        self.effects = Effects(self)
        manifest = {
            "apiVersion": "kvpilot.io/v1alpha1",
            "kind": "KVCacheDeployment",
            "metadata": {"name": "chat", "namespace": "default", "uid": "u", "generation": 1},
            "spec": self.spec,
        }
        super().__init__(
            manifest, replicas=scene.replicas, load=self._rate, model=scene.model, start_s=6.0, seed=3
        )

    def _rate(self, seconds: float) -> float:
        return self.scene.rate(self.level)

    def clock(self) -> float:
        """The operator's clock, s since the epoch."""
        return self.cluster.now + self.skew

    @property
    def state(self) -> TuningState:
        """The tuner's state, as the status holds it."""
        return self._state_of(self.cluster.snapshot().status)

    def _start_operator(self) -> None:
        self.ports.dead = False
        self._fleet = Fleet(self.clock, rules="same")
        self._fleet.off = self.off
        self._fleet.rebuild({self.cluster.key: self.cluster.snapshot().status})
        ports = self.ports
        self._reconciler = Reconciler(
            ports, ports, ports, clock=self.clock, telemetry=self, fleet=self._fleet
        )

    # Time

    def pass_ticks(self, number: int) -> None:
        """Let so many ticks pass.

        Raises:
            AssertionError: the operator did, or left, what must not be.
        """
        self.run(number * FAST.tick)

    def _serve(self, until: float) -> None:
        self._fault()
        super()._serve(until)

    def _fault(self) -> None:
        cluster = self.cluster
        self.faults = [fault for fault in self.faults if fault.until > cluster.now]
        source = {fault.name for fault in self.faults if not fault.uid}
        down = SourceProblem(METRICS_UNAVAILABLE, "the metrics source does not answer")
        cluster.metrics_problem = down if "outage" in source else None
        for engine in cluster.engines:
            mine = {fault.name for fault in self.faults if fault.uid == engine.uid}
            engine.outlier = 2.0 if "slow" in mine else 3.0 if "all slow" in source else 1.0
            engine.hung, engine.silent = "hung" in mine, "silent" in mine
            engine.stale = "stale" in mine or "gap" in source

    def fault_of(self, uid: str, among: tuple[str, ...]) -> str:
        """The fault of these that a replica has now; "" without one."""
        return next((fault.name for fault in self.faults if fault.uid == uid and fault.name in among), "")

    async def _reconcile(self) -> None:
        if self._fleet is not None:
            self._fleet.off = self.off
        self.ports.undisturbed = True
        with mock.patch.object(reconciler, "decide", self._decide):
            try:
                await self._reconciler.run_once(self.cluster.key)
            except OperatorCrash:
                self.through = 0
                self._start_operator()
            except (Conflict, ConnectionError):
                self.through = 0
            else:
                self.through = self.through + 1 if self.ports.undisturbed else 0
                if self.through:
                    self.effects.reconciled()
        self.resized = False
        self.effects.raise_failure()

    def _decide(self, observation: Observation, state: TuningState, policy: Policy, now: float) -> Decision:
        decision = decide.decide(observation, state, policy, now)
        self.effects.decided(Step(observation, state, policy, decision))
        return decision

    def reconciled(self, result: Reconciliation) -> None:
        """The status of a decision is there; nobody looks at the decisions afterwards."""
        self.effects.committed()

    # What is read

    def read(self) -> Snapshot:
        """The resource now, with what its overrides ask for; those that are over are deleted."""
        found = replace(
            self.cluster.snapshot(),
            replicas_managed_by=self.other_manager,
            rolling_out=self.rolling_out,
        )
        if self.overrides:
            asked = self.asked()
            gone = {verdict.name for verdict in asked.verdicts if verdict.over}
            self.overrides = [item for item in self.overrides if item["metadata"]["name"] not in gone]
            found = replace(found, overrides=asked)
        return found

    def asked(self) -> Overrides:
        """What the overrides ask for now."""
        return overrides_of(self.overrides, self.cluster.key.name, self.cluster.manifest, self.clock())

    @property
    def base(self) -> dict[str, Any]:
        """The user's configuration, as the last valid spec has it."""
        spec, base = self._based
        if spec is not self.spec:
            parsed = KVCacheDeployment.parse({**self.cluster.manifest, "spec": self.spec}).spec
            base = base_config(parsed).model_dump(by_alias=True, exclude_unset=True, mode="json")
            self._based = self.spec, base
        return base

    @property
    def refused(self) -> bool:
        """True if the present spec is invalid, or the API server refuses an object that follows from it."""
        present = self.cluster.snapshot()
        return present.manifest["spec"] != self.spec or present.spec_generation in self.refused_generations

    def hides(self, engine: SimulatedEngine) -> bool:
        """True if the source does not show the truth of a replica now."""
        old = self.cluster.now - engine.scrapes.last_at > STALE_SCRAPES * FAST.scrape
        return old or engine.silent or bool(self.fault_of(engine.uid, (*HIDING, "unreachable")))

    def count(self, step: Step) -> None:
        """Count the paths that a decision took."""
        self.took.update(paths(step))

    # What users do

    def ask(self, ttl_s: int, **what: Mapping[str, Any]) -> None:
        """Create an override."""
        metadata = {
            "name": f"o{len(self.records)}-{self.took['override']}",
            "creationTimestamp": to_rfc3339(int(self.clock())),
        }
        self.took["override"] += 1
        self.overrides.append(
            {
                "apiVersion": "kvpilot.io/v1alpha1",
                "kind": "KVCacheOverride",
                "metadata": metadata,
                "spec": {"target": "chat", "ttl": f"{ttl_s}s", "by": "ada", **what},
            }
        )

    def edit(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the last valid spec, and apply it."""
        self.spec = copy.deepcopy(self.spec)
        change(self.spec)
        self.cluster.edit(self.spec)

    def break_spec(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Apply an invalid spec."""
        broken = copy.deepcopy(self.spec)
        change(broken)
        self.cluster.edit(broken)

    def resize(self, replicas: int) -> None:
        """Another field manager writes the number of replicas."""
        if self.cluster.promoted is None:
            return
        self.other_manager, self.resized = "kubectl", True
        self.cluster.resize(replicas)

    def lose_status(self, document: Mapping[str, Any] | None = None) -> None:
        """The status is deleted, or replaced by one that nobody can read."""
        self.cluster.lose_status()
        if document:
            self.cluster.manifest = {**self.cluster.manifest, "status": dict(document)}
        self.effects.lost = True

    def lose_config_map(self) -> None:
        """The owned ConfigMap is deleted; engines run on, and new pods wait for it."""
        self.cluster.promoted = self.cluster.accepted = None

    def arm(
        self, happen: Callable[[Deployment], None], write: str, moment: Moment, name: str | None = None
    ) -> None:
        """Let something happen once, before or after the effect of the next write of a kind."""
        self.ports.armed.append(Mishap(name or happen.__name__, write, moment, happen))

    def provoke(self, write: str) -> None:
        """Bring it about that the operator writes that soon."""
        cluster, scaling = self.cluster, self.spec.get("scaling", {})
        self.took["provoked"] += 1
        match write:
            case "roll_out":
                self.edit(lambda spec: None)
            case "scale" | "prefer_removal":
                cluster.resize(scaling.get("max", 3) + 1)
            case "recycle":
                self.edit(lambda spec: spec["tuning"].update(recycleOutliers=True))
                self.skew += REPORT_COOLDOWNS * FAST.cooldown
                self.afflict("slow", self.took["provoked"], 60)
            case "take_over_replicas":
                self.resize(cluster.desired_replicas)
                self.pass_ticks(1)
                self.skew += FAST.takeover
            case _:
                self.overrides.clear()
                self.ask(600, pin={"knob": "maxTokens", "value": 1024 + 128 * (self.took["provoked"] % 99)})

    # What happens to replicas

    def engine(self, index: int) -> SimulatedEngine | None:
        """One of the replicas that serve."""
        ready = self.cluster.ready(self.cluster.now)
        return ready[index % len(ready)] if ready else None

    def afflict(self, name: str, index: int, ticks: int) -> None:
        """Give one replica a fault for so many ticks."""
        if (engine := self.engine(index)) is not None:
            self.faults.append(ActiveFault(name, engine.uid, self.cluster.now + ticks * FAST.tick))

    def afflict_all(self, name: str, ticks: int) -> None:
        """Give the source, or all replicas, a fault for so many ticks."""
        self.faults.append(ActiveFault(name, "", self.cluster.now + ticks * FAST.tick))

    def restart(self, index: int) -> None:
        """An engine crashes and starts again from the ConfigMap."""
        promoted = self.cluster.promoted
        if (engine := self.engine(index)) is not None and promoted is not None:
            engine.restart(promoted)
            engine.ready_at = self.cluster.now + self.cluster.start_s

    def delete(self, index: int) -> None:
        """A pod is deleted; the workload makes another."""
        if (engine := self.engine(index)) is not None and self.cluster.promoted is not None:
            self.cluster.engines.remove(engine)
            self.cluster.converge(self.cluster.now + self.cluster.start_s)

    def copy(self) -> Deployment:
        """The same deployment, of which nothing is counted yet. What never changes is shared."""
        cluster = self.cluster
        engines = (*cluster.engines, *(engine for _, engine in cluster.draining))
        scraped = (values for engine in engines for values in engine.scrapes._seen)
        written = (document for _, document in cluster.status_writes)
        made = copy.deepcopy(self, {id(item): item for item in (*scraped, *written, *cluster.records)})
        made.took.clear()
        return made

    # Rest

    def rest(self) -> None:
        """All faults end, all requests of people end, the spec is the scene's, and little is asked for."""
        self.ports.armed.clear()
        self.faults.clear()
        self.overrides.clear()
        self.refused_generations.clear()
        self.off = self.other_manager = ""
        self.rolling_out = False
        self.leak = 0.0
        self.cluster.schedulable = 1000
        for engine in self.cluster.engines:
            if engine.unschedulable:
                engine.ready_at = self.cluster.now + self.cluster.start_s
        self.level = "light"
        self.edit(lambda spec: None)

    @property
    def settled(self) -> bool:
        """Nothing is in flight, and every engine runs what the ConfigMap holds."""
        cluster, promoted = self.cluster, self.cluster.promoted
        if promoted is None or self.through < 2 or self.state.change is not None:
            return False
        return len(cluster.ready(cluster.now)) == cluster.desired_replicas and all(
            engine.generation == promoted.generation and engine.config == {**engine.config, **promoted.config}
            for engine in cluster.engines
        )

    def described(self) -> str:
        """What keeps it from being settled."""
        cluster, state = self.cluster, self.state
        engines = [
            (engine.name, engine.generation, engine.ready_at <= cluster.now) for engine in cluster.engines
        ]
        return (
            f"phase {state.phase}, change {state.change}, holds {state.holds}, promoted {cluster.promoted}, "
            f"asked for {cluster.desired_replicas}, engines {engines}, {self.through} reconciles came through"
        )


Start = Literal["calm", "breach", "verify", "promoted"]

UNTIL: Mapping[Start, Callable[[Simulation], bool]] = {
    "breach": lambda sim: sim.seconds >= 84,
    "verify": lambda sim: sim.state.phase is Phase.VERIFY,
    "promoted": lambda sim: "Promoted" in sim.outcomes() and sim.state.change is None,
}


def _made(name: str) -> Deployment:
    return Deployment(next(scene for scene in SCENES if scene.name == name))


@cache
def _prepared(name: str, start: Start) -> Deployment:
    if start == "calm":
        made = _made(name)
        made.run(70)
        return made
    made = _prepared(name, "calm").copy()
    made.level = "heavy"
    made.run(130, until=UNTIL[start])
    return made


def prepared(name: str, start: Start) -> Deployment:
    """A deployment of a scene at the start, or as near to it as it gets in time; nothing else happened."""
    return _prepared(name, start).copy()


LEAD = 2
"""Ticks between a moment and what would happen."""

COURSE: tuple[tuple[Level, int], ...] = (("usual", 35), ("heavy", 55), ("light", 40))
"""Load of an undisturbed scene, and for how many ticks."""

EVENTFUL = frozenset({"Started", "Promoted", "Reverted", "taken back", "Emergency", "ScaledOut", "ScaledIn"})


@cache
def _moments(name: str) -> dict[str, Deployment]:
    """The scene shortly before each thing that the tuner does in it, by rule and outcome."""
    levels = [level for level, ticks in COURSE for _ in range(ticks)]
    when: dict[str, int] = {}
    made = _made(name)
    for tick, level in enumerate(levels):
        made.level = level
        made.pass_ticks(1)
        for path in made.took:
            rule, _, outcome = path.rpartition(":")
            if outcome in EVENTFUL and (rule or outcome == "taken back"):
                when.setdefault(path, max(0, tick - LEAD))
    found: dict[str, Deployment] = {}
    made = _made(name)
    for tick, level in enumerate(levels):
        for path in (path for path, at in when.items() if at == tick):
            found[path] = made.copy()
            found[path].level = levels[min(tick + LEAD, len(levels) - 1)]  # the one that makes it happen
        made.level = level
        made.pass_ticks(1)
        change = made.state.change
        if change is not None and made.state.phase in TRYING and f"{change.rule}:Tried" not in found:
            found[f"{change.rule}:Tried"] = made.copy()
            found[f"{change.rule}:Aborted"] = _asked(made, 60, pause={})
        if change is None and len(made.state.generations) > 1 and "rollback:RolledBack" not in found:
            first, pinned = (
                made.state.generations[0].number,
                _asked(made, 6, pin={"knob": "numWorkers", "value": 3}),
            )
            found["rollback:RolledBack"] = _asked(made, 600, rollback={"to": first})
            found["pin:Pinned"] = pinned.copy()
            pinned.pass_ticks(1)
            found["pin:Unpinned"] = pinned
    return found


def _asked(now: Deployment, ttl_s: int, **what: Mapping[str, Any]) -> Deployment:
    """The deployment with an override that was just created."""
    made = now.copy()
    made.ask(ttl_s, **what)
    return made


def moments(name: str) -> tuple[str, ...]:
    """What the tuner does in a scene, as ``rule:outcome``, and what overrides ask of it there.

    ``Tried`` is a candidate whose verdict is not near.
    """
    return tuple(_moments(name))


def shortly_before(name: str, path: str) -> Deployment:
    """The scene ``LEAD`` ticks before the tuner does that."""
    return _moments(name)[path].copy()
