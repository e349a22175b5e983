"""The resource as files: stable identity, edits, refused edits, bounded records."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.waiting import until

from kvpilot_operator.local.cluster import LocalCluster, memory_limit
from kvpilot_operator.local.state import BusyError, StateDirectory
from kvpilot_operator.local.watch import document_of, watch
from kvpilot_operator.ports import Conflict
from kvpilot_operator.resource.errors import ManifestError
from kvpilot_operator.resource.model import KVCacheDeployment
from kvpilot_operator.status.history import last_numbers
from kvpilot_operator.status.model import Status
from kvpilot_operator.status.snapshot import Key
from kvpilot_operator.tuning.decision import Record
from kvpilot_operator.tuning.observation import Promoted

KEY = Key("default", "chat")
MANIFEST: dict[str, Any] = {
    "apiVersion": "kvpilot.io/v1alpha1",
    "kind": "KVCacheDeployment",
    "metadata": {"name": "chat"},
    "spec": {"replicas": 1, "engine": {"config": {"numWorkers": 2}}},
}


def changed(**spec: Any) -> dict[str, Any]:
    return {**MANIFEST, "spec": {**MANIFEST["spec"], **spec}}


_OPEN: list[StateDirectory] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while _OPEN:
        _OPEN.pop().close()


def state_in(root: Path, *, fresh: bool = False) -> StateDirectory:
    state = StateDirectory("chat", root)
    state.open()
    state.clear(fresh=fresh)
    _OPEN.append(state)
    return state


def cluster_of(state: StateDirectory, manifest: dict[str, Any] = MANIFEST) -> LocalCluster:
    return LocalCluster(
        manifest,
        state,
        on_event=lambda *_: None,
        on_backends=lambda _: None,
        on_refused=lambda *_: None,
        notify=lambda _: None,
    )


async def test_status_is_written_once_per_resource_version(tmp_path: Path) -> None:
    cluster = cluster_of(state_in(tmp_path))
    snapshot = await cluster.read(KEY)
    assert snapshot is not None
    assert (snapshot.desired_replicas, snapshot.promoted, snapshot.replicas) == (None, None, ())
    written = await cluster.write_status(snapshot, Status(observed_generation=1))
    with pytest.raises(Conflict):
        await cluster.write_status(snapshot, Status(observed_generation=0))
    await cluster.write_status(written, Status(observed_generation=2))
    kept = json.loads((tmp_path / "chat/resource.json").read_text())
    assert kept["status"] == {"observedGeneration": 2}
    assert kept["metadata"]["generation"] == 1
    assert kept["metadata"]["namespace"] == "default"


async def test_later_run_continues_unless_it_is_fresh(tmp_path: Path) -> None:
    state = state_in(tmp_path)
    cluster = cluster_of(state)
    first = await cluster.read(KEY)
    assert first is not None
    await cluster.write_status(first, Status(replicas=1))
    await cluster.write_config(first, Promoted(7, {"numWorkers": 4}))
    state.close()

    state = state_in(tmp_path)
    again = await cluster_of(state, changed(replicas=2)).read(KEY)
    assert again is not None
    assert again.manifest["metadata"]["uid"] == first.manifest["metadata"]["uid"]
    assert again.manifest["metadata"]["generation"] == 2
    assert again.manifest["status"] == {"replicas": 1}
    assert again.promoted == Promoted(7, {"numWorkers": 4})
    state.close()

    new = await cluster_of(state_in(tmp_path, fresh=True)).read(KEY)
    assert new is not None
    assert new.promoted is None
    assert "status" not in new.manifest
    assert new.manifest["metadata"]["uid"] != first.manifest["metadata"]["uid"]


async def test_edit_raises_the_generation_and_invalidates_earlier_reads(tmp_path: Path) -> None:
    cluster = cluster_of(state_in(tmp_path))
    before = await cluster.read(KEY)
    assert before is not None
    assert not cluster.edit(copy.deepcopy(MANIFEST))
    assert cluster.edit(changed(tuning={"mode": "Off"}))
    after = await cluster.read(KEY)
    assert after is not None
    assert after.manifest["metadata"]["generation"] == 2
    assert after.manifest["spec"]["tuning"] == {"mode": "Off"}
    with pytest.raises(Conflict):
        await cluster.write_status(before, Status())


@pytest.mark.parametrize(
    ("edited", "message"),
    [
        (changed(engine={"model": {"source": "/other"}}), "spec.engine.model: is immutable, got '/other'"),
        ({**MANIFEST, "metadata": {"name": "other"}}, "metadata: default/chat is up"),
        (changed(replicas="many"), "spec.replicas"),
        (
            changed(profile="production", objectives={"latency": {"p95Ms": 50}}),
            "p50Ms <= p95Ms <= p99Ms is required",
        ),
        (
            changed(
                template={
                    "spec": {"containers": [{"name": "engine", "resources": {"limits": {"memory": "500m"}}}]}
                }
            ),
            "resources.limits.memory: must be at least one byte; m means thousandths, Mi means mebibytes, "
            "got '500m'",
        ),
    ],
)
def test_refused_edit_leaves_the_last_manifest_in_force(
    tmp_path: Path, edited: dict[str, Any], message: str
) -> None:
    cluster = cluster_of(state_in(tmp_path))
    before = cluster.spec
    with pytest.raises(ManifestError) as reported:
        cluster.edit(edited)
    assert message in str(reported.value)
    assert cluster.spec == before


def test_memory_limit_is_that_of_the_engine_container() -> None:
    containers = [
        {"name": "sidecar", "resources": {"limits": {"memory": "1Gi"}}},
        {"name": "engine", "resources": {"limits": {"memory": "2Gi"}}},
    ]
    spec = KVCacheDeployment.parse(changed(template={"spec": {"containers": containers}})).spec
    assert memory_limit(spec) == 2 * 1024**3
    assert memory_limit(KVCacheDeployment.parse(MANIFEST).spec) is None


def test_state_directory_has_one_owner(tmp_path: Path) -> None:
    state = state_in(tmp_path)
    with pytest.raises(BusyError, match="chat is already up in"):
        state_in(tmp_path)
    state.close()
    state_in(tmp_path).close()


def test_the_last_50_records_are_kept(tmp_path: Path) -> None:
    state = state_in(tmp_path)
    for number in range(60):
        state.add_record(Record(f"d-{number:04d}", float(number), "r", "Promoted", "s.", None, ()))
    lines = (tmp_path / "chat/decisions.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in (lines[0], lines[-1])] == ["d-0010", "d-0059"]
    assert len(lines) == 50
    assert last_numbers(state.records()) == (59, 0)


def test_mode_of_the_command_line_takes_precedence(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(yaml.safe_dump(changed(tuning={"mode": "Auto", "pace": "Fast"})))
    assert document_of(path, "Off")["spec"]["tuning"] == {"mode": "Off", "pace": "Fast"}
    assert document_of(path, None)["spec"]["tuning"]["mode"] == "Auto"


async def test_edits_are_applied_and_invalid_ones_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvpilot_operator.local.watch.POLL_S", 0.01)
    path = tmp_path / "m.yaml"
    path.write_text(yaml.safe_dump(MANIFEST))
    cluster = cluster_of(state_in(tmp_path))
    reported: list[str] = []
    applied: list[int] = []
    task = asyncio.create_task(watch(path, None, cluster.edit, lambda: applied.append(1), reported.append))
    try:
        await asyncio.sleep(0.05)
        path.write_text("spec: [")
        await until(lambda: len(reported) == 1)
        path.write_text(yaml.safe_dump(changed(replicas=-1)))
        await until(lambda: len(reported) == 2)
        path.unlink()
        path.write_text(yaml.safe_dump(changed(replicas=3)))
        await until(lambda: len(applied) == 1)
    finally:
        task.cancel()
    assert reported[0].startswith(
        f"edit refused, the last manifest stays in force: {path}: not valid YAML: line 1"
    )
    assert "spec.replicas: Input should be greater than or equal to 0, got -1" in reported[1]
    assert not any("\n" in line for line in reported)
    assert cluster.spec.replicas == 3


async def test_removal_and_return_of_the_manifest_are_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvpilot_operator.local.watch.POLL_S", 0.01)
    path, aside = tmp_path / "m.yaml", tmp_path / "aside.yaml"
    path.write_text(yaml.safe_dump(MANIFEST))
    cluster = cluster_of(state_in(tmp_path))
    reported: list[str] = []
    task = asyncio.create_task(watch(path, None, cluster.edit, lambda: None, reported.append))
    try:
        await asyncio.sleep(0.05)
        path.rename(aside)
        await until(lambda: len(reported) == 1)
        await asyncio.sleep(0.05)
        aside.rename(path)
        await until(lambda: len(reported) == 2)
        path.unlink()
        await until(lambda: len(reported) == 3)
        path.write_text(yaml.safe_dump(changed(replicas=3)))
        await until(lambda: len(reported) == 5)
    finally:
        task.cancel()
    gone, back = f"{path} was removed; the last manifest stays in force", f"{path} is back"
    assert reported == [gone, back, gone, back, f"edit of {path} applied"]
