"""The report of a run: one HTML file that needs nothing else, light and dark."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any


def report_html(figures: Mapping[str, Any], *, checked: bool) -> str:
    """The page of a run.

    Args:
        figures: as ``figures.figures_of`` makes them.
        checked: show the verdict as passed or failed.
    """
    template = files("kvpilot_operator.local").joinpath("report.html").read_text(encoding="utf-8")
    data = json.dumps({**figures, "checked": checked}, separators=(",", ":"))
    # Inside a script element only "</" and "<!--" could end or change it.
    return template.replace("__DATA__", data.replace("<", "\\u003c"))
