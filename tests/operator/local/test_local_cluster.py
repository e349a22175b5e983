"""The resource as files: identity kept, edits counted, what cannot change refused, records bounded."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvpilot_operator.local.cluster import LocalCluster, memory_limit, quantity
from kvpilot_operator.local.state import BusyError, StateDirectory
from kvpilot_operator.local.watch import document_of, watch
from kvpilot_operator.ports import Conflict, Key
from kvpilot_operator.spec.errors import ManifestError
from kvpilot_operator.spec.models import KVCacheDeployment
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
        tell=lambda _: None,
    )


async def test_a_status_is_written_once_for_what_was_read(tmp_path: Path) -> None:
    cluster = cluster_of(state_in(tmp_path))
    snapshot = await cluster.read(KEY)
    assert snapshot is not None
    assert (snapshot.replicas, snapshot.promoted, snapshot.pods) == (None, None, ())
    written = await cluster.write_status(snapshot, {"observedGeneration": 1})
    with pytest.raises(Conflict):
        await cluster.write_status(snapshot, {"observedGeneration": 0})
    await cluster.write_status(written, {"observedGeneration": 2})
    kept = json.loads((tmp_path / "chat/resource.json").read_text())
    assert kept["status"] == {"observedGeneration": 2}
    assert kept["metadata"]["generation"] == 1
    assert kept["metadata"]["namespace"] == "default"


async def test_a_later_run_goes_on_and_a_fresh_one_does_not(tmp_path: Path) -> None:
    state = state_in(tmp_path)
    cluster = cluster_of(state)
    first = await cluster.read(KEY)
    assert first is not None
    await cluster.write_status(first, {"replicas": 1})
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


async def test_an_edit_counts_and_invalidates_what_was_read(tmp_path: Path) -> None:
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
        await cluster.write_status(before, {})


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
                    "spec": {"containers": [{"name": "engine", "resources": {"limits": {"memory": "0"}}}]}
                }
            ),
            "must be a quantity of bytes like 2Gi, got '0'",
        ),
    ],
)
def test_an_edit_that_cannot_be_used_leaves_the_old_one(
    tmp_path: Path, edited: dict[str, Any], message: str
) -> None:
    cluster = cluster_of(state_in(tmp_path))
    before = cluster.spec
    with pytest.raises(ManifestError) as told:
        cluster.edit(edited)
    assert message in str(told.value)
    assert cluster.spec == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [("64Gi", 64 * 1024**3), ("1.5G", 1_500_000_000), ("512Mi", 512 * 1024**2), ("100k", 100_000), ("7", 7)],
)
def test_quantities_are_kubernetes_own(text: str, expected: int) -> None:
    assert quantity(text, "memory") == expected


def test_the_limit_is_that_of_the_engine_container() -> None:
    containers = [
        {"name": "sidecar", "resources": {"limits": {"memory": "1Gi"}}},
        {"name": "engine", "resources": {"limits": {"memory": "2Gi"}}},
    ]
    spec = KVCacheDeployment.parse(changed(template={"spec": {"containers": containers}})).spec
    assert memory_limit(spec) == 2 * 1024**3
    assert memory_limit(KVCacheDeployment.parse(MANIFEST).spec) is None


def test_a_directory_has_one_owner(tmp_path: Path) -> None:
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


def test_the_mode_of_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(yaml.safe_dump(changed(tuning={"mode": "Auto", "pace": "Fast"})))
    assert document_of(path, "Off")["spec"]["tuning"] == {"mode": "Off", "pace": "Fast"}
    assert document_of(path, None)["spec"]["tuning"]["mode"] == "Auto"


async def test_edits_are_seen_and_bad_ones_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvpilot_operator.local.watch.LOOK_S", 0.01)
    path = tmp_path / "m.yaml"
    path.write_text(yaml.safe_dump(MANIFEST))
    cluster = cluster_of(state_in(tmp_path))
    told: list[str] = []
    applied: list[int] = []
    task = asyncio.create_task(watch(path, None, cluster.edit, lambda: applied.append(1), told.append))
    try:
        await asyncio.sleep(0.05)
        path.write_text("spec: [")
        await _until(lambda: len(told) == 1)
        path.write_text(yaml.safe_dump(changed(replicas=-1)))
        await _until(lambda: len(told) == 2)
        path.unlink()
        path.write_text(yaml.safe_dump(changed(replicas=3)))
        await _until(lambda: len(applied) == 1)
    finally:
        task.cancel()
    assert told[0].startswith(f"edit refused, the old manifest stays: {path}: not valid YAML: line 1")
    assert "spec.replicas: Input should be greater than or equal to 0, got -1" in told[1]
    assert not any("\n" in line for line in told)
    assert cluster.spec.replicas == 3


async def test_a_manifest_that_is_gone_is_told_once_and_its_return_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvpilot_operator.local.watch.LOOK_S", 0.01)
    path, aside = tmp_path / "m.yaml", tmp_path / "aside.yaml"
    path.write_text(yaml.safe_dump(MANIFEST))
    cluster = cluster_of(state_in(tmp_path))
    told: list[str] = []
    task = asyncio.create_task(watch(path, None, cluster.edit, lambda: None, told.append))
    try:
        await asyncio.sleep(0.05)
        path.rename(aside)
        await _until(lambda: len(told) == 1)
        await asyncio.sleep(0.05)
        aside.rename(path)
        await _until(lambda: len(told) == 2)
        path.unlink()
        await _until(lambda: len(told) == 3)
        path.write_text(yaml.safe_dump(changed(replicas=3)))
        await _until(lambda: len(told) == 5)
    finally:
        task.cancel()
    gone, back = f"{path} is gone: the run goes on with the last manifest", f"{path} is back"
    assert told == [gone, back, gone, back, f"edit of {path} applied"]


async def _until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110 - the condition is a plain fact of another task
            await asyncio.sleep(0.01)
