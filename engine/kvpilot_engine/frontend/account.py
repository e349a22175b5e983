"""The one account of requests: arrivals, outcomes and latencies. The metrics page and get_stats read it."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from kvpilot_engine.contract import metrics as names
from kvpilot_engine.contract.metrics import EDGES_S, Outcome, Samples, Stage

RATE_WINDOW = 64
"""Completions behind the estimate of Retry-After."""

_MAX_RETRY_AFTER_S = 30


class Histogram:
    """Observations in seconds, counted by the edges of ``contract.metrics.EDGES_S``."""

    __slots__ = ("_counts", "sum_s")

    def __init__(self) -> None:
        self._counts = [0] * (len(EDGES_S) + 1)
        self.sum_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count one observation."""
        self._counts[bisect_left(EDGES_S, seconds)] += 1
        self.sum_s += seconds

    def buckets(self) -> list[tuple[float, int]]:
        """Each edge, the infinite one last, with the number of observations at or below it."""
        return list(zip((*EDGES_S, math.inf), accumulate(self._counts), strict=True))


@dataclass(frozen=True, slots=True)
class Completed:
    """One successful request.

    Attributes:
        at: end, monotonic clock, s.
        latency_s: arrival to last byte.
        first_token_s: arrival to first new token; None without a token.
        stages: seconds by stage.
    """

    at: float
    latency_s: float
    first_token_s: float | None
    stages: Mapping[str, float]


class Account:
    """Counts the requests of one engine. To be used from one thread.

    Args:
        recent: completions to keep for percentiles and rates.
    """

    def __init__(self, recent: int = RATE_WINDOW) -> None:
        self.began_at = time.monotonic()
        self.arrivals = 0
        self.outcomes: dict[str, int] = dict.fromkeys(Outcome, 0)
        self.recent: deque[Completed] = deque(maxlen=recent)
        self._request = Histogram()
        self._first_token = Histogram()
        self._inter_token = Histogram()
        self._stages: dict[str, Histogram] = {stage: Histogram() for stage in Stage}

    def complete(self, done: Completed, gaps_s: Sequence[float]) -> None:
        """Count a success; ``gaps_s`` are the seconds between its consecutive tokens."""
        self.outcomes[Outcome.OK] += 1
        self.recent.append(done)
        self._request.observe(done.latency_s)
        if done.first_token_s is not None:
            self._first_token.observe(done.first_token_s)
        for gap in gaps_s:
            self._inter_token.observe(gap)
        for stage, histogram in self._stages.items():
            histogram.observe(done.stages.get(stage, 0.0))

    def retry_after_s(self, waiting: int) -> int:
        """Seconds until ``waiting`` requests have drained at the rate of the latest completions, 1 to 30."""
        if len(self.recent) < 2:
            return 1
        count = min(RATE_WINDOW, len(self.recent))
        span_s = self.recent[-1].at - self.recent[-count].at
        return max(1, min(_MAX_RETRY_AFTER_S, math.ceil(waiting * span_s / (count - 1))))

    def counters(self) -> Samples:
        """Arrivals, and ends by outcome."""
        return {names.ARRIVALS_TOTAL: {"": self.arrivals}, names.REQUESTS_TOTAL: self.outcomes}

    def histograms(self) -> Mapping[str, Mapping[str, Histogram]]:
        """Latencies: metric name -> label value ("" without a label) -> histogram."""
        return {
            names.REQUEST_SECONDS: {"": self._request},
            names.FIRST_TOKEN_SECONDS: {"": self._first_token},
            names.INTER_TOKEN_SECONDS: {"": self._inter_token},
            names.STAGE_SECONDS: self._stages,
        }
