"""Admission to the core: a bounded number of requests at once; the others are shed, or wait by priority."""

from __future__ import annotations

import asyncio
import heapq
import itertools


class AdmissionQueue:
    """Admits a bounded number of requests at once. To be used from one event loop.

    Args:
        capacity: requests that are admitted at once.
    """

    def __init__(self, capacity: int) -> None:
        self.admitted = 0
        self._capacity = capacity
        self._numbers = itertools.count()
        self._queue: list[tuple[int, int, asyncio.Future[None]]] = []
        self._closed: Exception | None = None

    @property
    def waiting(self) -> int:
        """Requests in :meth:`wait`."""
        return sum(not future.done() for _, _, future in self._queue)

    def enter(self) -> bool:
        """Take a place if there is one; True needs one :meth:`leave`.

        Raises:
            Exception: the one given to :meth:`close`.
        """
        if self._closed is not None:
            raise self._closed
        if self.admitted >= self._capacity:
            return False
        self.admitted += 1
        return True

    async def wait(self, priority: int) -> None:
        """Take a place, waiting for one by priority, then by arrival; every return needs one :meth:`leave`.

        Raises:
            Exception: the one given to :meth:`close`.
        """
        if self.enter():
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._queue, (-priority, next(self._numbers), future))
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.leave()  # the place came together with the cancellation
            raise

    def leave(self) -> None:
        """Return the place."""
        self.admitted -= 1
        self._admit()

    def resize(self, capacity: int) -> None:
        """Change the capacity; who is admitted stays."""
        self._capacity = capacity
        self._admit()

    def close(self, reason: Exception) -> None:
        """Refuse all who wait, and all who come later, with ``reason``."""
        self._closed = reason
        for _, _, future in self._queue:
            if not future.done():
                future.set_exception(reason)
        self._queue.clear()

    def _admit(self) -> None:
        while self._queue and self.admitted < self._capacity:
            _, _, future = heapq.heappop(self._queue)
            if not future.done():
                self.admitted += 1
                future.set_result(None)
