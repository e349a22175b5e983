"""One pass of the loop against a cluster in memory: what is told when a part of it fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from kvpilot_engine.contract import AdminConfig, ApplyReport, ConfigPatch
from kvpilot_operator.loop import MOST_LOOKS, RIVAL_S, Loop
from kvpilot_operator.ports import Conflict, EngineError, Key, Plan, Replica, Snapshot
from kvpilot_operator.tuning.decision import Record
from kvpilot_operator.tuning.observation import Promoted, Sample

CHAT = Key("team-a", "chat")


@dataclass
class World:
    """One resource whose workload has one replica and whose minimum is three; no engine, no metrics."""

    snapshot: Snapshot | None = None
    failing: set[str] = field(default_factory=set)
    conflicts: int = 0
    looks: int = 0
    now: float = 1_764_000_000.0
    rolled_out: int = 0
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
        self.snapshot = Snapshot(CHAT, manifest, replicas=1, pods=(), promoted=Promoted(1, {}))

    def _may(self, what: str) -> None:
        if what in self.failing:
            raise ConnectionError(f"{what}: the API server is away")
        self.done.append(what)

    async def keys(self) -> list[Key]:
        return [CHAT]

    async def read(self, key: Key) -> Snapshot | None:
        self.looks += 1
        return self.snapshot

    async def roll_out(self, snapshot: Snapshot, config: Promoted) -> None:
        self._may("roll_out")
        self.rolled_out += 1

    async def write_status(self, snapshot: Snapshot, status: Mapping[str, Any]) -> Snapshot:
        if self.conflicts:
            self.conflicts -= 1
            raise Conflict("written meanwhile")
        self._may("write_status")
        self.snapshot = replace(snapshot, manifest={**snapshot.manifest, "status": dict(status)})
        return self.snapshot

    async def write_config(self, snapshot: Snapshot, config: Promoted) -> None:
        self._may("write_config")

    async def scale(self, snapshot: Snapshot, replicas: int) -> None:
        self._may("scale")
        self.snapshot = replace(snapshot, replicas=replicas)

    async def own_replicas(self, snapshot: Snapshot) -> None:
        self._may("own_replicas")
        self.snapshot = replace(snapshot, replicas_managed_by="")

    async def record(self, snapshot: Snapshot, record: Record) -> None:
        self._may("record")
        self.records.append(record)

    async def event(self, snapshot: Snapshot, kind: str, reason: str, message: str) -> None:
        self.events.append((reason, message))

    async def samples(self, windows: Mapping[Key, Mapping[str, float]]) -> dict[Key, dict[str, Sample]]:
        return {}

    async def describe(self, replica: Replica) -> AdminConfig:
        raise EngineError("no engine", "unreachable")

    async def plan(self, replica: Replica, values: Mapping[str, Any]) -> Plan:
        raise EngineError("no engine", "unreachable")

    async def apply(self, replica: Replica, patch: ConfigPatch) -> ApplyReport:
        raise EngineError("no engine", "unreachable")

    @property
    def status(self) -> dict[str, Any]:
        assert self.snapshot is not None
        return dict(self.snapshot.manifest["status"])


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def loop(world: World) -> Loop:
    return Loop(world, world, world, clock=lambda: world.now)


async def test_a_decision_whose_action_fails_is_told_whole_and_once(world: World, loop: Loop) -> None:
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
    assert world.snapshot.replicas == 3, "asked for again"
    assert len(world.records) == len([reason for reason, _ in world.events if reason == "ScaledOut"]) == 1


async def test_a_record_that_cannot_be_kept_holds_no_action_up_and_is_kept_later(
    world: World, loop: Loop
) -> None:
    world.failing.add("record")
    await loop.run_once(CHAT)
    assert world.snapshot is not None
    assert (world.snapshot.replicas, world.records) == (3, [])
    world.failing.clear()
    await loop.run_once(CHAT)
    await loop.run_once(CHAT)
    assert [record.id for record in world.records] == ["d-0001"]


async def test_conflicts_without_end_are_not_a_resource_that_is_gone(world: World, loop: Loop) -> None:
    world.conflicts = MOST_LOOKS
    with pytest.raises(Conflict, match=f"team-a/chat changed during each of {MOST_LOOKS} looks"):
        await loop.run_once(CHAT)
    world.conflicts = MOST_LOOKS - 1
    assert await loop.run_once(CHAT) is not None
    world.snapshot = None
    assert await loop.run_once(CHAT) is None


async def test_owned_objects_are_applied_once_until_one_of_them_is_lost(world: World, loop: Loop) -> None:
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


async def test_a_roll_out_that_failed_is_tried_again(world: World, loop: Loop) -> None:
    world.failing.add("roll_out")
    with pytest.raises(ConnectionError):
        await loop.run_once(CHAT)
    world.failing.clear()
    await loop.run_once(CHAT)
    assert world.rolled_out == 1


async def test_a_number_that_somebody_wrote_is_respected_for_ten_minutes(world: World, loop: Loop) -> None:
    assert world.snapshot is not None
    world.snapshot = replace(world.snapshot, replicas_managed_by="kubectl")
    await loop.run_once(CHAT)
    world.now += RIVAL_S - 1
    await loop.run_once(CHAT)
    assert (world.snapshot.replicas, "own_replicas" in world.done) == (1, False)
    world.now += 1
    await loop.run_once(CHAT)
    assert "own_replicas" in world.done
    assert world.snapshot.replicas == 3, "the minimum again"
    (conflict,) = [c for c in world.status["conditions"] if c["type"] == "ActuatorConflict"]
    assert conflict["status"] == "False"


async def test_an_autoscaler_is_not_fought_however_long_it_is_there(world: World, loop: Loop) -> None:
    assert world.snapshot is not None
    world.snapshot.manifest["spec"] = {"replicas": 5}
    found = "HorizontalPodAutoscaler hpa"
    world.snapshot = replace(world.snapshot, replicas_managed_by=found, autoscaler=found)
    for _ in range(2):
        await loop.run_once(CHAT)
        world.now += 2 * RIVAL_S
    assert not {"scale", "own_replicas"} & set(world.done)
    (conflict,) = [c for c in world.status["conditions"] if c["type"] == "ActuatorConflict"]
    assert conflict["message"].startswith(f"{found} also writes the number of replicas")


async def test_a_refused_resource_is_told_from_one_that_is_gone(world: World, loop: Loop) -> None:
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
