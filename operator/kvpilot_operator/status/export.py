"""``kvpilot export --as-spec``: a manifest for Git, with the tuned values in it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from kvpilot_operator.status.history import Entry
from kvpilot_operator.status.model import OverlayStatus, Status, value_text
from kvpilot_operator.tuning.state import PIN

Json = Mapping[str, Any]

_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
_CONFIG = ("spec", "engine", "config")


@dataclass(frozen=True)
class Export:
    """A manifest, and where its tuned values come from.

    Attributes:
        manifest: apiVersion, kind, metadata and spec, as a person would write them.
        comments: by knob, which decision set its value.
        left_out: tuned values that the manifest does not have, and why, one sentence each.
    """

    manifest: dict[str, Any]
    comments: Mapping[str, str]
    left_out: tuple[str, ...] = ()

    def text(self) -> str:
        """YAML with a comment at each tuned value."""
        lines = [f"# {line}" for line in self.left_out]
        path: list[str] = []
        dumped = yaml.safe_dump(self.manifest, sort_keys=False, allow_unicode=True, default_flow_style=False)
        for line in dumped.splitlines():
            key, colon, _ = line.strip().partition(":")
            depth = (len(line) - len(line.lstrip())) // 2
            if colon and not line.lstrip().startswith("- "):
                path = [*path[:depth], key]
            tuned = tuple(path[:-1]) == _CONFIG and path[-1] in self.comments
            lines.append(f"{line}  # {self.comments[path[-1]]}" if tuned else line)
        return "\n".join(lines) + "\n"


def as_spec(manifest: Json, status: Status, entries: tuple[Entry, ...]) -> Export:
    """The manifest with the tuned values in ``spec.engine.config``.

    Args:
        entries: every known decision.
    """
    metadata = manifest["metadata"]
    annotations = {k: v for k, v in (metadata.get("annotations") or {}).items() if k != _APPLIED}
    kept = {
        "name": metadata["name"],
        "namespace": metadata.get("namespace"),
        "labels": metadata.get("labels"),
        "annotations": annotations,
    }
    spec = dict(manifest["spec"])
    engine = dict(spec.get("engine") or {})
    config = dict(engine.get("config") or {})
    comments, left_out = {}, []
    for item in status.config.overlay if status.config else ():
        if item.decision.startswith(PIN):
            pin, held = item.decision.removeprefix(PIN), value_text(item.value)
            left_out.append(f"{item.knob} {held} is left out: override {pin} holds it there for a while")
        elif config.get(item.knob) != item.based_on:
            left_out.append(_left_out(item, config.get(item.knob)))
        else:
            config[item.knob] = item.value
            comments[item.knob] = _comment(item, entries)
    if config:
        spec["engine"] = {**engine, "config": config}
    made = {
        "apiVersion": manifest["apiVersion"],
        "kind": manifest["kind"],
        "metadata": {key: value for key, value in kept.items() if value},
        "spec": spec,
    }
    return Export(made, comments, tuple(left_out))


def _comment(item: OverlayStatus, entries: tuple[Entry, ...]) -> str:
    found = next((entry for entry in reversed(entries) if entry.id == item.decision), None)
    was = "unset" if item.based_on is None else value_text(item.based_on)
    why = f": {' '.join(found.summary.split())}" if found else f", was {was}"
    return f"{item.decision}{why}"


def _left_out(item: OverlayStatus, present: Any) -> str:
    tuned, was = value_text(item.value), value_text(item.based_on)
    return (
        f"{item.knob} {tuned} ({item.decision}) is left out: it was proven on {was}, "
        f"and the spec now has {value_text(present)}"
    )
