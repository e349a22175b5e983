"""The manifest's file, looked at for edits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvpilot_operator.spec.errors import ManifestError
from kvpilot_operator.spec.load import load_document

LOOK_S = 0.5
"""Between two looks at the file, s."""


def document_of(path: Path, mode: str | None) -> dict[str, Any]:
    """The manifest, with the tuning mode of the command line over its own.

    Raises:
        ManifestError: it cannot be read.
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
    tell: Callable[[str], None],
) -> None:
    """Apply each edit of the file; one that cannot be used is told in one line, and the old one stays.

    So it does while there is no file, which is told once, as is its return.

    Args:
        apply: takes the document; True when it changed something. Raises ManifestError.
        applied: called after a change.
    """
    applied_stamp = last = _stamp(path)
    gone = False
    while True:
        await asyncio.sleep(LOOK_S)
        before, last = last, _stamp(path)
        # Only a file that stood still for one look: an editor may be half through, or about to replace it.
        if last != before:
            continue
        if gone != (last is None):
            gone = not gone
            tell(f"{path} is gone: the run goes on with the last manifest" if gone else f"{path} is back")
        if last is None or last == applied_stamp:
            continue
        applied_stamp = last
        try:
            changed = apply(document_of(path, mode))
        except ManifestError as error:
            tell(f"edit refused, the old manifest stays: {path}: {'; '.join(error.lines)}")
            continue
        if changed:
            tell(f"edit of {path} applied")
            applied()


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
