"""The report of a run: one self-contained HTML file with a light and a dark theme."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any


def report_html(figures: Mapping[str, Any], *, checked: bool) -> str:
    """The HTML page of a run.

    Args:
        figures: the result of ``figures.figures_of``.
        checked: show whether the check passed.
    """
    template = files("kvpilot_operator.local").joinpath("report.html").read_text(encoding="utf-8")
    data = json.dumps({**figures, "checked": checked}, separators=(",", ":"))
    # In a script element only "</" and "<!--" have a meaning in HTML.
    return template.replace("__DATA__", data.replace("<", "\\u003c"))
