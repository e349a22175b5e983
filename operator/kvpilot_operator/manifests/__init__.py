"""The objects made from a resource, pure: ServiceAccount, Secret, Service, budget, Deployment, ConfigMaps."""

from kvpilot_operator.manifests.objects import (
    accepted_of,
    config_map,
    decisions_map,
    owned_objects,
    promoted_of,
)

__all__ = ["accepted_of", "config_map", "decisions_map", "owned_objects", "promoted_of"]
