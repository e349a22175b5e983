"""KVCache: the device pool, its prefix index and the tiers below it behind one facade.

Life of a block: a sequence leases pages and writes them; ``commit`` puts whole pages in the index;
``release`` leaves them cached; eviction copies a complete block to the worker, which encodes it for a tier;
a later lease, or a prefetch ahead of it, has the block decoded back into free pages.

Everything here runs on the stepping thread; only the jobs of ``tiers.jobs`` run on the worker's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvpilot_engine.contract import PAGE_TOKENS, KVCacheConfig
from kvpilot_engine.contract import metrics as names
from kvpilot_engine.kvcache.lease import Lease
from kvpilot_engine.kvcache.pages.page_table import PageTable
from kvpilot_engine.kvcache.pages.pool import PAGES_PER_BLOCK, KVLayout, PagePool, reserved_pages
from kvpilot_engine.kvcache.pages.prefix_index import InfiniteCache, PrefixHashes
from kvpilot_engine.kvcache.quota import Quota
from kvpilot_engine.kvcache.tiers import TIERS
from kvpilot_engine.kvcache.tiers.base import Tier
from kvpilot_engine.kvcache.tiers.transfer import TierTransfer

Observer = Callable[..., Any]

POOL = "pool"
"""Value of the ``tier`` label for the device pool."""

_PAGES_PER_POLL = 256
_BLOCKS_PER_POLL = 64


class KVCache:
    """The paged, tiered prefix cache of one engine.

    Args:
        layout: shape of the model's cache.
        config: quotas, policy, codec and prefetch; ``apply`` changes each of them without a restart.
        root: start of the hash chain: digest of weights, RoPE, dtype and layout version, never of the codec.
        clock: times the codecs, s.
        observer: called in order with ``("lookup", page_hashes, hit_pages)`` when a lease starts to compute
            behind its hits, and ``("insert", page_hash)``. ``page_hashes`` are the pages that a hit may
            serve, ``hit_pages`` is how many of them did.
        tiers: below the device pool, fastest first; by default those that ``tiers.TIERS`` registers.

    Attributes:
        k, v: [layers, slots, kv_heads, head_dim]; page ``p`` is slots ``16 p`` to ``16 p + 15``.
    """

    def __init__(
        self,
        layout: KVLayout,
        config: KVCacheConfig,
        root: bytes,
        clock: Callable[[], float] = time.monotonic,
        *,
        observer: Observer | None = None,
        tiers: Sequence[Tier] | None = None,
    ) -> None:
        self.layout = layout
        tiers = [make() for make in TIERS] if tiers is None else tiers
        quota = Quota.of(config, layout, tiers)
        self._config = config
        self._observer = observer
        self._pool = PagePool(layout, reserved_pages(layout, config.max_tokens), quota.pages)
        self.k, self.v = self._pool.k, self._pool.v
        self._root = root
        self._infinite = InfiniteCache()
        on_insert = self._infinite.add if observer is None else self._insert_observed
        self._page_table = PageTable(self._pool, config.cache_strategy, on_insert)
        self._transfer = TierTransfer(self._page_table, tiers, clock)
        self._transfer.configure(config, quota.tier_bytes)
        self._page_table.on_evict = self._transfer.store_evicted
        self._leases: set[Lease] = set()
        self._query_tokens = 0
        self._ceiling_pages = 0
        self._hit_pages = {POOL: 0} | {tier.name: 0 for tier in tiers}

    def hashes(self, salt: str = "") -> PrefixHashes:
        """Start the page hashes of one sequence, which hands them to ``prefetch`` and to each ``lease``.

        Args:
            salt: tenant; no page is shared between salts.
        """
        return PrefixHashes(self._root, salt)

    def lease(
        self, tokens: Sequence[int], hashes: PrefixHashes, exact_only: bool = False, *, count: bool = True
    ) -> Lease:
        """Look ``tokens`` up and hold the pages that the pool has of them.

        Args:
            tokens: the whole prompt, at least one token.
            hashes: of the sequence; extended to all of its whole pages.
            exact_only: use pages of exact fidelity only.
            count: count queries, hits and ceiling; False if an earlier lease of the sequence was counted.
        """
        hashes.extend(tokens, len(tokens) // PAGE_TOKENS)
        lease = Lease(hashes, exact_only, _usable_pages(tokens), len(tokens), counted=not count)
        self._page_table.pin(lease)
        self._leases.add(lease)
        return lease

    def load(self, lease: Lease) -> None:
        """Start to load what the tiers have behind the hits; the caller has room for the whole prompt."""
        self._transfer.advance(lease)

    def prefetch(self, tokens: Sequence[int], hashes: PrefixHashes, exact_only: bool = False) -> None:
        """Load the first ``prefetch_size`` blocks of a queued request ahead of its lease."""
        if self._transfer.prefetches:
            hashes.extend(tokens, len(tokens) // PAGE_TOKENS)
            self._transfer.prefetch(hashes, _usable_pages(tokens), exact_only)

    def refresh(self, lease: Lease) -> None:
        """Hold pages that others have committed since; no effect once the sequence computes."""
        if not lease.computing and not lease.released:
            self._page_table.pin(lease)

    def extend(self, lease: Lease, total_tokens: int) -> bool:
        """Hold pages for tokens [0, total_tokens), and evict cached ones where needed.

        Returns False, and changes nothing, if the pages in use leave no room: the caller preempts. A sequence
        that was accepted under a larger quota continues within the pool's reservation.
        """
        need = -(-total_tokens // PAGE_TOKENS) - len(lease.pages)
        if need <= 0:
            return True
        if not self._page_table.reserve(need, beyond_quota=total_tokens > self.max_request_tokens):
            return False
        take = self._pool.take
        lease.pages.extend([take() for _ in range(need)])
        return True

    def commit(self, lease: Lease, tokens: Sequence[int], computed: int) -> None:
        """Put every page that ends at or below ``computed`` in the index.

        Args:
            tokens: the sequence so far, at least ``computed`` tokens.
            computed: tokens from the start whose K and V are in the pool.
        """
        if not lease.computing and computed > lease.hits * PAGE_TOKENS:
            lease.computing = True
            self._transfer.forget(lease)
            self._count(lease)
        done = computed // PAGE_TOKENS
        if done <= lease.committed:
            return
        hashes = lease.hashes
        hashes.extend(tokens, done)
        for at in range(lease.committed, done):
            self._page_table.publish(hashes.pages[at], hashes.parent(at), at, lease.pages[at], lease.fidelity)
        lease.committed = done

    def release(self, lease: Lease) -> None:
        """End a lease: committed pages stay cached, the others are freed. A second call has no effect."""
        if lease.released:
            return
        lease.released = True
        self._transfer.forget(lease)
        self._page_table.release(lease)
        self._leases.discard(lease)

    def poll(self) -> bool:
        """Land loads and converge to lowered quotas, in bounded work; for each step, and when idle.

        Returns True if a lease has changed.
        """
        changed = self._transfer.land()
        if self._pool.used > self._pool.limit:
            self._converge()
        self._transfer.shrink(_BLOCKS_PER_POLL)
        self._pool.trim(_PAGES_PER_POLL)
        return changed

    def _converge(self) -> None:
        """Evict towards a lowered quota, no faster than the encoder takes blocks."""
        for _ in range(_PAGES_PER_POLL):
            if (
                self._pool.used <= self._pool.limit
                or not self._transfer.ready_to_store
                or not self._page_table.evict()
            ):
                return

    def wait(self, timeout_s: float) -> None:
        """Block until a load or an encoding can land, none is pending, or the timeout."""
        self._transfer.wait(timeout_s)

    @property
    def pages_free(self) -> int:
        """Pages of the quota that are free."""
        return max(0, self._pool.limit - self._pool.used)

    @property
    def pages_available(self) -> int:
        """Pages of the quota without a holder, free or cached: as many as ``extend`` can provide."""
        return max(0, self._pool.limit - self._pool.used + self._page_table.evictable)

    @property
    def pages_limit(self) -> int:
        """The quota, pages; use may exceed it while it converges."""
        return self._pool.limit

    @property
    def max_request_tokens(self) -> int:
        """Longest sequence, prompt and answer, that fits an empty pool, tokens."""
        return self._pool.limit * PAGE_TOKENS

    @property
    def converging(self) -> bool:
        """True until every lowered quota is reached."""
        return self._pool.used > self._pool.limit or self._transfer.converging

    def ceilings(self) -> dict[str, int]:
        """Largest value of each knob that the reservation at the start bounds, by its camelCase name."""
        return {"maxTokens": self._pool.reserved * PAGE_TOKENS}

    def apply(self, new: KVCacheConfig) -> tuple[int, int]:
        """Take a new configuration at once; lowered quotas are reached over the next polls.

        Returns the blocks kept and the blocks lost by the change itself, which are none: blocks that a
        lowered quota evicts later are counted in ``kvpilot_blocks_lost_total``.

        Raises:
            ValueError: max_tokens is above the reservation; nothing has changed.
        """
        ceiling = self._pool.reserved * PAGE_TOKENS
        if new.max_tokens > ceiling:
            raise ValueError(f"max_tokens: at most {ceiling} without a restart, got {new.max_tokens}")
        quota = Quota.of(new, self.layout, self._transfer.tiers)
        if new.cache_strategy is not self._config.cache_strategy:
            self._page_table.switch(new.cache_strategy)
        self._pool.limit = quota.pages
        self._transfer.configure(new, quota.tier_bytes)
        self._config = new
        kept = -(-len(self._page_table.index.entries) // PAGES_PER_BLOCK) + self._transfer.stored_blocks
        return kept, 0

    @property
    def budgeted_bytes(self) -> int:
        """Bytes that the device pool may hold: its quota, or its use while a lowered quota converges."""
        return max(self._pool.limit, self._pool.used) * self.layout.page_bytes

    @property
    def free_slab_bytes(self) -> int:
        """Committed host memory of free pages; 0 on a device."""
        return self._pool.free_slab_bytes

    def counters(self) -> Mapping[str, Mapping[str, float]]:
        """Values of the cache's counters: metric name of ``contract.metrics`` -> label value -> value."""
        transfer, meter = self._transfer, self._page_table.meter
        return {
            names.QUERY_TOKENS_TOTAL: {"": self._query_tokens},
            names.CEILING_TOKENS_TOTAL: {"": self._ceiling_pages * PAGE_TOKENS},
            names.EVICTED_PAGES_TOTAL: {"": self._page_table.evicted},
            names.TIER_LOAD_BLOCKS_TOTAL: dict(transfer.loaded_blocks),
            names.PREFETCH_BLOCKS_TOTAL: {"used": meter.used, "wasted": meter.wasted},
            names.HIT_TOKENS_TOTAL: {tier: pages * PAGE_TOKENS for tier, pages in self._hit_pages.items()},
            names.BLOCKS_LOST_TOTAL: dict(transfer.lost),
            names.CODEC_SECONDS_TOTAL: dict(transfer.codec_seconds),
        }

    def gauges(self) -> Mapping[str, Mapping[str, float]]:
        """Values of the cache's gauges: metric name of ``contract.metrics`` -> label value -> value."""
        pool, tiers, page_bytes = self._pool, self._transfer.tiers, self.layout.page_bytes
        return {
            names.CACHED_PAGES: {POOL: pool.used} | {t.name: len(t) * PAGES_PER_BLOCK for t in tiers},
            names.CACHE_BYTES: {POOL: pool.used * page_bytes} | {t.name: t.used for t in tiers},
            names.CACHE_BUDGET_BYTES: {POOL: pool.limit * page_bytes} | {t.name: t.budget for t in tiers},
        }

    def check_integrity(self) -> None:
        """Raise AssertionError, with the record that differs, if any two records disagree."""
        held = [lease.pages for lease in self._leases]
        self._page_table.check_integrity([*held, *self._transfer.loading_pages])
        self._transfer.check_integrity()
        for lease in self._leases:
            assert lease.hits <= lease.committed <= len(lease.pages), (
                f"a lease has {lease.hits} hits, {lease.committed} committed, {len(lease.pages)} pages"
            )

    def close(self) -> None:
        """End the worker's thread. The cache must not be used afterwards."""
        self._transfer.close()

    def _count(self, lease: Lease) -> None:
        if lease.counted:
            return
        lease.counted = True
        self._query_tokens += lease.tokens
        self._hit_pages[POOL] += lease.hits - lease.hits_by_tier.total()
        for tier, pages in lease.hits_by_tier.items():
            self._hit_pages[tier] += pages
        hashes = lease.hashes.pages
        self._ceiling_pages += self._infinite.prefix(hashes, lease.hits, lease.usable)
        if self._observer is not None:
            self._observer("lookup", hashes[: lease.usable], lease.hits)

    def _insert_observed(self, key: bytes) -> None:
        self._infinite.add(key)
        if self._observer is not None:
            self._observer("insert", key)


def _usable_pages(tokens: Sequence[int]) -> int:
    """Pages of a prompt that a hit may serve: at least one token is always computed."""
    return max(0, len(tokens) - 1) // PAGE_TOKENS
