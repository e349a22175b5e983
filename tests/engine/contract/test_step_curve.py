"""The step curve between its points."""

from __future__ import annotations

import pytest

from kvpilot_engine.contract.step_curve import time_of


def test_time_is_linear_between_neighbours_and_flat_beyond() -> None:
    curve = {1: 0.002, 4: 0.005, 8: 0.006}
    assert time_of({}, 3) == 0.0
    assert time_of(curve, 1) == 0.002
    assert time_of(curve, 3) == pytest.approx(0.004)
    assert time_of(curve, 6) == pytest.approx(0.0055)
    assert time_of(curve, 100) == 0.006
