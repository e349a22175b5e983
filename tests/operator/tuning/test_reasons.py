"""Reasons are named once, documented for users, and all of them used."""

from __future__ import annotations

from pathlib import Path

from kvpilot_operator.tuning import reasons

CONSTANTS = {name: text for name, text in vars(reasons).items() if name.isupper() and isinstance(text, str)}


def test_every_reason_is_documented_once() -> None:
    documented = [reason.name for reason in reasons.REASONS]
    assert sorted(documented) == sorted({*documented})
    assert set(documented) == set(CONSTANTS.values())
    assert all(reason.meaning.endswith(".") for reason in reasons.REASONS)


def test_every_reason_is_used() -> None:
    folder = Path(reasons.__file__).parent.parent  # ports and adapters name some
    source = "".join(path.read_text() for path in folder.rglob("*.py") if path.name != "reasons.py")
    assert [name for name in CONSTANTS if f"reasons.{name}" not in source] == []
