"""The page table of the device pool: who holds each page, how it is found, and which is evicted next.

A page is free, private (written by one lease or one load, not in the index), or indexed. An indexed page
without a holder is cached, and the policy orders its eviction. A lease holds a whole prefix, so a held page
never follows an unheld one that its holder needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from kvpilot_engine.contract import CacheStrategy
from kvpilot_engine.kvcache.fidelity import Fidelity
from kvpilot_engine.kvcache.lease import Lease
from kvpilot_engine.kvcache.pages.policies import make_policy
from kvpilot_engine.kvcache.pages.pool import PAGES_PER_BLOCK, PagePool
from kvpilot_engine.kvcache.pages.prefetch import PrefetchedBlock, PrefetchMeter
from kvpilot_engine.kvcache.pages.prefix_index import Entry, PrefixIndex


def _ignore(_: Entry) -> None:
    """Default of ``on_evict``: evicted pages are dropped."""


class PageTable:
    """Pool, index and policy of the device pool, kept consistent.

    Args:
        pool: the pages.
        strategy: eviction policy.
        on_insert: called with the hash of each page that enters the index.

    Attributes:
        on_evict: called with each entry before its eviction, while its page and its block are intact; set by
            the owner.
        prefetched_pages: cached pages that a prefetch loaded and no lease has used yet.
    """

    def __init__(self, pool: PagePool, strategy: CacheStrategy, on_insert: Callable[[bytes], None]) -> None:
        self.pool = pool
        self.index = PrefixIndex()
        self.meter = PrefetchMeter()
        self.prefetched_pages = 0
        self.evicted = 0
        self._policy = make_policy(strategy)
        self._deferred: dict[Entry, None] = {}
        self.on_evict: Callable[[Entry], None] = _ignore
        self._on_insert = on_insert
        self._sequence = 0

    @property
    def evictable(self) -> int:
        """Number of cached pages without a holder."""
        return len(self._policy) + len(self._deferred)

    def switch(self, strategy: CacheStrategy) -> None:
        """Change the policy; the cached pages and their statistics stay."""
        entries = sorted((*self._policy, *self._deferred), key=lambda entry: entry.last)
        self._deferred.clear()
        self._policy = make_policy(strategy)
        for entry in entries:
            entry.deferred = False
            self._policy.push(entry)

    def pin(self, lease: Lease) -> None:
        """Let ``lease`` hold, in order, every further page of its prompt that the index has.

        Private pages in their places are freed. Prefetched pages count as hits of the tier they came from.
        """
        entries, refs, hashes, pages = self.index.entries, self.pool.refs, lease.hashes.pages, lease.pages
        at, worst, exact_only = lease.hits, lease.fidelity, lease.exact_only
        while at < lease.usable and (entry := entries.get(hashes[at])) is not None:
            if entry.fidelity and exact_only:
                break
            page = entry.page
            if not refs[page]:
                self._unqueue(entry)
            refs[page] += 1
            entry.uses += 1
            worst = max(worst, entry.fidelity)
            if entry.prefetched is not None:
                lease.hits_by_tier[entry.prefetched.tier] += 1
                self._resolve_prefetch(entry, used=True)
            if at < len(pages):
                self.free_private(pages[at])
                pages[at] = page
            else:
                pages.append(page)
            at += 1
        lease.hits = at
        lease.committed = max(lease.committed, at)
        lease.fidelity = worst

    def publish(self, key: bytes, parent: bytes, position: int, page: int, fidelity: Fidelity) -> Entry:
        """Put a held page in the index unless an equally good one is there; return the entry of ``key``.

        An exact page replaces a lossy one, never the reverse. ``entry.page == page`` if this page is the
        indexed one.
        """
        entry = self.index.entries.get(key)
        if entry is None:
            self._sequence += 1
            entry = Entry(key, parent, position, page, fidelity=fidelity, born=self._sequence)
            self.index.add(entry)
            self._on_insert(key)
        elif entry.fidelity > fidelity == Fidelity.EXACT and entry.page != page:
            old = entry.page
            if not self.pool.refs[old]:
                self._unqueue(entry)
                self._resolve_prefetch(entry, used=False)
                self.pool.free(old)
            entry.page = page
            entry.fidelity = fidelity
        return entry

    def unpin(self, entry: Entry, page: int) -> None:
        """Drop the last hold on ``page``: it stays cached if ``entry`` indexes it, otherwise it is freed.

        An entry with the same tokens in another page counts as used, so that the order stays tail first.
        """
        if entry.page != page:
            self.pool.free(page)
            if self.pool.refs[entry.page]:
                return
            self._unqueue(entry)
        self._sequence += 1
        entry.last = self._sequence
        self._policy.push(entry)

    def release(self, lease: Lease) -> None:
        """Release every page of a lease, tail first, so that the tail is evicted first."""
        refs, hashes, pages = self.pool.refs, lease.hashes, lease.pages
        for at in range(len(pages) - 1, -1, -1):
            page = pages[at]
            refs[page] -= 1
            if refs[page]:
                continue
            if at >= lease.committed:
                self.pool.free(page)
                continue
            entry = self.publish(hashes.pages[at], hashes.parent(at), at, page, lease.fidelity)
            self.unpin(entry, page)
        pages.clear()

    def free_private(self, page: int) -> None:
        """Free a page that is not in the index, with its one hold."""
        self.pool.refs[page] = 0
        self.pool.free(page)

    def reserve(self, pages: int, *, beyond_quota: bool = False) -> bool:
        """Evict until ``pages`` can be taken; return False, and evict nothing, if they cannot.

        While a lowered quota converges, use does not rise. ``beyond_quota`` lets a request that was accepted
        under a larger quota continue within the pool's reservation.
        """
        pool = self.pool
        ceiling = max(pool.limit, pool.used)
        if ceiling - pool.used + self.evictable < pages:
            if not beyond_quota or pool.reserved - pool.used + self.evictable < pages:
                return False
            ceiling = min(pool.reserved, max(ceiling, pool.used - self.evictable + pages))
        while pool.used + pages > ceiling:
            self.evict()
        return True

    def evict(self) -> bool:
        """Evict the policy's next page, or False if there is none.

        A page that a cached page follows is deferred until the follower is evicted.
        """
        entry = self._policy.pop()
        while entry is not None and entry.hash in self.index.children:
            entry.deferred = True
            self._deferred[entry] = None
            entry = self._policy.pop()
        if entry is None:
            if not self._deferred:
                return False
            entry, _ = self._deferred.popitem()
            entry.deferred = False
        self.on_evict(entry)
        self._resolve_prefetch(entry, used=False)
        self.evicted += 1
        self.pool.free(entry.page)
        parent = self.index.remove(entry)
        if parent is not None and parent.deferred:
            del self._deferred[parent]
            parent.deferred = False
            self._policy.put_back(parent)
        return True

    def block_of(self, entry: Entry) -> list[Entry] | None:
        """The 8 entries of the block that ends with ``entry``; None if it ends none or one is missing."""
        if entry.position % PAGES_PER_BLOCK != PAGES_PER_BLOCK - 1:
            return None
        block = [entry]
        for _ in range(PAGES_PER_BLOCK - 1):
            parent = self.index.entries.get(block[-1].parent)
            if parent is None:
                return None
            block.append(parent)
        block.reverse()
        return block

    def touch(self, hashes: Sequence[bytes]) -> None:
        """Move the cached pages of a prefix to the end of the eviction order, tail first."""
        for key in reversed(hashes):
            entry = self.index.entries.get(key)
            if entry is not None and not self.pool.refs[entry.page]:
                self._unqueue(entry)
                self.unpin(entry, entry.page)

    def _unqueue(self, entry: Entry) -> None:
        if entry.deferred:
            del self._deferred[entry]
            entry.deferred = False
        else:
            self._policy.discard(entry)

    def mark_prefetched(self, entry: Entry, block: PrefetchedBlock) -> None:
        """Record that a prefetch loaded this page."""
        entry.prefetched = block
        self.prefetched_pages += 1

    def _resolve_prefetch(self, entry: Entry, *, used: bool) -> None:
        if entry.prefetched is None:
            return
        if used:
            self.meter.use(entry.prefetched)
        else:
            self.meter.waste(entry.prefetched)
        entry.prefetched = None
        self.prefetched_pages -= 1

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Compare pool, index and policy with each other and with the pages of every holder.

        Args:
            held: pages of each lease and each load.

        Raises:
            AssertionError: names the page or the record that differs.
        """
        pool, index = self.pool, self.index
        expected = [0] * pool.reserved
        for pages in held:
            for page in pages:
                expected[page] += 1
        for page, (refs, holders) in enumerate(zip(pool.refs, expected, strict=True)):
            assert refs == holders, f"page {page}: {refs} references, {holders} holders"
        free = pool.free_pages()
        owner = {indexed.page for indexed in index.entries.values()}
        assert len(owner) == len(index.entries), "two entries share a page"
        assert len(set(free)) == len(free), "a page is free twice"
        for page in free:
            assert not expected[page], f"page {page} is free and held"
            assert page not in owner, f"page {page} is free and indexed"
        pinned = sum(1 for holders in expected if holders)
        queued = [*self._policy, *self._deferred]
        assert len(queued) == len(set(queued)) == self.evictable, "the policy holds an entry twice"
        assert len(free) + len(queued) + pinned == pool.reserved, (
            f"{len(free)} free + {len(queued)} cached + {pinned} pinned pages are not {pool.reserved}"
        )
        assert pool.used == pool.reserved - len(free), f"{pool.used} pages counted as used"
        assert set(queued) <= set(index.entries.values()), "the policy holds a page that is not indexed"
        for waiting in queued:
            assert not expected[waiting.page], f"page {waiting.page} is queued and held"
        children = dict(Counter(indexed.parent for indexed in index.entries.values()))
        assert children == index.children, "follower counts differ from the index"
        prefetched = sum(1 for entry in index.entries.values() if entry.prefetched is not None)
        assert prefetched == self.prefetched_pages, (
            f"{self.prefetched_pages} prefetched pages, {prefetched} found"
        )
