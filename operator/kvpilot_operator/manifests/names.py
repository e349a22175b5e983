"""Names, labels, ports and keys of the objects that a resource owns."""

from __future__ import annotations

from collections.abc import Mapping

NAME_LABEL = "kvpilot.io/name"
COMPONENT_LABEL = "app.kubernetes.io/component"
COLD_HASH = "kvpilot.io/cold-hash"
"""Annotation of the pod template: digest of the fields that need a restart."""
PART_OF = {"app.kubernetes.io/part-of": "kvpilot"}
"""Labels by which monitors and the operator's watches find engine pods."""

HTTP_PORT, ADMIN_PORT = 8000, 8001
CONFIG_KEY, SPEC_KEY, TOKEN_KEY = "config.yaml", "spec.yaml", "token"
DECISIONS_KEY = "decisions.jsonl"
CONFIG_DIRECTORY, ADMIN_DIRECTORY, MODELS_DIRECTORY = "/etc/kvpilot", "/etc/kvpilot-admin", "/models"


def config_name(name: str) -> str:
    """ConfigMap with the last promoted configuration."""
    return f"{name}-config"


def admin_name(name: str) -> str:
    """Secret with the token of the admin API."""
    return f"{name}-admin"


def decisions_name(name: str) -> str:
    """ConfigMap with the last decision records."""
    return f"{name}-decisions"


def selector_labels(name: str) -> dict[str, str]:
    """Selector of a resource's engine pods. It never changes, since a Deployment's selector is immutable."""
    return {NAME_LABEL: name, COMPONENT_LABEL: "engine"}


def labels(name: str) -> Mapping[str, str]:
    """Labels of every owned object."""
    return {
        **selector_labels(name),
        "app.kubernetes.io/name": "kvpilot-engine",
        "app.kubernetes.io/instance": name,
        **PART_OF,
        "app.kubernetes.io/managed-by": "kvpilot",
    }
