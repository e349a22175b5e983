"""Which page holds which tokens: the hash chain, the index of cached pages, and the infinite cache.

A page is known by H(hash of the page before it, its 16 tokens as uint32), so one lookup compares a whole
prefix. The root of the chain separates models, layouts and tenants; it never contains the codec.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import xxhash

from kvpilot_engine.contract import PAGE_TOKENS
from kvpilot_engine.kvcache.fidelity import Fidelity
from kvpilot_engine.kvcache.prefetch import FetchedBlock

_PAGE_KEY_BYTES = 4 * PAGE_TOKENS


class HashChain:
    """Chained xxh3_128 over whole pages of token ids."""

    def __init__(self, root: bytes) -> None:
        self._root = root

    def root(self, salt: str) -> bytes:
        """Start of the chain of one tenant. The length prefix keeps root and salt apart."""
        return xxhash.xxh3_128_digest(len(self._root).to_bytes(4, "little") + self._root + salt.encode())

    def extend(self, hashes: list[bytes], root: bytes, tokens: Sequence[int], pages: int) -> None:
        """Append the hashes of pages ``len(hashes)`` up to ``pages`` of ``tokens``."""
        first = len(hashes)
        if first >= pages:
            return
        keys = array("I", tokens[first * PAGE_TOKENS : pages * PAGE_TOKENS]).tobytes()
        digest = xxhash.xxh3_128_digest
        parent = hashes[-1] if hashes else root
        for at in range(0, len(keys), _PAGE_KEY_BYTES):
            parent = digest(parent + keys[at : at + _PAGE_KEY_BYTES])
            hashes.append(parent)


class Entry:
    """A cached page and what the policies know about it.

    Attributes:
        position: index of the page in its chain.
        uses: leases that hit it. born, last: sequence numbers of its insertion and of its last release.
        ticket: identity of its place in a heap; 0 when it has none.
        parked: set aside by the policy because a cached page follows it.
        fetched: the block that a prefetch brought it with, until its first use.
    """

    __slots__ = (
        "born", "fetched", "fidelity", "hash", "last", "page", "parent", "parked", "position", "ticket",
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
        self.parked = False
        self.fetched: FetchedBlock | None = None


class PrefixIndex:
    """Cached pages by hash, and how many cached pages follow each hash directly."""

    def __init__(self) -> None:
        self.entries: dict[bytes, Entry] = {}
        self.children: dict[bytes, int] = {}

    def add(self, entry: Entry) -> None:
        """Make a page findable."""
        self.entries[entry.hash] = entry
        self.children[entry.parent] = self.children.get(entry.parent, 0) + 1

    def remove(self, entry: Entry) -> Entry | None:
        """Forget a page; returns the page before it when that one has no follower left."""
        del self.entries[entry.hash]
        left = self.children[entry.parent] - 1
        if left:
            self.children[entry.parent] = left
            return None
        del self.children[entry.parent]
        return self.entries.get(entry.parent)


class InfiniteCache:
    """Hashes of pages ever cached: what a cache without limits would still hold.

    Bounded, oldest first out, so that the ceiling of a server that runs for months stays a set in memory:
    a million pages are sixteen million tokens, about 120 MiB at most.
    """

    def __init__(self, most: int = 1 << 20) -> None:
        self._most = most
        self._seen: dict[bytes, None] = {}

    def add(self, key: bytes) -> None:
        """Remember a page."""
        seen = self._seen
        if key not in seen:
            if len(seen) >= self._most:
                del seen[next(iter(seen))]
            seen[key] = None

    def prefix(self, hashes: Sequence[bytes], start: int, end: int) -> int:
        """Pages from the start of ``hashes`` that it holds; the first ``start`` are known to be."""
        seen = self._seen
        while start < end and hashes[start] in seen:
            start += 1
        return start
