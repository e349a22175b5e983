"""The HTML report."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_report(path: Path, figures: dict[str, Any]) -> None:
    """Write it."""
    path.write_text("")
