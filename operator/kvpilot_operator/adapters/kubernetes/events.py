"""Events as the API server takes them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from kvpilot_operator.adapters.kubernetes.api import JsonObject

EVENTS_API = "events.k8s.io/v1"
REPORTER = "kvpilot.io/operator"
NOTE_BYTES = 1024
"""The API's limit of an Event's note."""


def event_on(
    item: Mapping[str, Any],
    kind: Literal["Normal", "Warning"],
    reason: str,
    message: str,
    *,
    at: float,
    instance: str,
) -> JsonObject:
    """An Event on an object.

    Args:
        at: s since the epoch.
        instance: name of the process that reports it.
    """
    metadata = item["metadata"]
    now = datetime.fromtimestamp(at, UTC)
    return {
        "apiVersion": EVENTS_API,
        "kind": "Event",
        "metadata": {"generateName": f"{metadata['name']}-", "namespace": metadata["namespace"]},
        "eventTime": now.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "action": "Tune",
        "type": kind,
        "reason": reason,
        "note": message.encode()[:NOTE_BYTES].decode(errors="ignore"),
        "reportingController": REPORTER,
        "reportingInstance": instance,
        "regarding": {
            "apiVersion": item["apiVersion"],
            "kind": item["kind"],
            "namespace": metadata["namespace"],
            "name": metadata["name"],
            "uid": metadata["uid"],
            "resourceVersion": metadata.get("resourceVersion", ""),
        },
    }
