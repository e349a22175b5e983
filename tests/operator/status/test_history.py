"""What is known of past decisions."""

from __future__ import annotations

from kvpilot_operator.status.history import last_numbers


def test_the_last_numbers_are_the_highest_ones_of_any_record() -> None:
    assert last_numbers([]) == (0, 0)
    records = [{"id": "d-0012", "generation": 4}, {"id": "d-0003", "generation": 9}, {"id": "d-0007"}]
    assert last_numbers(records) == (12, 9)
    assert last_numbers([{"id": "of another version", "generation": None}]) == (0, 0)
    assert last_numbers([{"id": "d-12345", "generation": 1}]) == (12345, 1)
