"""Times as seconds since the epoch, from and to RFC 3339 in UTC with milliseconds; durations as ``1h30m``."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)

DURATION_PATTERN = r"^([0-9]{1,5}(h|m|s)){1,3}$"
"""Durations of Kubernetes' Gateway API (GEP-2257), without milliseconds."""


def to_rfc3339(seconds: float) -> str:
    """``1764.5`` -> ``"1970-01-01T00:29:24.500Z"``; whole seconds carry no fraction."""
    moment = _EPOCH + timedelta(milliseconds=round(seconds * 1000))
    exact = "milliseconds" if moment.microsecond else "seconds"
    return moment.isoformat(timespec=exact).replace("+00:00", "Z")


def moment(seconds: float) -> str:
    """A time as people read it: RFC 3339 in whole seconds."""
    return to_rfc3339(round(seconds))


def from_rfc3339(text: str) -> float:
    """The inverse.

    Raises:
        ValueError: ``text`` is no RFC 3339 time with an offset.
    """
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} has no offset from UTC")
    return (moment - _EPOCH) // _MILLISECOND / 1000


def seconds_of(moment: str | None) -> float:
    """An RFC 3339 time as seconds since the epoch; 0 for none, and for one that cannot be parsed here."""
    try:
        return from_rfc3339(moment) if moment else 0.0
    except ValueError:
        return 0.0


def duration_s(text: str) -> float:
    """Seconds of a duration: ``"1h30m"`` -> 5400.

    Raises:
        ValueError: ``text`` does not match `DURATION_PATTERN`.
    """
    if not re.match(DURATION_PATTERN, text):
        raise ValueError(f"{text!r} is not a duration such as 90s, 10m or 1h30m")
    unit_s = {"h": 3600.0, "m": 60.0, "s": 1.0}
    return sum(int(count) * unit_s[unit] for count, unit in re.findall(r"([0-9]+)(h|m|s)", text))
