"""The resource as users write it: its model, its faults, and what it resolves to. Pure."""

from kvpilot_operator.resource.errors import ManifestError
from kvpilot_operator.resource.load import load_document, load_manifest
from kvpilot_operator.resource.model import (
    API_VERSION,
    GROUP,
    VERSION,
    DeploymentSpec,
    KVCacheDeployment,
)
from kvpilot_operator.resource.override import KVCacheOverride

__all__ = [
    "API_VERSION",
    "GROUP",
    "VERSION",
    "DeploymentSpec",
    "KVCacheDeployment",
    "KVCacheOverride",
    "ManifestError",
    "load_document",
    "load_manifest",
]
