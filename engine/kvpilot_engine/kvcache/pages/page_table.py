"""The hot tier: pages in the pool, who holds them, how they are found, and which of them goes next.

A page is free, private (written by one lease or one load, not findable), or indexed. An indexed page that
nobody holds is cached and belongs to the policy. Leases hold whole prefixes, so a page in use never has an
unpinned page before it that matters to its holder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from kvpilot_engine.contract import CacheStrategy
from kvpilot_engine.kvcache.fidelity import Fidelity
from kvpilot_engine.kvcache.lease import Lease
from kvpilot_engine.kvcache.policies import make_policy
from kvpilot_engine.kvcache.pool import PAGES_PER_BLOCK, PagePool
from kvpilot_engine.kvcache.prefetch import FetchedBlock, PrefetchMeter
from kvpilot_engine.kvcache.prefix_index import Entry, PrefixIndex


def _ignore(_: Entry) -> None:
    """Nobody wants evicted pages."""


class HotTier:
    """Pool, index and policy, kept in step with one another.

    ``arrived`` is called with each hash that becomes findable; ``leaving``, which its owner sets, with each
    entry that is evicted, while its page and its block are still intact.
    """

    def __init__(self, pool: PagePool, strategy: CacheStrategy, arrived: Callable[[bytes], None]) -> None:
        self.pool = pool
        self.index = PrefixIndex()
        self.meter = PrefetchMeter()
        self.prefetched_pages = 0  # cached pages that a prefetch brought and no lease has used yet
        self.evicted = 0
        self._policy = make_policy(strategy)
        self._parked: dict[Entry, None] = {}
        self.leaving: Callable[[Entry], None] = _ignore
        self._arrived = arrived
        self._sequence = 0

    @property
    def evictable(self) -> int:
        """Cached pages that nobody holds."""
        return len(self._policy) + len(self._parked)

    def switch(self, strategy: CacheStrategy) -> None:
        """Order the same pages by another policy; every page keeps what is known about it."""
        entries = sorted((*self._policy, *self._parked), key=lambda entry: entry.last)
        self._parked.clear()
        self._policy = make_policy(strategy)
        for entry in entries:
            entry.parked = False
            self._policy.push(entry)

    def pin(self, lease: Lease) -> list[FetchedBlock]:
        """Let ``lease`` hold every further page of its prompt that the index has, in order.

        Private pages in their places are freed. Returns, for each page that a prefetch brought, its block.
        """
        entries, refs, hashes, pages = self.index.entries, self.pool.refs, lease.hashes, lease.pages
        at, worst, exact_only = lease.hits, lease.fidelity, lease.exact_only
        fetched: list[FetchedBlock] = []
        while at < lease.usable and (entry := entries.get(hashes[at])) is not None:
            if entry.fidelity and exact_only:
                break
            page = entry.page
            if not refs[page]:
                self._unqueue(entry)
            refs[page] += 1
            entry.uses += 1
            worst = max(worst, entry.fidelity)
            if entry.fetched is not None:
                fetched.append(entry.fetched)
                self._settle(entry, used=True)
            if at < len(pages):
                self.drop_private(pages[at])
                pages[at] = page
            else:
                pages.append(page)
            at += 1
        lease.hits = at
        lease.committed = max(lease.committed, at)
        lease.fidelity = worst
        return fetched

    def publish(self, key: bytes, parent: bytes, position: int, page: int, fidelity: Fidelity) -> Entry:
        """Make a held page findable, unless a page as good already is; returns the entry of ``key``.

        An exact page takes the place of a lossy one, never the other way round. ``entry.page == page`` says
        that it is this page that is found.
        """
        entry = self.index.entries.get(key)
        if entry is None:
            self._sequence += 1
            entry = Entry(key, parent, position, page, fidelity=fidelity, born=self._sequence)
            self.index.add(entry)
            self._arrived(key)
        elif entry.fidelity > fidelity == Fidelity.EXACT and entry.page != page:
            old = entry.page
            if not self.pool.refs[old]:
                self._unqueue(entry)
                self._settle(entry, used=False)
                self.pool.free(old)
            entry.page = page
            entry.fidelity = fidelity
        return entry

    def let_go(self, entry: Entry, page: int) -> None:
        """The last holder of ``page`` leaves: it stays cached if ``entry`` is its own, else it is freed.

        An entry of the same tokens in another page counts as used, so that the order stays tail first.
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
        """Give up every page of a lease, the tail first, so that the tail is the first to be evicted."""
        refs, hashes, pages = self.pool.refs, lease.hashes, lease.pages
        for at in range(len(pages) - 1, -1, -1):
            page = pages[at]
            refs[page] -= 1
            if refs[page]:
                continue
            if at >= lease.committed:
                self.pool.free(page)
                continue
            parent = hashes[at - 1] if at else lease.root
            self.let_go(self.publish(hashes[at], parent, at, page, lease.fidelity), page)
        pages.clear()

    def drop_private(self, page: int) -> None:
        """Free a page that only its one holder knew."""
        self.pool.refs[page] = 0
        self.pool.free(page)

    def make_room(self, pages: int, *, beyond_quota: bool = False) -> bool:
        """Evict until ``pages`` can be taken; False, and nothing evicted, when they cannot be.

        While a lowered quota converges, taking pages does not raise use. ``beyond_quota`` lets a request that
        was accepted under a larger quota go on within the reservation.
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
        """Drop the policy's next page; one that a cached page follows waits until that one is gone."""
        entry = self._policy.pop()
        while entry is not None and entry.hash in self.index.children:
            entry.parked = True
            self._parked[entry] = None
            entry = self._policy.pop()
        if entry is None:
            if not self._parked:
                return False
            entry, _ = self._parked.popitem()
            entry.parked = False
        self.leaving(entry)
        self._settle(entry, used=False)
        self.evicted += 1
        self.pool.free(entry.page)
        parent = self.index.remove(entry)
        if parent is not None and parent.parked:
            del self._parked[parent]
            parent.parked = False
            self._policy.put_back(parent)
        return True

    def block_of(self, entry: Entry) -> list[Entry] | None:
        """The 8 entries of the block that ``entry`` ends, or None: it ends none, or one is not cached."""
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
        """Count the cached pages of a prefix as just used, the tail first."""
        for key in reversed(hashes):
            entry = self.index.entries.get(key)
            if entry is not None and not self.pool.refs[entry.page]:
                self._unqueue(entry)
                self.let_go(entry, entry.page)

    def _unqueue(self, entry: Entry) -> None:
        if entry.parked:
            del self._parked[entry]
            entry.parked = False
        else:
            self._policy.discard(entry)

    def mark_fetched(self, entry: Entry, block: FetchedBlock) -> None:
        """Remember that a prefetch brought this page."""
        entry.fetched = block
        self.prefetched_pages += 1

    def _settle(self, entry: Entry, *, used: bool) -> None:
        if entry.fetched is None:
            return
        if used:
            self.meter.use(entry.fetched)
        else:
            self.meter.waste(entry.fetched)
        entry.fetched = None
        self.prefetched_pages -= 1

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Compare pool, index and policy with one another and with ``held``, the pages of every holder.

        Raises:
            AssertionError: naming the page or hash that disagrees.
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
        queued = [*self._policy, *self._parked]
        assert len(queued) == len(set(queued)) == self.evictable, "the policy holds an entry twice"
        assert len(free) + len(queued) + pinned == pool.reserved, (
            f"{len(free)} free + {len(queued)} cached + {pinned} pinned is not {pool.reserved}"
        )
        assert pool.used == pool.reserved - len(free), f"{pool.used} pages counted as used"
        assert set(queued) <= set(index.entries.values()), "the policy holds a page that is not indexed"
        for waiting in queued:
            assert not expected[waiting.page], f"page {waiting.page} is queued and held"
        children = dict(Counter(indexed.parent for indexed in index.entries.values()))
        assert children == index.children, "follower counts differ from the index"
        fetched = sum(1 for entry in index.entries.values() if entry.fetched is not None)
        assert fetched == self.prefetched_pages, f"{self.prefetched_pages} prefetched pages, {fetched} found"
