"""The load that a new replica will find when it serves."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvpilot_operator.tuning.observation import ObservedReplica
from kvpilot_operator.tuning.pace import Pace

SIGNIFICANT = 2.0
"""A rise counts if the windows differ by so many standard deviations of overdispersed counts."""

OVERDISPERSION = 2.0
"""How much more a count of arrivals varies than a Poisson number."""

DAMPING = 0.8
"""Share of a rise that is carried on; most rises end."""

MAX_RISE = 1.25
"""A forecast is at most this multiple of the busier window."""


def offered(replicas: Sequence[ObservedReplica], window: str, unmeasured: int = 0) -> float:
    """Requests/s that arrived at these replicas, and as many at each of the ``unmeasured`` ones.

    What arrived is added up and divided by the longest time that one of them was measured for: a replica that
    joined within the window took arrivals over from the others, so their rates must not be added up.
    """
    samples = (replica.sample for replica in replicas if replica.sample is not None)
    counts = [found for sample in samples if (found := sample.windows.get(window)) is not None]
    seconds = max((item.replica_seconds for item in counts), default=0.0)
    if seconds <= 0:
        return 0.0
    return sum(item.arrivals for item in counts) / seconds * (1 + unmeasured / len(counts))


def expected(short: float, long: float, pace: Pace, horizon_s: float) -> float:
    """Requests/s in ``horizon_s`` seconds: the busier window, or the line through both windows, damped.

    The mean of a window is the rate at its middle, so the line starts half a short window ago.

    Args:
        short, long: requests/s offered in each window.
    """
    now = max(short, long)
    noise = math.sqrt(OVERDISPERSION * (short / pace.short + long / pace.long))
    if short - long < SIGNIFICANT * noise:
        return now
    slope = (short - long) / ((pace.long - pace.short) / 2)
    return min(MAX_RISE * now, max(now, short + DAMPING * slope * (horizon_s + pace.short / 2)))
