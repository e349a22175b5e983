"""What a run was worth: violation minutes, paid hours, time to cure, and what the controller did wrong."""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from kvpilot_operator.backtest.engine import Ended
from kvpilot_operator.tuning.pace import Pace
from kvpilot_operator.tuning.policy import Objectives

LAMBDAS = (1.0, 3.0, 10.0)
"""Minutes of violation that one GPU-hour is worth: score = violation minutes + lambda x GPU-hours."""

FEWEST = 50
"""Requests of a minute that is judged; a shorter window needs its share."""

CLEAN = 3
"""A breach is cured when so many windows in a row miss no objective."""

REVERSAL_S = 1800.0
"""Two opposite changes of the replicas within this time are a reversal, s."""

RESAMPLES = 2000


@dataclass(frozen=True)
class Windows:
    """Windows of arrivals of ``width`` s: for each, whether an objective was missed.

    A window with few requests misses none.
    """

    start: float
    width: float
    missed: tuple[bool, ...]

    @property
    def violation_minutes(self) -> float:
        """Minutes of windows with a miss."""
        return sum(self.missed) * self.width / 60.0

    @property
    def time_to_cure_s(self) -> float | None:
        """From the first miss to CLEAN windows without one, or to the end of the run; None without a miss."""
        if True not in self.missed:
            return None
        first = self.missed.index(True)
        for index in range(first, len(self.missed) - CLEAN + 1):
            if not any(self.missed[index : index + CLEAN]):
                return (index - first) * self.width
        return (len(self.missed) - first) * self.width

    def missed_at(self, at: float) -> bool:
        """True if the window of a time (s since the epoch) missed an objective."""
        index = int((at - self.start) // self.width)
        return 0 <= index < len(self.missed) and self.missed[index]


class Judge:
    """Counts requests into windows by their arrival, as they end: a minute, 10 s at the Fast pace.

    Args:
        start, end: of the run, s since the epoch.
    """

    def __init__(self, objectives: Objectives, start: float, end: float, pace: Pace) -> None:
        self._start, self._width = start, min(60.0, pace.short)
        self._count = max(0, int((end - start) // self._width))
        self._totals = [0] * self._count
        self._signal = 1 if objectives.signal == "request" else 2
        latency = objectives.latency.values()
        self._late = [(edge, share, [0] * self._count) for edge, share in latency]
        self._least = min((edge for edge, _ in latency), default=math.inf)

    def add(self, ended: Iterable[Ended]) -> None:
        """Count requests that ended, or never will."""
        start, width, signal, least = self._start, self._width, self._signal, self._least
        items = list(ended)
        came = sorted([item[0] for item in items])
        below = bisect_left(came, start)
        while below < len(came):  # all of a window at once
            index = int((came[below] - start) // width)
            if index >= self._count:
                break
            after = bisect_left(came, start + (index + 1) * width, below + 1)
            self._totals[index] += after - below
            below = after
        for item in [item for item in items if item[signal] > least]:
            index = int((item[0] - start) // width)
            if 0 <= index < self._count:
                for edge, _, late in self._late:
                    if item[signal] > edge:
                        late[index] += 1

    def windows(self) -> Windows:
        """What was counted."""
        fewest = max(10, FEWEST * self._width / 60.0)
        missed = tuple(
            total >= fewest and any(late[index] > (1 - share) * total + 1e-9 for _, share, late in self._late)
            for index, total in enumerate(self._totals)
        )
        return Windows(self._start, self._width, missed)


def reversals(scalings: Sequence[tuple[float, int, int]]) -> int:
    """Opposite changes of the replicas less than half an hour apart."""
    moves = [(at, after - before) for at, before, after in scalings]
    return sum(
        1 for (at, move), (later, other) in pairwise(moves) if move * other < 0 and later - at < REVERSAL_S
    )


def wrong_direction(scalings: Sequence[tuple[float, int, int]], windows: Windows) -> int:
    """Replicas were removed in a window that missed an objective."""
    return sum(1 for at, before, after in scalings if after < before and windows.missed_at(at))


def score(row: Mapping[str, float], weight: float) -> float:
    """Violation minutes + lambda x GPU-hours; lower is better."""
    return row["violation_minutes"] + weight * row["gpu_hours"]


def paired_interval(differences: Sequence[float], seed: int = 1) -> tuple[float, float, float]:
    """The mean of paired differences and its 95% interval, by the percentile bootstrap."""
    if len(differences) < 2:
        mean = fmean(differences) if differences else math.nan
        return mean, -math.inf, math.inf
    draw = random.Random(seed)
    count = len(differences)
    means = sorted(fmean(draw.choices(differences, k=count)) for _ in range(RESAMPLES))
    return fmean(differences), means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]
