"""Kopf handlers: the only file that imports Kopf. A handler enqueues the key of a changed object.

There are no finalizers, and therefore no Kopf timers or daemons: a resource can be deleted while no operator
runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

import kopf

from kvpilot_operator.manifests.names import COMPONENT_LABEL, NAME_LABEL, PART_OF
from kvpilot_operator.resource.model import GROUP, VERSION
from kvpilot_operator.status.snapshot import Key

PODS = ("", "v1", "pods")
RESTORED = (("", "v1", "services"), ("", "v1", "serviceaccounts"), ("policy", "v1", "poddisruptionbudgets"))
"""Owned objects that a reconcile does not read; it notices itself when another one is gone."""

OWN_SELECTOR = ",".join(f"{label}={value}" for label, value in {**PART_OF, COMPONENT_LABEL: "engine"}.items())
"""The server filters the watches by these labels, since a cluster may have very many other pods."""


class Changes:
    """Filters events that change nothing relevant, such as our own status writes."""

    def __init__(self) -> None:
        self._seen: dict[str, Any] = {}

    def is_new(self, uid: str, what: Any) -> bool:
        """True if the relevant fields of an object changed; ``None`` means that it was deleted."""
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
    overridden: Callable[[], None],
    *,
    namespaces: Collection[str],
    in_cluster: bool,
    stop: asyncio.Event,
) -> None:
    """Watch until SIGTERM, SIGINT or ``stop``; all namespaces when none is given."""
    await kopf.operator(
        registry=registry(enqueue, restore, shut_down, overridden, in_cluster=in_cluster),
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
    overridden: Callable[[], None],
    *,
    in_cluster: bool,
) -> kopf.OperatorRegistry:
    """Handlers that enqueue keys.

    Args:
        restore: called for a resource if one of its owned objects was deleted or edited.
        shut_down: awaited when the operator stops, before its watches end.
        overridden: called when an override is created, changed or deleted.
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
        meta, spec = item["metadata"], item["spec"]
        if changes.is_new(meta["uid"], (spec, "deletionTimestamp" in meta) if _exists(event) else None):
            enqueue(Key(meta["namespace"], spec["target"]))
            overridden()

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
        # Objects that are listed at the start or were just created need no repair.
        if owner and new and event["type"] in {"MODIFIED", "DELETED"}:
            restore(Key(meta["namespace"], owner))

    for kind in RESTORED:
        kopf.on.event(*kind, registry=handlers)(owned_changed)

    return handlers


def settings() -> kopf.OperatorSettings:
    """Kopf without peering, Events and scans of its own, and with time-outs everywhere."""
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
