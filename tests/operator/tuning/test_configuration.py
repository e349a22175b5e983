"""Arithmetic of configurations."""

from __future__ import annotations

from tests.operator.tuning.policies import CATALOGUE_BOUNDS

from kvpilot_operator.tuning.configuration import candidate, effective, kept_overlay, value, with_cold
from kvpilot_operator.tuning.policy import KnobBounds
from kvpilot_operator.tuning.state import KnobChange, OverlayEntry

TUNED = OverlayEntry("numWorkers", 2, 4, "d-0001")


def test_overlay_replaces_base_values() -> None:
    assert effective({"numWorkers": 2, "batchSize": 2}, (TUNED,)) == {"numWorkers": 4, "batchSize": 2}


def test_value_that_was_not_given_is_the_default() -> None:
    assert value({"maxQueue": 10}, "maxQueue") == 10
    assert value({}, "maxQueue") == 256


def test_candidate_leaves_the_promoted_configuration_alone() -> None:
    promoted = {"numWorkers": 2}
    assert candidate(promoted, (KnobChange("numWorkers", 2, 4),)) == {"numWorkers": 4}
    assert promoted == {"numWorkers": 2}


def test_cold_fields_follow_the_base_and_hot_fields_stay() -> None:
    config = {"numWorkers": 4, "dtype": "float32"}
    assert with_cold(config, {"numWorkers": 2, "dtype": "bfloat16"}) == {"numWorkers": 4, "dtype": "bfloat16"}


def test_overlay_entry_is_dropped_when_its_base_value_changes() -> None:
    assert kept_overlay({"numWorkers": 2}, (TUNED,), CATALOGUE_BOUNDS) == ((TUNED,), ())
    assert kept_overlay({"numWorkers": 6}, (TUNED,), CATALOGUE_BOUNDS) == ((), (TUNED,))


def test_overlay_entry_is_dropped_when_bounds_exclude_its_value() -> None:
    bounds = {"numWorkers": KnobBounds("numWorkers", 2, 3)}
    assert kept_overlay({"numWorkers": 2}, (TUNED,), bounds) == ((), (TUNED,))
