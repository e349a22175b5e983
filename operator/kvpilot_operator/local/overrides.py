"""KVCacheOverrides of a local run: one file each in ``overrides/`` of its directory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvpilot_operator.resource.errors import ManifestError
from kvpilot_operator.resource.load import load_document
from kvpilot_operator.resource.override import KVCacheOverride
from kvpilot_operator.resource.times import to_rfc3339
from kvpilot_operator.status.overrides import INVALID, Verdict

Json = dict[str, Any]

SUFFIXES = (".json", ".yaml", ".yml")


class OverrideFolder:
    """The overrides of one run. The name of a file without its suffix is the name of the override.

    ``ttl`` counts from ``metadata.creationTimestamp``, or from when the file was written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> tuple[list[Json], list[Verdict]]:
        """All overrides, and a verdict on each file that is none."""
        items, faults = [], []
        for path in self._files():
            try:
                items.append(_override(path))
            except ManifestError as error:
                message = f"{path.name}: {'; '.join(error.lines)}"
                faults.append(Verdict(path.stem, "", False, INVALID, message, 0.0))
            except OSError:  # deleted since it was listed
                continue
        return items, faults

    def write(self, override: Mapping[str, Any]) -> None:
        """Store an override under its name, whole or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        self._path.mkdir(parents=True, exist_ok=True)
        path = self._path / f"{override['metadata']['name']}.json"
        draft = path.with_suffix(".new")
        draft.write_text(json.dumps(override, indent=1) + "\n", encoding="utf-8")
        draft.replace(path)

    def delete(self, name: str) -> None:
        """Delete an override; one that is gone already is no error."""
        for suffix in SUFFIXES:
            (self._path / f"{name}{suffix}").unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete all overrides."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def stamp(self) -> tuple[tuple[str, int], ...]:
        """A value that changes when an override is written or deleted."""
        found = []
        for path in self._files():
            try:
                found.append((path.name, path.stat().st_mtime_ns))
            except OSError:
                continue
        return tuple(found)

    def _files(self) -> Iterator[Path]:
        return (path for path in sorted(self._path.glob("*")) if path.suffix in SUFFIXES)


def _override(path: Path) -> Json:
    """The override of a file as the API server would return it.

    Raises:
        ManifestError: it is none.
        OSError: the file is gone.
    """
    written = path.stat().st_mtime
    document = load_document(path)
    metadata = document.get("metadata")
    named = {**(metadata if isinstance(metadata, dict) else {}), "name": path.stem}
    named.setdefault("creationTimestamp", to_rfc3339(written))
    override = KVCacheOverride.parse({**document, "metadata": named})
    return override.model_dump(by_alias=True, mode="json", exclude_none=True)
