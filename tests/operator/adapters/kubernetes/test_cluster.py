"""What the adapter reads, checks and writes, against an API server in memory."""

from __future__ import annotations

from typing import Any

import pytest

from kvpilot_operator.adapters.kubernetes.api import ApiError, JsonObject, KubernetesApi, path_of
from kvpilot_operator.adapters.kubernetes.cluster import KubernetesCluster
from kvpilot_operator.ports import Conflict
from kvpilot_operator.resource.errors import ManifestError
from kvpilot_operator.status.snapshot import Key, Snapshot
from kvpilot_operator.tuning.decision import Record
from kvpilot_operator.tuning.observation import Promoted

CHAT = Key("team-a", "chat")
NOW = 1_795_399_200.0  # 2026-11-23T02:00:00Z
OWNER = {"ownerReferences": [{"uid": "u"}]}
RESOURCE: JsonObject = {
    "apiVersion": "kvpilot.io/v1alpha1",
    "kind": "KVCacheDeployment",
    "metadata": {"name": "chat", "namespace": "team-a", "uid": "u", "generation": 1, "resourceVersion": "9"},
    "spec": {"scaling": {"min": 1, "max": 4}},
}
SECRET = path_of("v1", "Secret", "team-a", "chat-admin")
DEPLOYMENT = path_of("apps/v1", "Deployment", "team-a", "chat")
AUTOSCALERS = path_of("autoscaling/v2", "HorizontalPodAutoscaler", "team-a")
LISTED = {"pods", "kvcacheoverrides", "kvcachedeployments", "horizontalpodautoscalers"}
DECISIONS = path_of("v1", "ConfigMap", "team-a", "chat-decisions")
EVENTS = path_of("events.k8s.io/v1", "Event", "team-a")


class Api(KubernetesApi):
    """Objects by path. What is applied or created is kept in the order in which it came."""

    def __init__(self) -> None:
        self.items: dict[str, JsonObject] = {
            path_of("kvpilot.io/v1alpha1", "KVCacheDeployment", *CHAT): RESOURCE
        }
        self.lists: dict[str, list[JsonObject]] = {}
        self.written: list[tuple[str, JsonObject]] = []
        self.asked: list[str] = []
        self.unseen = 0  # status with which a dry run is refused
        self.refused = ""  # path of what may not be written

    async def request(self, method: str, path: str, body: Any = None, **options: Any) -> JsonObject:
        self.asked.append(path)
        if method == "GET":
            if path in self.items:
                return self.items[path]
            if path.rsplit("/", 1)[-1] in LISTED:
                return {"items": self.lists.get(path, [])}
            raise ApiError(f"{path}: 404", 404)
        if options.get("dryRun"):
            assert "as=PartialObjectMetadata" in options["accept"], "nobody reads Secrets"
            assert set(body) == {"apiVersion", "kind", "metadata"}
            if self.unseen:
                raise ApiError("denied", self.unseen)
            held = self.items.get(path, {"metadata": {"uid": "never", "creationTimestamp": "now"}})
            return {"kind": "PartialObjectMetadata", "metadata": held["metadata"]}
        if path == self.refused:
            raise ApiError("exceeded quota", 403)
        self.written.append((path, body))
        return {} if isinstance(body, list) else dict(body)


@pytest.fixture
def api() -> Api:
    return Api()


@pytest.fixture
def cluster(api: Api) -> KubernetesCluster:
    return KubernetesCluster(api, b"k" * 32, clock=lambda: NOW)


async def read(cluster: KubernetesCluster) -> Snapshot:
    snapshot = await cluster.read(CHAT)
    assert snapshot is not None
    return snapshot


def secret(writer: str = "kvpilot", **metadata: Any) -> JsonObject:
    entry = {"manager": writer, "fieldsV1": {"f:data": {"f:token": {}}}}
    return {"metadata": {"resourceVersion": "1", "managedFields": [entry], **metadata}}


@pytest.mark.parametrize(
    ("held", "lost"),
    [(None, True), (secret(**OWNER), False), (secret("kubectl-edit", **OWNER), True), (secret(), True)],
    ids=["deleted", "ours", "edited", "theirs"],
)
async def test_a_token_that_is_gone_or_edited_is_seen_by_who_may_not_read_it(
    api: Api, cluster: KubernetesCluster, held: JsonObject | None, lost: bool
) -> None:
    if held is not None:
        api.items[SECRET] = held
    assert (await read(cluster)).token_lost is lost


async def test_a_secret_of_somebody_else_is_neither_taken_nor_written(
    api: Api, cluster: KubernetesCluster
) -> None:
    api.items[SECRET] = secret("helm")
    with pytest.raises(ManifestError, match="Secret chat-admin exists and is not this resource's"):
        await cluster.roll_out(await read(cluster), Promoted(1, {}))
    assert api.written == []
    del api.items[SECRET]
    await cluster.roll_out(await read(cluster), Promoted(1, {}))
    assert SECRET in [path for path, _ in api.written]


def deployment(manager: str) -> JsonObject:
    entry = {"manager": manager, "subresource": "scale", "fieldsV1": {"f:spec": {"f:replicas": {}}}}
    metadata = {
        "name": "chat", "namespace": "team-a", "resourceVersion": "7", "managedFields": [entry], **OWNER
    }  # fmt: skip
    failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": "quota"}
    return {"metadata": metadata, "spec": {"replicas": 3}, "status": {"conditions": [failure]}}


async def test_autoscalers_are_asked_for_where_one_wrote_the_replicas(
    api: Api, cluster: KubernetesCluster
) -> None:
    api.items[DEPLOYMENT] = deployment("kubectl")
    snapshot = await read(cluster)
    assert (snapshot.replicas_managed_by, snapshot.replica_failure) == ("kubectl", "FailedCreate: quota")
    assert AUTOSCALERS not in api.asked
    api.items[DEPLOYMENT] = deployment("kube-controller-manager")
    theirs = {
        "metadata": {"name": "hpa"},
        "spec": {"scaleTargetRef": {"kind": "Deployment", "name": "chat"}},
    }
    api.lists[AUTOSCALERS] = [theirs]
    assert (await read(cluster)).replicas_managed_by == "HorizontalPodAutoscaler hpa"
    api.lists[AUTOSCALERS] = []
    assert (await read(cluster)).replicas_managed_by == ""


async def test_the_number_of_replicas_is_taken_over_as_it_is(api: Api, cluster: KubernetesCluster) -> None:
    api.items[DEPLOYMENT] = deployment("kubectl")
    await cluster.take_over_replicas(await read(cluster), 3)
    (path, scale), (_, patch) = api.written
    assert scale["metadata"]["resourceVersion"] == "7"
    assert [(step["op"], step["path"], step["value"]) for step in patch] == [
        ("test", "/metadata/resourceVersion", "7"),
        ("replace", "/metadata/managedFields", []),
    ]
    assert (path, scale["spec"]) == (f"{DEPLOYMENT}/scale", {"replicas": 3})


async def test_replicas_that_changed_are_not_taken_over(api: Api, cluster: KubernetesCluster) -> None:
    api.items[DEPLOYMENT] = deployment("kubectl")
    snapshot = await read(cluster)
    api.items[DEPLOYMENT]["spec"] = {"replicas": 4}
    with pytest.raises(Conflict, match="team-a/chat no longer asks for 3 replicas"):
        await cluster.take_over_replicas(snapshot, 3)
    assert api.written == []


@pytest.mark.parametrize("status", [403, 422, 500])
async def test_a_secret_that_cannot_be_seen_holds_up_no_look(
    api: Api, cluster: KubernetesCluster, status: int
) -> None:
    api.unseen = status
    assert (await read(cluster)).token_lost is False


async def test_what_a_policy_refuses_is_read_of_the_real_object(api: Api, cluster: KubernetesCluster) -> None:
    api.unseen = 422
    snapshot = await read(cluster)
    await cluster.roll_out(snapshot, Promoted(1, {}))
    assert SECRET in [path for path, _ in api.written], "the empty one was refused, the real one is not"
    api.refused = SECRET
    with pytest.raises(ManifestError, match="Secret chat-admin is refused: exceeded quota"):
        await cluster.roll_out(snapshot, Promoted(1, {}))


async def test_the_second_breach_within_minutes_is_an_event_as_well(
    api: Api, cluster: KubernetesCluster
) -> None:
    snapshot = await read(cluster)
    for reason, message in (("Breached", "p95."), ("AllMet", "met."), ("Breached", "p95.")):
        await cluster.event(snapshot, "Normal", reason, message)
    reported = [body["reason"] for path, body in api.written if path == EVENTS]
    assert reported == ["Breached", "AllMet", "Breached"]


def override(name: str, expires: str, target: str = "chat") -> JsonObject:
    return {
        "apiVersion": "kvpilot.io/v1alpha1",
        "kind": "KVCacheOverride",
        "metadata": {"name": name, "namespace": "team-a", "uid": f"u-{name}", "resourceVersion": "7"},
        "spec": {"target": target, "expiresAt": expires, "pause": {}},
    }


async def test_overrides_in_force_are_read_with_the_resource(api: Api, cluster: KubernetesCluster) -> None:
    items = [override("stop", "2026-11-23T03:00:00Z"), override("gone", "2026-11-23T01:00:00Z")]
    items[0]["spec"]["pause"] = {"scaling": True}
    api.lists[path_of("kvpilot.io/v1alpha1", "KVCacheOverride", "team-a")] = items
    asked = (await read(cluster)).overrides
    assert (asked.paused_by, asked.scaling_paused, asked.names) == ("stop", True, ("stop",))


async def test_sweep_tells_the_end_of_an_override_and_why_another_is_not_obeyed(
    api: Api, cluster: KubernetesCluster
) -> None:
    api.lists[path_of("kvpilot.io/v1alpha1", "KVCacheOverride")] = [
        override("gone", "2026-11-23T01:00:00Z"),
        override("stop", "2026-11-23T03:00:00Z"),
        override("lost", "2026-11-23T03:00:00Z", target="chta"),
    ]
    api.lists[path_of("kvpilot.io/v1alpha1", "KVCacheDeployment")] = [RESOURCE]
    assert await cluster.sweep() == [CHAT]
    reported = [body for path, body in api.written if path == EVENTS]
    assert [(item["reason"], item["regarding"]["name"], item["note"]) for item in reported] == [
        ("OverrideExpired", "gone", "pause of chat ended at 2026-11-23T01:00:00Z")
    ]
    statuses = {path.split("/")[-2]: body["status"] for path, body in api.written if path.endswith("/status")}
    assert {name: item["conditions"][0]["reason"] for name, item in statuses.items()} == {
        "stop": "InForce",
        "lost": "NoSuchTarget",
    }


async def test_kept_records_are_read_back_and_broken_lines_left_out(
    cluster: KubernetesCluster, api: Api
) -> None:
    snapshot = await read(cluster)
    assert await cluster.recorded(snapshot) == []
    api.items[DECISIONS] = {"data": {"decisions.jsonl": '{"id"\n'}}
    record = Record("d-0041", NOW, "workers-up", "Started", "Trying.", None, (), generation=17)
    await cluster.record(snapshot, record)
    api.items[DECISIONS] = dict(api.written)[DECISIONS]
    (kept,) = await cluster.recorded(snapshot)
    assert (kept["id"], kept["outcome"], kept["generation"]) == ("d-0041", "Started", 17)
