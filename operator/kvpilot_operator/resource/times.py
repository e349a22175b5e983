"""Seconds since the epoch, as RFC 3339 in UTC and back. Milliseconds are the finest that is kept."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


def to_rfc3339(seconds: float) -> str:
    """``1764.5`` -> ``"1970-01-01T00:29:24.500Z"``; whole seconds carry no fraction."""
    moment = _EPOCH + timedelta(milliseconds=round(seconds * 1000))
    exact = "milliseconds" if moment.microsecond else "seconds"
    return moment.isoformat(timespec=exact).replace("+00:00", "Z")


def from_rfc3339(text: str) -> float:
    """The inverse.

    Raises:
        ValueError: ``text`` is no RFC 3339 time with an offset.
    """
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} has no offset from UTC")
    return (moment - _EPOCH) // _MILLISECOND / 1000
