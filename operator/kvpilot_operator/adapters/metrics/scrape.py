"""Metrics without Prometheus: scrapes each engine's page and keeps the history that the windows need."""

from __future__ import annotations

import asyncio
import contextlib
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from kvpilot_operator.adapters.metrics.series import (
    COUNTERS,
    GAUGES,
    OPTIONAL_COUNTERS,
    OPTIONAL_GAUGES,
    IncompleteSeriesError,
    SeriesKey,
    sample_from,
    series_key,
)
from kvpilot_operator.status.snapshot import Key
from kvpilot_operator.tuning.observation import Sample

KEEP_S = 3600.0
"""Longest window, s. One scrape of an engine takes about 1.5 KB."""


@dataclass(frozen=True)
class Target:
    """One engine's metrics page."""

    uid: str
    url: str


class PageReader:
    """Parses the text format, and each series' name and labels only once.

    prometheus_client's parser takes milliseconds of Python for each page and second, on the engines' cores.
    Names and labels do not change between two scrapes, so only values are parsed.
    """

    def __init__(self) -> None:
        self._known: dict[str, SeriesKey | None] = {}

    def read(self, text: str) -> dict[SeriesKey, float]:
        """The counters and gauges of a sample; a line without a number is skipped."""
        values: dict[SeriesKey, float] = {}
        for line in text.splitlines():
            if line.startswith("#"):
                continue
            series, _, number = line.rpartition(" ")
            try:
                key = self._known[series]
            except KeyError:
                key = self._known[series] = _parsed(line)
            if key is not None:
                with contextlib.suppress(ValueError):
                    values[key] = float(number)
        return values


_LAST_VALUES = frozenset({*GAUGES, *OPTIONAL_GAUGES})
_WANTED = frozenset({*COUNTERS, *OPTIONAL_COUNTERS, *_LAST_VALUES})


def _parsed(line: str) -> SeriesKey | None:
    """Name and labels of a line; None for a series that no sample uses, or a line that is no series."""
    if line.partition("{")[0].partition(" ")[0] not in _WANTED:
        return None
    try:
        for family in text_string_to_metric_families(line):
            for sample in family.samples:
                return series_key(sample.labels, sample.name)
    except ValueError:
        return None
    return None


class History:
    """History of one engine: cumulative counters by time, across resets, and the last gauges."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.gauges: dict[SeriesKey, float] = {}
        self._columns: dict[SeriesKey, int] = {}
        self._rows: list[array[float]] = []
        self._raw: list[float] = []
        self._lost: list[float] = []  # value of a counter before each of its resets

    def add(self, at: float, values: Mapping[SeriesKey, float]) -> None:
        """One scrape at time ``at``, s."""
        self.gauges = {key: value for key, value in values.items() if key[0] in _LAST_VALUES}
        for key, value in values.items():
            if key[0] in _LAST_VALUES:
                continue
            column = self._columns.get(key)
            if column is None:  # a series that appears later started at 0
                column = self._columns[key] = len(self._raw)
                self._raw.append(0.0)
                self._lost.append(0.0)
            if value < self._raw[column]:
                self._lost[column] += self._raw[column]
            self._raw[column] = value
        self._rows.append(array("d", map(float.__add__, self._raw, self._lost)))
        self.times.append(at)
        if self.times[0] < at - KEEP_S - 60:  # drop in bulk: removing from the front of a list is linear
            first = bisect_right(self.times, at - KEEP_S)
            del self.times[:first], self._rows[:first]

    def increase(self, seconds: float) -> tuple[dict[SeriesKey, float], float]:
        """Increases over the last ``seconds``, and the time that they cover, s."""
        end = self.times[-1]
        # The scrape closest to the start of the window: it covers ``seconds`` within half an interval.
        first = bisect_right(self.times, end - seconds)
        if first and (
            first == len(self.times)
            or end - seconds - self.times[first - 1] < self.times[first] - (end - seconds)
        ):
            first -= 1
        then, now = self._rows[first], self._rows[-1]
        missing = len(now) - len(then)
        earlier = [*then, *([0.0] * missing)]
        values = {key: now[column] - earlier[column] for key, column in self._columns.items()}
        return values, end - self.times[first]


class ScrapeMetrics:
    """The ``Metrics`` port over the engines' own pages.

    Args:
        targets: returns the engines of a resource; the history of a removed one is dropped.
        interval_s: between two scrapes.
    """

    def __init__(
        self,
        targets: Callable[[], Mapping[Key, Sequence[Target]]],
        interval_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._targets = targets
        self._interval = interval_s
        self._changed = asyncio.Event()
        self._clock = clock
        self._readers: dict[str, PageReader] = {}
        self._histories: dict[str, History] = {}
        self._task: asyncio.Task[None] | None = None
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Start to scrape."""
        self._session = aiohttp.ClientSession()
        self._task = asyncio.create_task(self._scrape_forever())

    def scrape_every(self, interval_s: float) -> None:
        """Change the interval, s, at once: the next scrape does not wait for the end of the old one."""
        if interval_s != self._interval:
            self._interval = interval_s
            self._changed.set()

    def scrape_s(self, key: Key) -> float:
        """Interval between two scrapes, s."""
        return self._interval

    async def close(self) -> None:
        """Stop scraping."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def samples(self, windows: Mapping[Key, Mapping[str, float]]) -> dict[Key, dict[str, Sample]]:
        """Samples by replica UID from the scrapes so far."""
        targets = self._targets()
        found: dict[Key, dict[str, Sample]] = {}
        for key, lengths in windows.items():
            found[key] = {}
            for target in targets.get(key, ()):
                sample = self._sample(target.uid, lengths)
                if sample is not None:
                    found[key][target.uid] = sample
        return found

    def _sample(self, uid: str, lengths: Mapping[str, float]) -> Sample | None:
        history = self._histories.get(uid)
        if history is None or len(history.times) < 2:  # one scrape shows no increase
            return None
        windows: dict[str, dict[SeriesKey, float]] = {}
        covered: dict[str, float] = {}
        for name, seconds in lengths.items():
            windows[name], covered[name] = history.increase(seconds)
        age = self._clock() - history.times[-1]
        try:
            return sample_from(
                windows, history.gauges, covered, age, max(covered.values()), scrape_s=self._interval
            )
        except IncompleteSeriesError:
            return None

    async def _scrape_forever(self) -> None:
        due = time.monotonic()
        while True:
            targets = [target for group in self._targets().values() for target in group]
            for uid in self._histories.keys() - {target.uid for target in targets}:
                del self._histories[uid]
                self._readers.pop(uid, None)
            await asyncio.gather(*(self._scrape(target) for target in targets))
            now = time.monotonic()
            due = max(due + self._interval, now)
            # Not wait_for: in Python 3.11 it loses a cancellation that arrives together with the event.
            try:
                async with asyncio.timeout(due - now):
                    await self._changed.wait()
            except TimeoutError:
                continue
            self._changed.clear()
            due = time.monotonic()

    async def _scrape(self, target: Target) -> None:
        """Read one page; an engine that does not answer keeps its history, which grows stale."""
        assert self._session is not None
        timeout = aiohttp.ClientTimeout(total=max(2.0, self._interval))
        try:
            async with self._session.get(target.url, timeout=timeout) as response:
                if response.status != 200:
                    return
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return
        values = self._readers.setdefault(target.uid, PageReader()).read(text)
        self._histories.setdefault(target.uid, History()).add(self._clock(), values)
