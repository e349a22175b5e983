"""Eviction policies: the order in which cached pages leave the device pool.

A policy only orders entries. The statistics that it orders by (uses, born, last) are in the entries, so that
a change of policy keeps every page and its statistics. All operations are O(1) or O(log n).
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator

from kvpilot_engine.contract import CacheStrategy
from kvpilot_engine.kvcache.pages.prefix_index import Entry


class Policy(ABC):
    """Order of eviction of the pages without a holder."""

    @abstractmethod
    def push(self, entry: Entry) -> None:
        """Add a page that was just released."""

    @abstractmethod
    def put_back(self, entry: Entry) -> None:
        """Add a page that ``pop`` returned, at its old place in the order."""

    @abstractmethod
    def discard(self, entry: Entry) -> None:
        """Remove a page, because it is held again or replaced."""

    @abstractmethod
    def pop(self) -> Entry | None:
        """Remove and return the next page to evict; None if there is none."""

    @abstractmethod
    def __iter__(self) -> Iterator[Entry]: ...

    @abstractmethod
    def __len__(self) -> int: ...


class LRU(Policy):
    """Least recently released first."""

    def __init__(self) -> None:
        self._order: OrderedDict[Entry, None] = OrderedDict()

    def push(self, entry: Entry) -> None:
        """See Policy."""
        self._order[entry] = None

    def put_back(self, entry: Entry) -> None:
        """See Policy: a page that was popped was the oldest."""
        self._order[entry] = None
        self._order.move_to_end(entry, last=False)

    def discard(self, entry: Entry) -> None:
        """See Policy."""
        del self._order[entry]

    def pop(self) -> Entry | None:
        """See Policy."""
        return self._order.popitem(last=False)[0] if self._order else None

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)


class _Heap(Policy):
    """Smallest key first. A removed entry leaves a stale item, which is dropped when it reaches the top."""

    _SLACK = 64

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int, Entry]] = []
        self._tickets = 0
        self._live = 0

    @staticmethod
    @abstractmethod
    def key(entry: Entry) -> tuple[int, int]:
        """Sort key; the entry with the smallest is evicted first."""

    def push(self, entry: Entry) -> None:
        """See Policy."""
        self._tickets += 1
        self._live += 1
        entry.ticket = self._tickets
        heapq.heappush(self._heap, (*self.key(entry), entry.ticket, entry))

    def put_back(self, entry: Entry) -> None:
        """See Policy: the key has not changed."""
        self.push(entry)

    def discard(self, entry: Entry) -> None:
        """See Policy."""
        entry.ticket = 0
        self._live -= 1
        if len(self._heap) > 2 * self._live + self._SLACK:
            self._heap = [item for item in self._heap if item[3].ticket == item[2]]
            heapq.heapify(self._heap)

    def pop(self) -> Entry | None:
        """See Policy."""
        while self._heap:
            _, _, ticket, entry = heapq.heappop(self._heap)
            if entry.ticket == ticket:
                entry.ticket = 0
                self._live -= 1
                return entry
        return None

    def __iter__(self) -> Iterator[Entry]:
        return (entry for _, _, ticket, entry in self._heap if entry.ticket == ticket)

    def __len__(self) -> int:
        return self._live


class LFU(_Heap):
    """Fewest uses first; among equals the least recently released."""

    @staticmethod
    def key(entry: Entry) -> tuple[int, int]:
        """See _Heap."""
        return entry.uses, entry.last


class FIFO(_Heap):
    """Oldest insertion first, regardless of use."""

    @staticmethod
    def key(entry: Entry) -> tuple[int, int]:
        """See _Heap."""
        return entry.born, 0


_POLICIES: dict[CacheStrategy, type[Policy]] = {
    CacheStrategy.LRU: LRU,
    CacheStrategy.LFU: LFU,
    CacheStrategy.FIFO: FIFO,
}


def make_policy(strategy: CacheStrategy) -> Policy:
    """Make the policy that runs for a strategy."""
    return _POLICIES[strategy.runs_as]()
