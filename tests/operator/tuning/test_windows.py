"""Windows that a decision needs, beside the short and the long one."""

from __future__ import annotations

from dataclasses import replace

from tests.operator.tuning.experiments import change
from tests.operator.tuning.observations import NOW

from kvpilot_operator.tuning.pace import PACES
from kvpilot_operator.tuning.state import Change, KnobChange, StepRate, TuningState, Watch
from kvpilot_operator.tuning.windows import windows_of

FAST, STANDARD = PACES["Fast"], PACES["Standard"]


def trying(measured_s: float, **fields: float) -> TuningState:
    """A change whose canary has shown the candidate for so long."""
    made: Change = change(since=100.0, measured_from=NOW - measured_s, **fields)
    return TuningState(change=made)


def watching(since: float) -> TuningState:
    seen = Watch("d-0001", "workers-up", (KnobChange("numWorkers", 2, 4),), since, NOW + 9, StepRate(), 0.0)
    return TuningState(watch=seen)


def test_calm_needs_the_short_and_the_long_window() -> None:
    assert windows_of(TuningState(), FAST, NOW) == {"short": 10, "long": 60}
    assert windows_of(TuningState(), STANDARD, NOW) == {"short": 60, "long": 300}


def test_verification_reaches_back_to_the_candidate_and_no_further() -> None:
    assert windows_of(trying(20.0), FAST, NOW)["verify"] == 20
    assert windows_of(trying(500.0), FAST, NOW)["verify"] == 500


def test_a_candidate_that_does_not_show_yet_has_no_window() -> None:
    state = trying(20.0)
    assert state.change is not None
    state = replace(state, change=replace(state.change, measured_from=0.0))
    assert "verify" not in windows_of(state, FAST, NOW)


def test_a_window_of_fewer_than_four_scrapes_is_left_out() -> None:
    assert "verify" not in windows_of(trying(3.9), FAST, NOW)
    assert "verify" in windows_of(trying(4.0), FAST, NOW)
    assert "verify" not in windows_of(trying(59.0), STANDARD, NOW)
    assert "watch" not in windows_of(watching(NOW - 3.9), FAST, NOW)


def test_a_watch_reaches_back_to_when_all_replicas_ran_it() -> None:
    assert windows_of(watching(NOW - 30), FAST, NOW) == {"short": 10, "long": 60, "watch": 30}
