"""The largest value within a span of time, to the resolution of a few intervals."""

from __future__ import annotations

from collections import deque


class RecentMax:
    """Keeps the largest value of each interval; an interval counts until ``span_s`` after its end.

    Args:
        span_s: how long a value counts at least, s.
        intervals: intervals of one span.
    """

    def __init__(self, span_s: float, intervals: int = 24) -> None:
        self._length_s = span_s / intervals
        self._largest: deque[tuple[int, float]] = deque(maxlen=intervals + 1)

    def add(self, value: float, now: float) -> None:
        """Count a value at a time, s."""
        interval = int(now // self._length_s)
        if self._largest and self._largest[-1][0] == interval:
            value = max(value, self._largest.pop()[1])
        self._largest.append((interval, value))

    def value(self, now: float) -> float:
        """The largest value; 0 without one."""
        oldest = int(now // self._length_s) - (self._largest.maxlen or 0) + 1
        return max((value for interval, value in self._largest if interval >= oldest), default=0.0)
