"""What all tests share: which of them run in one process when they run in several."""

from __future__ import annotations

import pytest

TOGETHER = frozenset({"api", "guides", "server"})
"""Folders whose tests share engines that take seconds to start; elsewhere a file is what stays together."""


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in its own hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group(folder if folder in TOGETHER else str(item.path)))
