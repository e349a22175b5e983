"""Overrides of a local run: files that are read at each tick, and deleted when they expire."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.operator.local.test_local_cluster import KEY, MANIFEST

from kvpilot_operator.local.cluster import LocalCluster
from kvpilot_operator.local.state import StateDirectory
from kvpilot_operator.local.watch import watch_overrides
from kvpilot_operator.status.overrides import Overrides
from kvpilot_operator.status.snapshot import Snapshot
from kvpilot_operator.tuning.observation import Boost, Pin

NOW = 1_795_399_200.0  # 2026-11-23T02:00:00Z
CREATED = "2026-11-23T01:59:00Z"
EXAMPLES = Path(__file__).parents[3] / "examples"


class Local:
    """A local resource with a clock of its own."""

    def __init__(self, root: Path) -> None:
        self.now = NOW
        self.reported: list[str] = []
        self.state = StateDirectory("chat", root)
        self.state.open()
        manifest = {**MANIFEST, "spec": {"scaling": {"min": 1, "max": 4}}}
        self.cluster = LocalCluster(
            manifest,
            self.state,
            on_event=lambda *_: None,
            on_backends=lambda _: None,
            on_refused=lambda *_: None,
            notify=self.reported.append,
            clock=lambda: self.now,
        )

    async def read(self) -> Snapshot:
        snapshot = await self.cluster.read(KEY)
        assert snapshot is not None
        return snapshot

    def write(self, name: str, text: str | dict[str, Any]) -> Path:
        path = self.state.path / "overrides" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        return path


def override(name: str, target: str = "chat", **what: Any) -> dict[str, Any]:
    return {
        "apiVersion": "kvpilot.io/v1alpha1",
        "kind": "KVCacheOverride",
        "metadata": {"name": name, "creationTimestamp": CREATED},
        "spec": {"target": target, "ttl": "10m", **what},
    }


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    made = Local(tmp_path)
    yield made
    made.state.close()


async def test_overrides_reach_the_snapshot_until_they_expire(local: Local) -> None:
    local.state.overrides.write(override("stop", pause={"scaling": True}))
    local.state.overrides.write(override("more", boost={"minReplicas": 3}))
    local.state.overrides.write(override("keep", pin={"knob": "numWorkers", "value": 8}))
    seen, until = (await local.read()).overrides, NOW + 540
    assert (seen.paused_by, seen.scaling_paused) == ("stop", True)
    assert seen.boosts == (Boost("more", 3, until),)
    assert seen.pins == (Pin("keep", "numWorkers", 8, until),)
    assert (seen.names, seen.refused) == (("keep", "more", "stop"), ())
    local.now = until
    after = (await local.read()).overrides
    assert (replace(after, verdicts=()), after.names) == (Overrides(), ())
    assert [*(local.state.path / "overrides").iterdir()] == []
    assert sorted(local.reported) == [
        "boost of chat ended at 2026-11-23T02:09:00Z",
        "pause of chat ended at 2026-11-23T02:09:00Z",
        "pin of chat ended at 2026-11-23T02:09:00Z",
    ]


async def test_a_file_that_is_no_override_is_shown_and_kept(local: Local) -> None:
    path = local.write("wrong.yaml", "spec: [")
    local.write("other.json", override("other", target="code", pause={}))
    local.write("pin.json", override("pin", pin={"knob": "numWorkers", "value": 500}))
    local.write("notes.txt", "not read")
    found = {
        item.name: (item.in_force, item.reason, item.message)
        for item in (await local.read()).overrides.refused
    }
    assert found["wrong"][:2] == (False, "Invalid")
    assert found["wrong"][2].startswith("wrong.yaml: not valid YAML: line 1")
    assert found["other"] == (False, "NoSuchTarget", "its target is code")
    assert found["pin"][2].startswith("pin.json: spec.pin.value: numWorkers must be")
    assert path.exists()


async def test_examples_are_taken_as_they_are(local: Local) -> None:
    """Their ttl counts from when the file was written, since no API server gave them a creation time."""
    for path in EXAMPLES.glob("override-*.yaml"):
        written = local.write(path.name, path.read_text())
        assert yaml.safe_load(path.read_text())["spec"]["target"] == "chat"
    local.now = written.stat().st_mtime + 1
    seen = await local.read()
    assert seen.overrides.paused_by == "override-pause"
    assert [(boost.name, boost.min_replicas) for boost in seen.overrides.boosts] == [("override-boost", 6)]
    assert local.reported == []


async def test_run_wakes_up_when_an_override_is_written(local: Local) -> None:
    woken = asyncio.Event()
    watching = asyncio.create_task(watch_overrides(local.state.overrides, woken.set))
    await asyncio.sleep(0)
    try:
        local.state.overrides.write(override("stop", pause={}))
        async with asyncio.timeout(60):
            await woken.wait()
        woken.clear()
        local.state.overrides.delete("stop")
        async with asyncio.timeout(60):
            await woken.wait()
    finally:
        watching.cancel()


def test_fresh_run_has_no_overrides(local: Local) -> None:
    local.state.overrides.write(override("stop", pause={}))
    local.state.clear(fresh=False)
    assert len(local.state.overrides.read()[0]) == 1
    local.state.clear(fresh=True)
    assert local.state.overrides.read() == ([], [])
