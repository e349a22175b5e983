"""The status in the CustomResourceDefinition."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

DEFINITION = Path(__file__).parents[3] / "crds" / "kvcachedeployments.yaml"


def properties(schema: Mapping[str, Any], path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, item in schema.get("properties", {}).items():
        yield f"{path}.{name}", item
        yield from properties(item, f"{path}.{name}")
    if "items" in schema:
        yield from properties(schema["items"], f"{path}[]")


def test_every_status_field_is_described() -> None:
    (version,) = yaml.safe_load(DEFINITION.read_text())["spec"]["versions"]
    status = version["schema"]["openAPIV3Schema"]["properties"]["status"]
    found = dict(properties(status, "status"))
    assert {"status.tuning.change.values[].from", "status.conditions[].reason"} <= found.keys()
    assert [path for path, item in found.items() if not item.get("description", "").strip()] == []
