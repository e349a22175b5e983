"""Watches the manifest file and the overrides of a run for edits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvpilot_operator.local.overrides import OverrideFolder
from kvpilot_operator.resource.errors import ManifestError
from kvpilot_operator.resource.load import load_document

POLL_S = 0.5
"""Poll interval of the file, s."""


def document_of(path: Path, mode: str | None) -> dict[str, Any]:
    """The manifest, with the tuning mode of the command line in place of its own.

    Raises:
        ManifestError: the file cannot be read.
    """
    document = load_document(path)
    spec = document.get("spec")
    if mode is not None and isinstance(spec, dict):
        tuning = spec.get("tuning")
        document["spec"] = {**spec, "tuning": {**(tuning if isinstance(tuning, dict) else {}), "mode": mode}}
    return document


async def watch(
    path: Path,
    mode: str | None,
    apply: Callable[[Mapping[str, Any]], bool],
    applied: Callable[[], None],
    notify: Callable[[str], None],
) -> None:
    """Apply each edit of the file; report an invalid one in one line and keep the last valid manifest.

    While the file does not exist the last valid manifest stays in force; that and its return are reported.

    Args:
        apply: applies a document; returns True if the spec changed; raises ManifestError if it is invalid.
        applied: called after each change.
        notify: called with one line for the display.
    """
    applied_stamp = last = _stamp(path)
    gone = False
    while True:
        await asyncio.sleep(POLL_S)
        before, last = last, _stamp(path)
        # Apply only a file that did not change for one interval: an editor may still be writing it.
        if last != before:
            continue
        if gone != (last is None):
            gone = not gone
            notify(f"{path} was removed; the last manifest stays in force" if gone else f"{path} is back")
        if last is None or last == applied_stamp:
            continue
        applied_stamp = last
        try:
            changed = apply(document_of(path, mode))
        except ManifestError as error:
            notify(f"edit refused, the last manifest stays in force: {path}: {'; '.join(error.lines)}")
            continue
        if changed:
            notify(f"edit of {path} applied")
            applied()


async def watch_overrides(folder: OverrideFolder, changed: Callable[[], None]) -> None:
    """Call ``changed`` whenever an override is written or deleted."""
    last = folder.stamp()
    while True:
        await asyncio.sleep(POLL_S)
        before, last = last, folder.stamp()
        if last != before:
            changed()


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
