"""The keyed queue: each resource is looked at when it is due, by one look at a time.

A look that fails is repeated with growing delays. Looks of the same period fall on the same instants, so that
they can share their queries.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog

from kvpilot_operator.ports import Key

log = structlog.get_logger(__name__)

FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 60.0
"""Delays after the first failure of a look and after many; each one doubles."""

MOST_AT_ONCE = 32
"""Looks in progress."""

Look = Callable[[Key], Awaitable[float | None]]
"""Looks at a resource; the seconds until the next look, or None to wait for an event."""


@dataclass
class _Entry:
    due: float = math.inf
    failures: int = 0
    looks: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class KeyedQueue:
    """Due times by key, and the task that serves them. All methods belong to one event loop.

    Args:
        resync: called every ``resync_s``; may enqueue whatever there is.
        clock: monotonic, s.
    """

    def __init__(
        self,
        look: Look,
        resync: Callable[[], Awaitable[None]],
        *,
        resync_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look = look
        self._resync = resync
        self._resync_s = resync_s
        self._clock = clock
        self._entries: dict[Key, _Entry] = {}
        self._changed = asyncio.Event()
        self._slots = asyncio.Semaphore(MOST_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._turned_at = clock()
        self._stopping = False

    @property
    def depth(self) -> int:
        """Looks that are due or in progress."""
        now = self._clock()
        return sum(entry.looks > 0 or entry.due <= now for entry in self._entries.values())

    @property
    def idle_s(self) -> float:
        """Time since the queue last turned; it turns at least once a second."""
        return self._clock() - self._turned_at

    def enqueue(self, key: Key, after: float = 0.0) -> None:
        """Look at ``key`` at the latest in ``after`` s; a look in progress is followed by another one."""
        entry = self._entries.setdefault(key, _Entry())
        entry.due = min(entry.due, self._clock() + after)
        self._changed.set()

    async def look_now(self, key: Key) -> None:
        """Look at once, as soon as a look in progress is over.

        Raises:
            Exception: whatever the look raises; the queue repeats it all the same.
        """
        await self._serve(key, self._entries.setdefault(key, _Entry()), raising=True)

    async def run(self) -> None:
        """Serve until :meth:`stop`."""
        resync_at = self._clock()
        while not self._stopping:
            now = self._turned_at = self._clock()
            if now >= resync_at:
                resync_at = now + self._resync_s
                self._start(self._resync_once())
            for key, entry in self._entries.items():
                if entry.due <= now and not entry.looks:
                    self._start(self._serve(key, entry))
            await self._sleep(min(1.0, min(self._next_due(), resync_at) - self._clock()))

    async def stop(self, grace_s: float = 10.0) -> None:
        """Begin nothing more; wait for what is in progress, and cancel it after ``grace_s``."""
        self._stopping = True
        self._changed.set()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=grace_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _next_due(self) -> float:
        return min((entry.due for entry in self._entries.values() if not entry.looks), default=math.inf)

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
        entry.looks += 1
        try:
            async with entry.lock, self._slots:
                entry.due = math.inf
                period = await self._look(key)
                entry.failures = 0
                if period is not None:
                    entry.due = min(entry.due, self._on_grid(period))
        except Exception as error:
            doubled = FIRST_DELAY_S * 2 ** min(entry.failures, 16)  # of thousands it would not be a float
            delay = min(LONGEST_DELAY_S, doubled) * random.uniform(0.8, 1.2)
            entry.failures += 1
            entry.due = min(entry.due, self._clock() + delay)
            log.warning("look_failed", resource=str(key), error=str(error), kind=type(error).__name__)
            if raising:
                raise
        finally:
            entry.looks -= 1
            if entry.due == math.inf and not entry.looks:
                self._entries.pop(key, None)
            self._changed.set()

    def _on_grid(self, period: float) -> float:
        """The next common instant of all keys with this period."""
        return (math.floor(self._clock() / period) + 1) * period
