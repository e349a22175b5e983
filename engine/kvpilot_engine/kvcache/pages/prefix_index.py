"""Which page holds which tokens: prefix hashes, the index of cached pages, and the infinite cache.

The hash of a page is H(hash of the previous page, its 16 tokens as uint32), so that one lookup compares a
whole prefix. The root separates models, layouts and tenants; it never contains the codec.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import xxhash

from kvpilot_engine.contract import PAGE_TOKENS
from kvpilot_engine.kvcache.fidelity import Fidelity
from kvpilot_engine.kvcache.pages.prefetch import PrefetchedBlock

_PAGE_KEY_BYTES = 4 * PAGE_TOKENS


class PrefixHashes:
    """Chained xxh3_128 hashes of one sequence's whole pages.

    The sequence owns them and hands them to every lookup, so that each page is hashed once, however often the
    sequence is prefetched, leased or preempted.

    Attributes:
        root: parent of the first page.
        pages: hash of each page hashed so far.
    """

    __slots__ = ("pages", "root")

    def __init__(self, model_root: bytes, salt: str = "") -> None:
        # The length prefix separates the model's root from the tenant's salt.
        self.root = xxhash.xxh3_128_digest(len(model_root).to_bytes(4, "little") + model_root + salt.encode())
        self.pages: list[bytes] = []

    def extend(self, tokens: Sequence[int], count: int) -> None:
        """Hash the pages of ``tokens`` up to page ``count``, as far as they are new."""
        first = len(self.pages)
        if first >= count:
            return
        keys = array("I", tokens[first * PAGE_TOKENS : count * PAGE_TOKENS]).tobytes()
        digest = xxhash.xxh3_128_digest
        parent = self.parent(first)
        for at in range(0, len(keys), _PAGE_KEY_BYTES):
            parent = digest(parent + keys[at : at + _PAGE_KEY_BYTES])
            self.pages.append(parent)

    def parent(self, at: int) -> bytes:
        """Hash of the page before page ``at``; the root for the first."""
        return self.pages[at - 1] if at else self.root


class Entry:
    """A cached page, with what the eviction policies order by.

    Attributes:
        hash, parent: its hash and that of the page before it.
        position: index of the page in its sequence.
        page: number of the page in the pool.
        uses: leases that hit it. born, last: sequence numbers of its insertion and of its last release.
        ticket: identifies its item in a heap; 0 when it has none.
        deferred: its eviction waits because a cached page follows it.
        prefetched: the prefetched block that it came with, until its first use.
    """

    __slots__ = (
        "born", "deferred", "fidelity", "hash", "last", "page", "parent", "position", "prefetched", "ticket",
        "uses",
    )  # fmt: skip

    def __init__(
        self, key: bytes, parent: bytes, position: int, page: int, *, fidelity: Fidelity, born: int
    ) -> None:
        self.hash = key
        self.parent = parent
        self.position = position
        self.page = page
        self.fidelity = fidelity
        self.uses = 1
        self.born = born
        self.last = born
        self.ticket = 0
        self.deferred = False
        self.prefetched: PrefetchedBlock | None = None


class PrefixIndex:
    """Entries by hash, and the number of cached pages that directly follow each hash."""

    def __init__(self) -> None:
        self.entries: dict[bytes, Entry] = {}
        self.children: dict[bytes, int] = {}

    def add(self, entry: Entry) -> None:
        """Insert a page."""
        self.entries[entry.hash] = entry
        self.children[entry.parent] = self.children.get(entry.parent, 0) + 1

    def remove(self, entry: Entry) -> Entry | None:
        """Remove a page; return the page before it if that one has no follower left."""
        del self.entries[entry.hash]
        left = self.children[entry.parent] - 1
        if left:
            self.children[entry.parent] = left
            return None
        del self.children[entry.parent]
        return self.entries.get(entry.parent)


class InfiniteCache:
    """Hashes of all pages ever cached: what a cache of unlimited size would hold.

    Bounded to the newest million pages (16 million tokens, about 120 MiB), so that a server that runs for
    months does not grow without limit.
    """

    def __init__(self, max_pages: int = 1 << 20) -> None:
        self._max_pages = max_pages
        self._seen: dict[bytes, None] = {}

    def add(self, key: bytes) -> None:
        """Remember a page; the oldest is forgotten at the bound."""
        seen = self._seen
        if key not in seen:
            if len(seen) >= self._max_pages:
                del seen[next(iter(seen))]
            seen[key] = None

    def prefix(self, hashes: Sequence[bytes], start: int, end: int) -> int:
        """Length of the prefix of ``hashes`` that it holds, up to ``end``; ``start`` are known."""
        seen = self._seen
        while start < end and hashes[start] in seen:
            start += 1
        return start
