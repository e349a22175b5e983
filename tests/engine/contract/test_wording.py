"""A number and its noun agree."""

from __future__ import annotations

import pytest

from kvpilot_engine.contract.wording import counted


@pytest.mark.parametrize(("number", "text"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (11, "11 rows")])
def test_noun_and_verb_agree_with_the_number(number: int, text: str) -> None:
    assert counted(number, "row") == text
    assert counted(number, "row", "waits", "wait") == f"{text} {'waits' if number == 1 else 'wait'}"
