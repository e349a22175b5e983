"""Overrides in the API server: those that alerts create, verdicts in the status, expired ones."""

from __future__ import annotations

from typing import Any

import pytest

from kvpilot_operator.adapters.kubernetes import overrides
from kvpilot_operator.adapters.kubernetes.api import ApiError, JsonObject, KubernetesApi, path_of
from kvpilot_operator.status.overrides import overrides_of
from kvpilot_operator.status.snapshot import Key, Snapshot

NOW = 1_795_399_200.0  # 2026-11-23T02:00:00Z
LATER = "2026-11-23T03:00:00Z"


def override(
    name: str, expires: str = "2026-11-23T02:10:00Z", target: str = "chat", **what: Any
) -> dict[str, Any]:
    return {
        "apiVersion": "kvpilot.io/v1alpha1",
        "kind": "KVCacheOverride",
        "metadata": {"name": name},
        "spec": {"target": target, "expiresAt": expires, **what},
    }


def test_boost_of_one_alert_keeps_its_name_and_is_in_force_until_it_expires() -> None:
    long = Key("team-a", "c" * 60)
    snapshot = Snapshot(long, {"metadata": {"name": long.name, "uid": "u"}}, 2, (), None)
    item = overrides.boost_manifest(snapshot, "f1@T1", 3, NOW + 600, "alert Slow" + "!" * 2000)
    name = item["metadata"]["name"]
    assert name == overrides.boost_name(long, "f1@T1") != overrides.boost_name(long, "f2@T1")
    assert len(name) <= 63
    assert item["metadata"]["ownerReferences"][0]["uid"] == "u", "goes with the resource"
    assert len(item["spec"]["reason"]) == 1024
    resource = {"spec": {"scaling": {"min": 1, "max": 4}}}
    (boost,) = overrides_of([item], long.name, resource, NOW).boosts
    assert (boost.name, boost.min_replicas, boost.expires_at) == (name, 3, NOW + 600)
    assert overrides_of([item], long.name, resource, NOW + 600).boosts == ()


class Deletions(KubernetesApi):
    """Refuses every deletion of ``refused`` with ``status``."""

    def __init__(self, refused: str = "", status: int = 0) -> None:
        self.deleted: list[tuple[str, Any]] = []
        self.written: list[JsonObject] = []
        self._refused, self._status = refused, status

    async def request(self, method: str, path: str, body: Any = None, **_: Any) -> JsonObject:
        if self._refused and self._refused in path.split("/"):
            raise ApiError(f"{path}: refused", self._status)
        if method == "PUT":
            assert path.endswith("/status")
            self.written.append(body)
            return {}
        assert method == "DELETE"
        self.deleted.append((path, body))
        return {}


def stored(name: str, expires: str = "2026-11-23T02:00:00Z") -> dict[str, Any]:
    item = override(name, expires, pause={})
    item["metadata"] |= {"namespace": "team-a", "uid": f"u-{name}", "resourceVersion": "7"}
    return item


RESOURCES = {Key("team-a", "chat"): {"spec": {"replicas": 1}}}


def judged(*items: JsonObject) -> list[overrides.Judged]:
    return overrides.judged(items, RESOURCES, NOW)


def names(found: list[overrides.Judged]) -> list[str]:
    return [item["metadata"]["name"] for item, _ in found]


async def test_only_overrides_that_are_over_are_deleted_and_only_if_unchanged() -> None:
    api = Deletions()
    found = judged(stored("a"), stored("b", "2026-11-23T02:00:01Z"))
    assert names(await overrides.delete_over(api, found)) == ["a"]
    assert api.deleted == [
        (
            path_of("kvpilot.io/v1alpha1", "KVCacheOverride", "team-a", "a"),
            {"preconditions": {"uid": "u-a", "resourceVersion": "7"}},
        )
    ]


@pytest.mark.parametrize("status", [404, 409])
async def test_override_that_changed_or_is_gone_is_skipped(status: int) -> None:
    api = Deletions("a", status)
    assert names(await overrides.delete_over(api, judged(stored("a"), stored("b")))) == ["b"]
    assert [path.rsplit("/", 1)[-1] for path, _ in api.deleted] == ["b"]


async def test_deletion_that_the_api_server_refuses_is_an_error() -> None:
    with pytest.raises(ApiError, match="kvcacheoverrides/a: refused"):
        await overrides.delete_over(Deletions("a", 403), judged(stored("a")))


def reported(api: Deletions) -> list[tuple[str, str, str]]:
    return [
        (item["metadata"]["name"], found["status"], found["reason"])
        for item in api.written
        for found in item["status"]["conditions"]
    ]


async def test_verdict_is_written_into_the_status_once() -> None:
    api = Deletions()
    items = [stored("a", LATER), {**stored("b", LATER), "kind": "KVCacheOverride"}]
    items[1]["spec"]["target"] = "nobody"
    await overrides.report(api, judged(*items), NOW)
    assert reported(api) == [("a", "True", "InForce"), ("b", "False", "NoSuchTarget")]
    assert "there is no KVCacheDeployment nobody" in api.written[1]["status"]["conditions"][0]["message"]
    await overrides.report(again := Deletions(), judged(*api.written), NOW + 1)
    assert again.written == []


async def test_status_of_an_override_that_is_gone_is_not_written() -> None:
    found = judged(stored("a", LATER))
    await overrides.report(Deletions("a", 404), found, NOW)
    with pytest.raises(ApiError):
        await overrides.report(Deletions("a", 403), found, NOW)
