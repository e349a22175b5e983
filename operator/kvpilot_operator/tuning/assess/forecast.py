"""The load that a new replica will find when it serves."""

from __future__ import annotations

import math

from kvpilot_operator.tuning.assess.objectives import rates
from kvpilot_operator.tuning.observation import Observation
from kvpilot_operator.tuning.pace import Pace

SIGNIFICANT = 2.0
"""A rise counts if the windows differ by so many standard deviations of overdispersed counts."""

OVERDISPERSION = 2.0
"""How much more a count of arrivals varies than a Poisson number."""

DAMPING = 0.8
"""Share of a rise that is carried on; most rises end."""

MAX_RISE = 1.5
"""A forecast is at most this multiple of the busier window."""


def offered(measured: Observation, window: str, serving: int) -> float:
    """Requests/s that arrive at all ``serving`` replicas; each gets as many as the measured ones."""
    known = len(measured.ready)
    return rates(measured, window)[0] * serving / known if known else 0.0


def expected(measured: Observation, pace: Pace, serving: int, horizon_s: float) -> float:
    """Requests/s in ``horizon_s`` seconds: the busier window, or the line through both windows, damped.

    The mean of a window is the rate at its middle, so the line starts half a short window ago.
    """
    short, long = (offered(measured, window, serving) for window in ("short", "long"))
    now = max(short, long)
    noise = math.sqrt(OVERDISPERSION * (short / pace.short + long / pace.long))
    if short - long < SIGNIFICANT * noise:
        return now
    slope = (short - long) / ((pace.long - pace.short) / 2)
    return min(MAX_RISE * now, max(now, short + DAMPING * slope * (horizon_s + pace.short / 2)))
