"""The order of the tests."""

from __future__ import annotations

import pytest


@pytest.hookimpl(trylast=True)  # after those that are not asked for have left
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests first, told by their timeouts: what begins last, ends a parallel run."""

    def timeout_s(item: pytest.Item) -> float:
        mark = item.get_closest_marker("timeout")
        return float(mark.args[0]) if mark else 0.0

    longest_s: dict[object, float] = {}
    for item in items:
        longest_s[item.path] = max(longest_s.get(item.path, 0.0), timeout_s(item))
    items.sort(key=lambda item: -longest_s[item.path])
