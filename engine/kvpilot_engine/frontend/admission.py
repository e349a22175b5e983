"""A queue in front of the engine's own: what does not fit there waits here, by priority, then by arrival."""

from __future__ import annotations

import asyncio
import heapq
import itertools


class Gate:
    """Lets a bounded number through at once. To be used from one event loop.

    Args:
        capacity: holders at once.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._inside = 0
        self._numbers = itertools.count()
        self._queue: list[tuple[int, int, asyncio.Future[None]]] = []
        self._closed: Exception | None = None

    @property
    def waiting(self) -> int:
        """How many wait."""
        return sum(not future.done() for _, _, future in self._queue)

    async def enter(self, priority: int) -> None:
        """Wait for a place; every return needs one :meth:`leave`.

        Raises:
            Exception: the one given to :meth:`close`.
        """
        if self._closed is not None:
            raise self._closed
        if self._inside < self._capacity:
            self._inside += 1
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
        """Give the place back."""
        self._inside -= 1
        self._admit()

    def resize(self, capacity: int) -> None:
        """Change how many are let through; who is inside stays."""
        self._capacity = capacity
        self._admit()

    def close(self, reason: Exception) -> None:
        """Turn away everybody who waits, and who comes later."""
        self._closed = reason
        for _, _, future in self._queue:
            if not future.done():
                future.set_exception(reason)
        self._queue.clear()

    def _admit(self) -> None:
        while self._queue and self._inside < self._capacity:
            _, _, future = heapq.heappop(self._queue)
            if not future.done():
                self._inside += 1
                future.set_result(None)
