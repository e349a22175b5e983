"""The counters of a simulated engine, how they are scraped, and the windows over them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from kvpilot_engine.contract.metrics import EDGES_S, ROW_BUCKETS, Outcome, Stage
from kvpilot_operator.tuning.observation import Counts

(
    ARRIVALS, OK, SHED, TIMEOUT, ERROR,
    ADMISSION, TIER_LOAD, BATCH, PREFILL, DECODE,
    QUERY, HIT, CEILING, OUT, EVICTED,
    USED, WASTED, DECODING, STEPS,
) = range(19)  # fmt: skip
"""Where each counter is in the list that an engine counts with."""

WITHIN = 19
FIRST = WITHIN + len(EDGES_S) + 1
SECONDS = FIRST + len(EDGES_S) + 1
ROWS = SECONDS + len(ROW_BUCKETS)
COUNTERS = ROWS + len(ROW_BUCKETS)
"""Where the histograms of whole latency and first token begin, and seconds and rows of steps by bucket."""

KEPT = 1500
"""Scrapes that are always there: 25 minutes at the Fast pace, six hours at the Standard pace."""

_OUTCOMES = {Outcome.OK: OK, Outcome.SHED: SHED, Outcome.TIMEOUT: TIMEOUT, Outcome.ERROR: ERROR}
_STAGES = {
    Stage.ADMISSION_WAIT: ADMISSION,
    Stage.TIER_LOAD: TIER_LOAD,
    Stage.BATCH_WAIT: BATCH,
    Stage.PREFILL: PREFILL,
    Stage.DECODE: DECODE,
}


class Scrapes:
    """What the metrics source holds of one replica.

    Args:
        at: when the replica began to serve, s since the epoch.
        interval: of its scrapes, s.
    """

    __slots__ = ("_at", "_seen", "interval")

    def __init__(self, at: float, interval: float) -> None:
        self.interval = interval
        self._at = [at]
        self._seen: list[list[float]] = [[0.0] * COUNTERS]

    @property
    def last_at(self) -> float:
        """Time of the newest scrape, s since the epoch."""
        return self._at[-1]

    @property
    def last(self) -> list[float]:
        """The newest values."""
        return self._seen[-1]

    def add(self, at: float, counters: Sequence[float]) -> None:
        """Keep the counters as they are at a time."""
        self._at.append(at)
        self._seen.append(list(counters))
        if len(self._at) > 2 * KEPT:
            del self._at[:-KEPT], self._seen[:-KEPT]

    def counts(self, now: float, length: float) -> Counts:
        """Increases over the window of ``length`` s that ends now, as ``increase`` of PromQL has them."""
        last = len(self._at) - 1
        start = min(bisect_left(self._at, now - length - 1e-6), last)
        before, after = self._seen[start], self._seen[last]
        # A gap in the scrapes is time that nobody has seen; what lies before the window does not count.
        covered = min(self._at[last] - self._at[start], (last - start) * self.interval, length)
        return _counts(max(covered, 1e-9), [b - a for a, b in zip(before, after, strict=True)])


def _counts(seconds: float, c: Sequence[float]) -> Counts:
    by_seconds = c[SECONDS : SECONDS + len(ROW_BUCKETS)]
    by_rows = c[ROWS : ROWS + len(ROW_BUCKETS)]
    return Counts(
        replica_seconds=seconds,
        arrivals=c[ARRIVALS],
        outcomes={outcome.value: c[at] for outcome, at in _OUTCOMES.items()},
        request_within=_within(c, WITHIN),
        first_token_within=_within(c, FIRST),
        stage_seconds={stage.value: c[_STAGES[stage]] if stage in _STAGES else 0.0 for stage in Stage},
        query_tokens=c[QUERY],
        hit_tokens=c[HIT],
        ceiling_tokens=c[CEILING],
        output_tokens=c[OUT],
        evicted_pages=c[EVICTED],
        prefetch_used=c[USED],
        prefetch_wasted=c[WASTED],
        decode_seconds=c[DECODING],
        busy_seconds=sum(by_seconds),
        steps=c[STEPS],
        step_rows=sum(by_rows),
        bucket_rows={bucket: n for bucket, n in zip(ROW_BUCKETS, by_rows, strict=True) if n},
        bucket_seconds={bucket: n for bucket, n in zip(ROW_BUCKETS, by_seconds, strict=True) if n},
    )


def _within(c: Sequence[float], start: int) -> dict[float, float]:
    return dict(zip(EDGES_S, accumulate(c[start : start + len(EDGES_S)]), strict=True))
