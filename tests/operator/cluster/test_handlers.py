"""What the watches enqueue, and how Kopf is configured."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvpilot_operator.cluster import handlers
from kvpilot_operator.status.snapshot import Key


class Watch:
    """The registered handlers, called as Kopf calls them."""

    def __init__(self) -> None:
        self.keys: list[Key] = []
        self.restored: list[Key] = []
        self.stopped = 0
        self.overridden = 0
        self.registry = handlers.registry(
            self.keys.append, self.restored.append, self.stop, self.override, in_cluster=False
        )

    def override(self) -> None:
        self.overridden += 1

    async def stop(self) -> None:
        self.stopped += 1

    def notify(self, handler: str, kind: str | None, item: dict[str, Any]) -> None:
        found = next(h for h in self.registry._watching.get_all_handlers() if h.id.endswith(handler))
        asyncio.run(found.fn(event={"type": kind, "object": item}, body={}, unrelated=1))  # type: ignore[call-arg]


@pytest.fixture
def watch() -> Watch:
    return Watch()


def resource(generation: int = 1, **meta: Any) -> dict[str, Any]:
    return {"metadata": {"namespace": "a", "name": "chat", "uid": "u1", "generation": generation, **meta}}


def pod(ready: str, owner: str | None = "chat") -> dict[str, Any]:
    labels = {"kvpilot.io/name": owner} if owner else {}
    return {
        "metadata": {"namespace": "a", "name": "chat-1", "uid": "p1", "labels": labels},
        "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": ready}]},
    }


def test_a_new_spec_is_looked_at_and_a_status_of_our_own_is_not(watch: Watch) -> None:
    watch.notify("resource_changed", None, resource())
    watch.notify("resource_changed", "MODIFIED", resource(resourceVersion="2"))
    assert watch.keys == [Key("a", "chat")]
    watch.notify("resource_changed", "MODIFIED", resource(generation=2))
    watch.notify("resource_changed", "MODIFIED", resource(generation=2, deletionTimestamp="now"))
    watch.notify("resource_changed", "DELETED", resource(generation=2))
    assert len(watch.keys) == 4


def test_an_override_brings_the_look_at_its_target_forward(watch: Watch) -> None:
    item = {"metadata": {"namespace": "a", "name": "o", "uid": "o1"}, "spec": {"target": "chat"}}
    watch.notify("override_changed", "ADDED", item)
    watch.notify("override_changed", "MODIFIED", {**item, "status": {"kind": "pause"}})  # our own write
    watch.notify("override_changed", "DELETED", item)
    assert watch.keys == [Key("a", "chat")] * 2
    assert watch.overridden == 2


def test_a_pod_counts_when_something_of_it_turned(watch: Watch) -> None:
    for ready in ("False", "False", "True"):
        watch.notify("pod_changed", "MODIFIED", pod(ready))
    watch.notify("pod_changed", "MODIFIED", pod("True", owner=None))
    assert watch.keys == [Key("a", "chat")] * 2


def service(uid: str = "s1", owner: str | None = "chat", **spec: Any) -> dict[str, Any]:
    labels = {"kvpilot.io/name": owner} if owner else {}
    return {
        "metadata": {"namespace": "a", "name": "chat", "uid": uid, "labels": labels},
        "spec": spec,
        "status": {},
    }


def test_an_owned_object_that_is_deleted_or_edited_is_restored_at_once(watch: Watch) -> None:
    watched = {(h.selector.group, h.selector.any_name) for h in watch.registry._watching.get_all_handlers()}
    assert {("", "services"), ("", "serviceaccounts"), ("policy", "poddisruptionbudgets")} <= watched
    watch.notify("owned_changed", None, service(type="ClusterIP"))
    watch.notify("owned_changed", "MODIFIED", {**service(type="ClusterIP"), "status": {"loadBalancer": {}}})
    watch.notify("owned_changed", "ADDED", service("s2"))
    watch.notify("owned_changed", "DELETED", service("s3", owner=None))
    assert watch.restored == [], "as it should be, or not ours"
    watch.notify("owned_changed", "MODIFIED", service(type="NodePort"))
    assert watch.restored == [Key("a", "chat")]
    watch.notify("owned_changed", "DELETED", service(type="NodePort"))
    assert (watch.restored, watch.keys) == ([Key("a", "chat")] * 2, [])


def test_kopf_needs_no_finalizer_no_scan_no_peering_and_decodes_our_pods_only() -> None:
    settings = handlers.settings()
    assert settings.scanning.disabled
    assert settings.peering.standalone
    assert not settings.posting.enabled
    selectors = settings.watching.label_selectors
    assert {selector.any_name for selector in selectors} == {
        "pods", "services", "serviceaccounts", "poddisruptionbudgets"
    }  # fmt: skip
    assert set(selectors.values()) == {"app.kubernetes.io/part-of=kvpilot,app.kubernetes.io/component=engine"}
    made = Watch().registry
    assert not made._changing.get_all_handlers()
    assert not made._spawning.get_all_handlers()
