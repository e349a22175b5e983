"""The reconciler against a cluster in memory: what it reports when a part fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pytest

from kvpilot_engine.contract import AdminConfig, ApplyReport, ConfigPatch
from kvpilot_operator.ports import Conflict, EngineCallError
from kvpilot_operator.reconcile.reconciler import MAX_PASSES, Reconciler
from kvpilot_operator.status.codec import encode_status
from kvpilot_operator.status.model import Status
from kvpilot_operator.status.overrides import Overrides, Verdict
from kvpilot_operator.status.snapshot import Key, Replica, Snapshot
from kvpilot_operator.tuning.decision import Record
from kvpilot_operator.tuning.observation import Approval, Boost, Gauges, Pin, Promoted, Rollback, Sample

CHAT = Key("team-a", "chat")


@dataclass
class World:
    """One resource whose workload has one replica and whose minimum is three; no engine, no metrics."""

    snapshot: Snapshot | None = None
    failing: set[str] = field(default_factory=set)
    conflicts: int = 0
    results: int = 0
    now: float = 1_764_000_000.0
    interval_s: float = 0.0
    seen_s: float = 0.0
    rolled_out: int = 0
    taken_over: list[int] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    events: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        manifest = {
            "apiVersion": "kvpilot.io/v1alpha1",
            "kind": "KVCacheDeployment",
            "metadata": {"name": "chat", "namespace": "team-a", "uid": "u", "generation": 1},
            "spec": {"scaling": {"min": 3, "max": 4}},
        }
        self.snapshot = Snapshot(CHAT, manifest, desired_replicas=1, replicas=(), promoted=Promoted(1, {}))

    def _may(self, what: str) -> None:
        if what in self.failing:
            raise ConnectionError(f"{what}: the API server is away")
        self.done.append(what)

    async def keys(self) -> list[Key]:
        return [CHAT]

    async def read(self, key: Key) -> Snapshot | None:
        self.results += 1
        return self.snapshot

    async def roll_out(self, snapshot: Snapshot, config: Promoted) -> None:
        self._may("roll_out")
        self.rolled_out += 1

    async def write_status(self, snapshot: Snapshot, status: Status) -> Snapshot:
        if self.conflicts:
            self.conflicts -= 1
            raise Conflict("written meanwhile")
        self._may("write_status")
        self.snapshot = replace(snapshot, manifest={**snapshot.manifest, "status": encode_status(status)})
        return self.snapshot

    async def write_config(self, snapshot: Snapshot, config: Promoted) -> None:
        self._may("write_config")

    async def prefer_removal(self, snapshot: Snapshot, uids: Sequence[str]) -> None:
        self._may("prefer_removal")

    async def recycle(self, snapshot: Snapshot, uid: str) -> None:
        self._may("recycle")

    async def scale(self, snapshot: Snapshot, replicas: int) -> None:
        self._may("scale")
        self.snapshot = replace(snapshot, desired_replicas=replicas)

    async def take_over_replicas(self, snapshot: Snapshot, replicas: int) -> None:
        self._may("take_over_replicas")
        assert self.snapshot is not None
        if self.snapshot.desired_replicas != replicas:
            raise Conflict(f"{replicas} replicas are no longer asked for")
        self.taken_over.append(replicas)
        self.snapshot = replace(self.snapshot, replicas_managed_by="")

    async def record(self, snapshot: Snapshot, record: Record) -> None:
        self._may("record")
        self.records.append(record)

    async def recorded(self, snapshot: Snapshot) -> Sequence[Mapping[str, Any]]:
        self._may("recorded")
        return [asdict(record) for record in self.records]

    async def event(self, snapshot: Snapshot, kind: str, reason: str, message: str) -> None:
        self.events.append((reason, message))

    def scrape_s(self, key: Key) -> float:
        return self.interval_s

    async def samples(self, windows: Mapping[Key, Mapping[str, float]]) -> dict[Key, dict[str, Sample]]:
        seen = Sample({}, Gauges(), 0.0, 0.0, scrape_s=self.seen_s)
        return {CHAT: {"u0": seen}} if self.seen_s else {}

    async def describe(self, replica: Replica) -> AdminConfig:
        raise EngineCallError("no engine", "unreachable")

    async def apply(self, replica: Replica, patch: ConfigPatch) -> ApplyReport:
        raise EngineCallError("no engine", "unreachable")

    @property
    def status(self) -> dict[str, Any]:
        assert self.snapshot is not None
        return dict(self.snapshot.manifest["status"])


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def loop(world: World) -> Reconciler:
    return Reconciler(world, world, world, clock=lambda: world.now)


async def test_a_decision_whose_action_fails_is_shown_whole_and_once(world: World, loop: Reconciler) -> None:
    world.failing.add("scale")
    with pytest.raises(ConnectionError, match="scale: the API server is away"):
        await loop.run_once(CHAT)
    assert [(r.outcome, r.summary) for r in world.records] == [
        ("ScaledOut", "The minimum is 3; replicas 1 -> 3.")
    ]
    assert [(item["id"], item["outcome"]) for item in world.status["decisions"]] == [("d-0001", "ScaledOut")]
    world.failing.clear()
    await loop.run_once(CHAT)
    assert world.snapshot is not None
    assert world.snapshot.desired_replicas == 3, "asked for again"
    assert len(world.records) == len([reason for reason, _ in world.events if reason == "ScaledOut"]) == 1


async def test_a_record_that_cannot_be_kept_holds_no_action_up_and_is_kept_later(
    world: World, loop: Reconciler
) -> None:
    world.failing.add("record")
    await loop.run_once(CHAT)
    assert world.snapshot is not None
    assert (world.snapshot.desired_replicas, world.records) == (3, [])
    world.failing.clear()
    await loop.run_once(CHAT)
    await loop.run_once(CHAT)
    assert [record.id for record in world.records] == ["d-0001"]


async def test_after_a_lost_status_old_records_keep_their_numbers(world: World, loop: Reconciler) -> None:
    await loop.run_once(CHAT)
    world.snapshot = replace(world.snapshot, manifest={**world.snapshot.manifest, "status": {}})
    world.snapshot = replace(world.snapshot, desired_replicas=1)
    await loop.run_once(CHAT)
    await loop.run_once(CHAT)
    assert [record.id for record in world.records] == ["d-0001", "d-0002"]
    assert world.done.count("recorded") == 2, "read only where the status tells nothing"


async def test_conflicts_without_end_are_not_a_resource_that_is_gone(world: World, loop: Reconciler) -> None:
    world.conflicts = MAX_PASSES
    with pytest.raises(Conflict, match=f"team-a/chat changed during each of {MAX_PASSES} reconciles"):
        await loop.run_once(CHAT)
    world.conflicts = MAX_PASSES - 1
    assert await loop.run_once(CHAT) is not None
    world.snapshot = None
    assert await loop.run_once(CHAT) is None


async def test_owned_objects_are_applied_once_until_one_of_them_is_lost(
    world: World, loop: Reconciler
) -> None:
    for _ in range(3):
        await loop.run_once(CHAT)
    assert world.rolled_out == 1
    loop.forget(CHAT)
    await loop.run_once(CHAT)
    assert world.rolled_out == 2
    assert world.snapshot is not None
    world.snapshot = replace(world.snapshot, token_lost=True)
    await loop.run_once(CHAT)
    assert world.rolled_out == 3


async def test_windows_never_fall_below_what_the_configured_interval_allows(
    world: World, loop: Reconciler
) -> None:
    """Five scrapes at the edges of a window of four look like a source that is faster than it is."""
    world.interval_s, world.seen_s = 20.0, 16.0
    for _ in range(3):
        result = await loop.run_once(CHAT)
        assert result is not None
        assert (result.policy.pace.scrape, result.policy.pace.short) == (20.0, 80.0)
    world.seen_s = 30.0
    for short in (80.0, 120.0):
        result = await loop.run_once(CHAT)
        assert result is not None
        assert result.policy.pace.short == short, "a source that is slower than configured is believed"


async def test_a_roll_out_that_failed_is_tried_again(world: World, loop: Reconciler) -> None:
    world.failing.add("roll_out")
    with pytest.raises(ConnectionError):
        await loop.run_once(CHAT)
    world.failing.clear()
    await loop.run_once(CHAT)
    assert world.rolled_out == 1


async def test_number_of_another_field_manager_is_respected_for_ten_minutes(
    world: World, loop: Reconciler
) -> None:
    assert world.snapshot is not None
    world.snapshot = replace(world.snapshot, replicas_managed_by="kubectl")
    await loop.run_once(CHAT)
    world.now += 600 - 1
    await loop.run_once(CHAT)
    assert (world.snapshot.desired_replicas, world.taken_over) == (1, [])
    world.now += 1
    await loop.run_once(CHAT)
    assert (world.snapshot.desired_replicas, world.taken_over) == (1, [1])
    await loop.run_once(CHAT)
    assert world.snapshot.desired_replicas == 3, "the minimum again"
    (conflict,) = [c for c in world.status["conditions"] if c["type"] == "FieldManagerConflict"]
    assert conflict["status"] == "False"


async def test_number_that_changes_before_the_takeover_is_not_overwritten(
    world: World, loop: Reconciler, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert world.snapshot is not None
    world.snapshot = replace(world.snapshot, replicas_managed_by="kubectl")
    await loop.run_once(CHAT)
    world.now += 600

    async def meanwhile(windows: Mapping[Key, Mapping[str, float]]) -> dict[Key, dict[str, Sample]]:
        assert world.snapshot is not None
        world.snapshot = replace(world.snapshot, desired_replicas=2)
        return {}

    monkeypatch.setattr(world, "samples", meanwhile)  # between the read and the action
    await loop.run_once(CHAT)
    assert (world.snapshot.desired_replicas, world.taken_over) == (2, [2])


@pytest.mark.parametrize("spec", [{"replicas": 5}, {"replicas": 5, "tuning": {"mode": "Off"}}])
@pytest.mark.parametrize("paused_by", ["", "stop"])
async def test_replicas_follow_the_spec_in_every_mode(
    world: World, loop: Reconciler, spec: dict[str, Any], paused_by: str
) -> None:
    assert world.snapshot is not None
    world.snapshot.manifest["spec"] = spec
    world.snapshot = replace(world.snapshot, overrides=Overrides(paused_by=paused_by))
    await loop.run_once(CHAT)
    assert (world.snapshot.desired_replicas, world.records) == (5, [])


async def test_an_autoscaler_is_not_fought_however_long_it_is_there(world: World, loop: Reconciler) -> None:
    assert world.snapshot is not None
    world.snapshot.manifest["spec"] = {"replicas": 5}
    found = "HorizontalPodAutoscaler hpa"
    world.snapshot = replace(world.snapshot, replicas_managed_by=found, autoscaler=found)
    for _ in range(2):
        await loop.run_once(CHAT)
        world.now += 2 * 600
    assert not {"scale", "take_over_replicas"} & set(world.done)
    (conflict,) = [c for c in world.status["conditions"] if c["type"] == "FieldManagerConflict"]
    assert conflict["message"].startswith(f"{found} also writes the number of replicas")


async def test_a_refused_resource_is_shown_from_one_that_is_gone(world: World, loop: Reconciler) -> None:
    assert world.snapshot is not None
    right = world.snapshot
    world.snapshot = replace(right, manifest={**right.manifest, "spec": {"scaling": {"min": 4, "max": 3}}})
    assert await loop.run_once(CHAT) is None
    assert loop.refused == {CHAT}
    world.snapshot = right
    assert await loop.run_once(CHAT) is not None
    assert not loop.refused
    world.snapshot = None
    assert await loop.run_once(CHAT) is None
    assert not loop.refused


async def test_what_overrides_ask_for_reaches_the_tuner_and_what_is_refused_the_status(world: World) -> None:
    assert world.snapshot is not None
    asked = {
        "paused_by": "stop",
        "scaling_paused": True,
        "boosts": (Boost("more", 4, world.now + 60),),
        "pins": (Pin("keep", "numWorkers", 8, world.now + 60),),
        "approvals": (Approval("yes", "d-0001", "ana"),),
        "rollback": Rollback("back", 1, "ana"),
    }
    refused = Verdict("lost", "pin", False, "Contradicts", "newer is newer", world.now + 60)
    world.snapshot = replace(world.snapshot, overrides=Overrides(verdicts=(refused,), **asked))
    result = await Reconciler(world, world, world, clock=lambda: world.now).run_once(CHAT)
    assert result is not None
    assert {name: getattr(result.observation, name) for name in asked} == asked
    found = {item["type"]: item for item in world.status["conditions"]}
    assert found["Paused"]["message"].startswith("KVCacheOverride stop pauses tuning and scaling")
    obeyed = found["OverridesObeyed"]
    assert (obeyed["status"], obeyed["reason"]) == ("False", "Contradicts")
    assert obeyed["message"] == "lost: newer is newer"
    assert ("Contradicts", "lost: newer is newer") in world.events
