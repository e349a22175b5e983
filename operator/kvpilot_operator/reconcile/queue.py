"""The keyed queue: reconciles each resource when it is due, one reconcile per resource at a time.

A failed reconcile is retried with exponential back-off. Reconciles with the same period start at the same
instants, so that they can share their metrics queries.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog

from kvpilot_operator.status.snapshot import Key

log = structlog.get_logger(__name__)

FIRST_DELAY_S, MAX_DELAY_S = 1.0, 60.0
"""Delay after the first failure of a reconcile, and the longest one, s; it doubles with each failure."""

MAX_CONCURRENT = 32
"""Reconciles that run at the same time."""

Reconcile = Callable[[Key], Awaitable[float | None]]
"""Reconciles a resource; returns the seconds until the next reconcile, or None to wait for an event."""


@dataclass
class _Entry:
    due: float = math.inf
    failures: int = 0
    waiting: int = 0
    """Reconciles that run or wait for the lock."""
    started_at: float | None = None
    """When the running reconcile started."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class KeyedQueue:
    """Due times by key, and the task that serves them. All methods run in one event loop.

    Args:
        resync: called every ``resync_s`` s; it may enqueue any key.
        clock: monotonic, s.
    """

    def __init__(
        self,
        reconcile: Reconcile,
        resync: Callable[[], Awaitable[None]],
        *,
        resync_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reconcile = reconcile
        self._resync = resync
        self._resync_s = resync_s
        self._clock = clock
        self._entries: dict[Key, _Entry] = {}
        self._changed = asyncio.Event()
        self._slots = asyncio.Semaphore(MAX_CONCURRENT)
        self._tasks: set[asyncio.Task[None]] = set()
        self._served_at = clock()
        self._stopping = False

    @property
    def depth(self) -> int:
        """Resources whose reconcile is due or runs."""
        now = self._clock()
        return sum(entry.waiting > 0 or entry.due <= now for entry in self._entries.values())

    @property
    def idle_s(self) -> float:
        """Time since the queue last looked for due resources, s; it does so at least once a second."""
        return self._clock() - self._served_at

    @property
    def oldest_reconcile_s(self) -> float:
        """Time for which the longest-running reconcile has run, s; 0 if none runs."""
        started = [e.started_at for e in self._entries.values() if e.started_at is not None]
        return self._clock() - min(started) if started else 0.0

    def enqueue(self, key: Key, after: float = 0.0) -> None:
        """Reconcile ``key`` in ``after`` s or earlier; a reconcile that runs now is followed by another."""
        entry = self._entries.setdefault(key, _Entry())
        entry.due = min(entry.due, self._clock() + after)
        self._changed.set()

    async def reconcile_now(self, key: Key) -> None:
        """Reconcile at once, after a reconcile that runs now.

        Raises:
            Exception: whatever the reconcile raises; the queue retries it as well.
        """
        await self._serve(key, self._entries.setdefault(key, _Entry()), raising=True)

    async def run(self) -> None:
        """Reconcile what is due until :meth:`stop`."""
        resync_at = self._clock()
        while not self._stopping:
            now = self._served_at = self._clock()
            if now >= resync_at:
                resync_at = now + self._resync_s
                self._start(self._resync_once())
            for key, entry in self._entries.items():
                if entry.due <= now and not entry.waiting:
                    self._start(self._serve(key, entry))
            await self._sleep(min(1.0, min(self._next_due(), resync_at) - self._clock()))

    async def stop(self, grace_s: float = 10.0) -> None:
        """Start no reconcile any more; wait for those that run, and cancel them after ``grace_s`` s."""
        self._stopping = True
        self._changed.set()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=grace_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _next_due(self) -> float:
        return min((entry.due for entry in self._entries.values() if not entry.waiting), default=math.inf)

    async def _sleep(self, seconds: float) -> None:
        if seconds > 0:
            try:
                await asyncio.wait_for(self._changed.wait(), seconds)
            except TimeoutError:
                return
        else:
            await asyncio.sleep(0)
        self._changed.clear()

    def _start(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _resync_once(self) -> None:
        try:
            await self._resync()
        except Exception as error:
            log.warning("resync_failed", error=str(error))

    async def _serve(self, key: Key, entry: _Entry, *, raising: bool = False) -> None:
        entry.waiting += 1
        try:
            async with entry.lock, self._slots:
                entry.due, entry.started_at = math.inf, self._clock()
                try:
                    period = await self._reconcile(key)
                finally:
                    entry.started_at = None
                entry.failures = 0
                if period is not None:
                    entry.due = min(entry.due, self._on_grid(period))
        except Exception as error:
            doubled = FIRST_DELAY_S * 2 ** min(entry.failures, 16)  # 2 ** 1024 is not a float
            delay = min(MAX_DELAY_S, doubled) * random.uniform(0.8, 1.2)
            entry.failures += 1
            entry.due = min(entry.due, self._clock() + delay)
            log.warning("reconcile_failed", resource=str(key), error=str(error), kind=type(error).__name__)
            if raising:
                raise
        finally:
            entry.waiting -= 1
            if entry.due == math.inf and not entry.waiting:
                self._entries.pop(key, None)
            self._changed.set()

    def _on_grid(self, period: float) -> float:
        """The next multiple of the period: the common instant of all keys with this period."""
        return (math.floor(self._clock() / period) + 1) * period
