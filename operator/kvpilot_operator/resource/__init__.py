"""The resource's model, pure: what a user writes, what it resolves to, and what its status says."""

from kvpilot_operator.spec.errors import ManifestError
from kvpilot_operator.spec.load import load_document, load_manifest
from kvpilot_operator.spec.models import (
    API_VERSION,
    GROUP,
    VERSION,
    DeploymentSpec,
    KVCacheDeployment,
    KVCacheOverride,
)

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
