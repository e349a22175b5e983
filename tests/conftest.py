"""Order of the tests, threads of their own process, and the same examples in every run."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

# An example that is drawn anew, or takes long on a busy machine, must not fail the change of somebody else.
settings.register_profile(
    "fixed", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fixed")

# As in the core of an engine: tests run side by side, and threads that wait for each other would spin.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(trylast=True)  # after deselection
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with long timeouts first: a long test that starts last prolongs a parallel run."""

    def timeout_s(item: pytest.Item) -> float:
        mark = item.get_closest_marker("timeout")
        return float(mark.args[0]) if mark else 0.0

    longest_s: dict[object, float] = {}
    for item in items:
        longest_s[item.path] = max(longest_s.get(item.path, 0.0), timeout_s(item))
    items.sort(key=lambda item: -longest_s[item.path])
