"""The only file that knows Kopf. Handlers see an object change and enqueue a key; the loop does the rest.

No finalizers, hence no timers and no daemons: a resource can be deleted while no operator runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

import kopf

from kvpilot_operator.manifests.names import COMPONENT_LABEL, NAME_LABEL, PART_OF
from kvpilot_operator.ports import Key
from kvpilot_operator.spec.models import GROUP, VERSION

PODS = ("", "v1", "pods")
RESTORED = (("", "v1", "services"), ("", "v1", "serviceaccounts"), ("policy", "v1", "poddisruptionbudgets"))
"""Owned objects that no look reads; what else is owned, a look sees to be gone."""

OWN_SELECTOR = ",".join(f"{label}={value}" for label, value in {**PART_OF, COMPONENT_LABEL: "engine"}.items())
"""Only what is our own is watched, filtered by the server: a cluster may have a great many other pods."""


class Changes:
    """Tells a change that matters from the rest of the events, status writes of our own first of all."""

    def __init__(self) -> None:
        self._seen: dict[str, Any] = {}

    def is_new(self, uid: str, what: Any) -> bool:
        """Whether ``what`` matters of the object is not what was seen last; None when it is gone."""
        if what is None:
            self._seen.pop(uid, None)
            return True
        before = self._seen.get(uid)
        self._seen[uid] = what
        return bool(before != what)


async def watch(
    enqueue: Callable[[Key], None],
    restore: Callable[[Key], None],
    shut_down: Callable[[], Awaitable[None]],
    *,
    namespaces: Collection[str],
    in_cluster: bool,
    stop: asyncio.Event,
) -> None:
    """Watch until SIGTERM, SIGINT or ``stop``; all namespaces when none is given."""
    await kopf.operator(
        registry=registry(enqueue, restore, shut_down, in_cluster=in_cluster),
        settings=settings(),
        standalone=True,
        clusterwide=not namespaces,
        namespaces=namespaces,
        stop_flag=stop,
    )


def registry(
    enqueue: Callable[[Key], None],
    restore: Callable[[Key], None],
    shut_down: Callable[[], Awaitable[None]],
    *,
    in_cluster: bool,
) -> kopf.OperatorRegistry:
    """Handlers that enqueue keys.

    Args:
        restore: called for a resource of whose objects one was deleted or edited.
        shut_down: awaited when the operator is told to stop, before its watches end.
        in_cluster: log in as the pod's service account, else by the kubeconfig of ``$KUBECONFIG``.
    """
    handlers = kopf.OperatorRegistry()
    changes = Changes()

    @kopf.on.login(registry=handlers)
    def log_in(settings: kopf.OperatorSettings, **_: Any) -> kopf.ConnectionInfo | None:
        method = kopf.login_with_service_account if in_cluster else kopf.login_with_kubeconfig
        return method(settings=settings)

    @kopf.on.cleanup(registry=handlers)
    async def stop(**_: Any) -> None:
        await shut_down()

    @kopf.on.event(GROUP, VERSION, "kvcachedeployments", registry=handlers)
    async def resource_changed(event: kopf.RawEvent, **_: Any) -> None:
        meta = event["object"]["metadata"]
        if changes.is_new(meta["uid"], _of_resource(meta) if _exists(event) else None):
            enqueue(Key(meta["namespace"], meta["name"]))

    @kopf.on.event(GROUP, VERSION, "kvcacheoverrides", registry=handlers)
    async def override_changed(event: kopf.RawEvent, **_: Any) -> None:
        item = event["object"]
        enqueue(Key(item["metadata"]["namespace"], item["spec"]["target"]))

    @kopf.on.event(*PODS, registry=handlers)
    async def pod_changed(event: kopf.RawEvent, **_: Any) -> None:
        meta, status = event["object"]["metadata"], event["object"].get("status") or {}
        owner = meta.get("labels", {}).get(NAME_LABEL)
        if owner and changes.is_new(meta["uid"], _of_pod(meta, status) if _exists(event) else None):
            enqueue(Key(meta["namespace"], owner))

    async def owned_changed(event: kopf.RawEvent, **_: Any) -> None:
        item, there = event["object"], _exists(event)
        meta = item["metadata"]
        owner = meta.get("labels", {}).get(NAME_LABEL)
        new = changes.is_new(meta["uid"], (item.get("spec"), meta.get("labels")) if there else None)
        # What is listed at the start, or was just made, is as it should be.
        if owner and new and event["type"] in {"MODIFIED", "DELETED"}:
            restore(Key(meta["namespace"], owner))

    for kind in RESTORED:
        kopf.on.event(*kind, registry=handlers)(owned_changed)

    return handlers


def settings() -> kopf.OperatorSettings:
    """How Kopf shall behave: no peering, no Events and no scans of its own, time-outs everywhere."""
    made = kopf.OperatorSettings()
    made.peering.standalone = True
    made.scanning.disabled = True
    made.posting.enabled = False
    made.networking.connect_timeout = 10
    made.networking.request_timeout = 60
    made.watching.connect_timeout = 10
    for kind in (PODS, *RESTORED):
        made.watching.label_selectors[kind] = OWN_SELECTOR
    made.persistence.finalizer = f"{GROUP}/never-set"
    made.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=GROUP)
    made.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=GROUP)
    return made


def _exists(event: kopf.RawEvent) -> bool:
    return event["type"] != "DELETED"


def _of_resource(meta: Mapping[str, Any]) -> Any:
    return meta.get("generation"), "deletionTimestamp" in meta


def _of_pod(meta: Mapping[str, Any], status: Mapping[str, Any]) -> Any:
    conditions = {item["type"]: item["status"] for item in status.get("conditions") or ()}
    restarts = sum(int(item.get("restartCount", 0)) for item in status.get("containerStatuses") or ())
    return (
        status.get("phase"),
        conditions.get("Ready"),
        conditions.get("PodScheduled"),
        restarts,
        "deletionTimestamp" in meta,
    )
