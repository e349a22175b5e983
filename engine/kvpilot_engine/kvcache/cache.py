"""KVCache: the hot pool, its prefix index and the host tier behind one facade.

Life of a block: a sequence leases pages and writes them; ``commit`` makes whole pages findable; ``release``
leaves them cached; eviction copies a complete block to the loader, which encodes it for the host tier; a
later lease, or a prefetch ahead of it, has the block decoded back into free pages.

Everything here runs on the stepping thread; only the jobs of ``jobs`` run on the loader's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from kvpilot_engine.contract import PAGE_TOKENS, KVCacheConfig
from kvpilot_engine.contract import metrics as names
from kvpilot_engine.kvcache.hot_tier import HotTier
from kvpilot_engine.kvcache.lease import Lease
from kvpilot_engine.kvcache.pool import PAGES_PER_BLOCK, KVLayout, PagePool, reserved_pages
from kvpilot_engine.kvcache.prefix_index import HashChain, InfiniteCache
from kvpilot_engine.kvcache.quota import Quota
from kvpilot_engine.kvcache.traffic import TierTraffic

Observer = Callable[..., Any]

_PAGES_PER_POLL = 256
_BLOCKS_PER_POLL = 64


class KVCache:
    """The paged, tiered prefix cache of one engine.

    Args:
        layout: shape of the model's cache.
        config: quotas, policy, codec and prefetch; every one of them changes hot by ``apply``.
        root: start of the hash chain: digest of weights, RoPE, dtype and layout version, never of the codec.
        clock: times the codecs, s.
        observer: called in order with ``("lookup", page_hashes, hit_pages)`` when a lease begins to compute
            behind its hits, and ``("insert", page_hash)``. ``page_hashes`` are the pages that a hit may
            serve, ``hit_pages`` how many of them did.

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
    ) -> None:
        self.layout = layout
        quota = Quota.of(config, layout)
        self._config = config
        self._observer = observer
        self._pool = PagePool(layout, reserved_pages(layout, config.max_tokens), quota.pages)
        self.k, self.v = self._pool.k, self._pool.v
        self._chain = HashChain(root)
        self._infinite = InfiniteCache()
        arrived = self._infinite.add if observer is None else self._insert_observed
        self._hot = HotTier(self._pool, config.cache_strategy, arrived)
        self._traffic = TierTraffic(self._hot, quota.host_bytes, config, clock)
        self._hot.leaving = self._traffic.leaving
        self._leases: set[Lease] = set()
        self._query_tokens = 0
        self._ceiling_pages = 0
        self._hit_pages = {"pool": 0, "host": 0}

    def lease(
        self, tokens: Sequence[int], salt: str = "", exact_only: bool = False, *, count: bool = True
    ) -> Lease:
        """Look ``tokens`` up and hold what the pool has of them.

        Args:
            tokens: the whole prompt, at least one token.
            salt: tenant; nothing is shared between salts.
            exact_only: use pages of exact fidelity only.
            count: count queries, hits and ceiling; False when an earlier lease of the sequence was counted.
        """
        usable = max(0, len(tokens) - 1) // PAGE_TOKENS
        lease = Lease(self._chain.root(salt), exact_only, usable, len(tokens), counted=not count)
        self._chain.extend(lease.hashes, lease.root, tokens, len(tokens) // PAGE_TOKENS)
        lease.host_hits = len(self._hot.pin(lease))
        self._leases.add(lease)
        return lease

    def load(self, lease: Lease) -> None:
        """Start loading what a slower tier has behind the hits; the caller has room for the whole prompt."""
        self._traffic.advance(lease)

    def prefetch(self, tokens: Sequence[int], salt: str = "", exact_only: bool = False) -> None:
        """Fetch the first ``prefetch_size`` blocks of a queued request ahead, into the coldest pages."""
        if not self._traffic.prefetches:
            return
        hashes: list[bytes] = []
        root = self._chain.root(salt)
        self._chain.extend(hashes, root, tokens, len(tokens) // PAGE_TOKENS)
        self._traffic.prefetch(hashes, root, max(0, len(tokens) - 1) // PAGE_TOKENS, exact_only)

    def relook(self, lease: Lease) -> None:
        """Pick up pages that others have committed since; nothing happens once the sequence computes."""
        if lease.computing or lease.released:
            return
        lease.host_hits += len(self._hot.pin(lease))

    def extend(self, lease: Lease, total_tokens: int) -> bool:
        """Hold pages for tokens [0, total_tokens), evicting cached ones where needed.

        Returns False, and changes nothing, when every page is in use: the caller preempts. A sequence that
        was accepted under a larger quota goes on within the reservation.
        """
        need = -(-total_tokens // PAGE_TOKENS) - len(lease.pages)
        if need <= 0:
            return True
        if not self._hot.make_room(need, beyond_quota=total_tokens > self.max_request_tokens):
            return False
        take = self._pool.take
        lease.pages.extend([take() for _ in range(need)])
        return True

    def commit(self, lease: Lease, tokens: Sequence[int], computed: int) -> None:
        """Make every page wholly below ``computed`` findable.

        Args:
            tokens: the sequence so far, at least ``computed`` of them.
            computed: tokens from the start whose K and V are in the pool.
        """
        if not lease.computing and computed > lease.hits * PAGE_TOKENS:
            lease.computing = True
            self._traffic.forget(lease)
            self._count(lease)
        done = computed // PAGE_TOKENS
        if done <= lease.committed:
            return
        hashes = lease.hashes
        self._chain.extend(hashes, lease.root, tokens, done)
        for at in range(lease.committed, done):
            parent = hashes[at - 1] if at else lease.root
            self._hot.publish(hashes[at], parent, at, lease.pages[at], lease.fidelity)
        lease.committed = done

    def release(self, lease: Lease) -> None:
        """End a lease: committed pages stay cached, the others are free. Doing it twice does nothing."""
        if lease.released:
            return
        lease.released = True
        self._traffic.forget(lease)
        self._hot.release(lease)
        self._leases.discard(lease)

    def poll(self) -> bool:
        """Once per step, and now and then when idle: land loads, go on lowering quotas, in bounded work.

        Returns True if a lease has changed.
        """
        changed = self._traffic.land()
        if self._pool.used > self._pool.limit:
            self._converge()
        self._traffic.shrink(_BLOCKS_PER_POLL)
        self._pool.trim(_PAGES_PER_POLL)
        return changed

    def _converge(self) -> None:
        """Evict towards a lowered quota, no faster than the encoder can follow."""
        for _ in range(_PAGES_PER_POLL):
            if self._pool.used <= self._pool.limit or not self._traffic.has_room or not self._hot.evict():
                return

    def wait(self, timeout_s: float) -> None:
        """Block until a load or an encoding can land, none is under way, or the time is up."""
        self._traffic.wait(timeout_s)

    @property
    def pages_free(self) -> int:
        """Pages of the quota that hold nothing."""
        return max(0, self._pool.limit - self._pool.used)

    @property
    def pages_available(self) -> int:
        """Pages of the quota that nobody holds, free or cached: what ``extend`` can count on."""
        return max(0, self._pool.limit - self._pool.used + self._hot.evictable)

    @property
    def pages_limit(self) -> int:
        """The quota, pages; use may be above it while it converges."""
        return self._pool.limit

    @property
    def max_request_tokens(self) -> int:
        """Longest sequence, prompt and answer, that fits an empty pool."""
        return self._pool.limit * PAGE_TOKENS

    @property
    def converging(self) -> bool:
        """True while a lowered quota is not reached yet."""
        return self._pool.used > self._pool.limit or self._traffic.host.over

    def ceilings(self) -> dict[str, int]:
        """Largest value of each knob that is bounded by what was reserved at the start, camelCase."""
        return {"maxTokens": self._pool.reserved * PAGE_TOKENS}

    def apply(self, new: KVCacheConfig) -> tuple[int, int]:
        """Take a new configuration at once; lowered quotas are reached over the next polls.

        Returns blocks kept and blocks lost by the change itself, which is none: what a lowered quota evicts
        later is counted in ``kvpilot_blocks_lost_total``.

        Raises:
            ValueError: max_tokens is above the reservation; nothing has changed then.
        """
        ceiling = self._pool.reserved * PAGE_TOKENS
        if new.max_tokens > ceiling:
            raise ValueError(f"max_tokens: at most {ceiling} without a restart, got {new.max_tokens}")
        quota = Quota.of(new, self.layout)
        if new.cache_strategy is not self._config.cache_strategy:
            self._hot.switch(new.cache_strategy)
        self._pool.limit = quota.pages
        self._traffic.configure(new, quota.host_bytes)
        self._config = new
        kept = -(-len(self._hot.index.entries) // PAGES_PER_BLOCK) + len(self._traffic.host)
        return kept, 0

    @property
    def budgeted_bytes(self) -> int:
        """Bytes that the hot pool may hold: its quota, or its use while a lowered quota converges."""
        return max(self._pool.limit, self._pool.used) * self.layout.page_bytes

    @property
    def free_slab_bytes(self) -> int:
        """Committed host memory of free pages; 0 on a device."""
        return self._pool.free_slab_bytes

    def counters(self) -> dict[str, float]:
        """Values of the cache's counters by ``contract.metrics`` name."""
        traffic, meter = self._traffic, self._hot.meter
        values: dict[str, float] = {
            names.QUERY_TOKENS_TOTAL: self._query_tokens,
            names.CEILING_TOKENS_TOTAL: self._ceiling_pages * PAGE_TOKENS,
            names.EVICTED_PAGES_TOTAL: self._hot.evicted,
            names.TIER_LOAD_BLOCKS_TOTAL: traffic.loaded_blocks,
            f"{names.PREFETCH_BLOCKS_TOTAL}{{result=used}}": meter.used,
            f"{names.PREFETCH_BLOCKS_TOTAL}{{result=wasted}}": meter.wasted,
        }
        for tier, pages in self._hit_pages.items():
            values[f"{names.HIT_TOKENS_TOTAL}{{tier={tier}}}"] = pages * PAGE_TOKENS
        for reason, blocks in traffic.lost.items():
            values[f"{names.BLOCKS_LOST_TOTAL}{{reason={reason}}}"] = blocks
        for op, seconds in traffic.codec_seconds.items():
            values[f"{names.CODEC_SECONDS_TOTAL}{{op={op}}}"] = seconds
        return values

    def gauges(self) -> dict[str, float]:
        """Values of the cache's gauges by ``contract.metrics`` name."""
        host, pool = self._traffic.host, self._pool
        return {
            f"{names.CACHED_PAGES}{{tier=pool}}": pool.used,
            f"{names.CACHED_PAGES}{{tier=host}}": len(host) * PAGES_PER_BLOCK,
            f"{names.CACHE_BYTES}{{tier=pool}}": pool.used * self.layout.page_bytes,
            f"{names.CACHE_BYTES}{{tier=host}}": host.used,
            f"{names.CACHE_BUDGET_BYTES}{{tier=pool}}": pool.limit * self.layout.page_bytes,
            f"{names.CACHE_BUDGET_BYTES}{{tier=host}}": host.budget,
        }

    def check_integrity(self) -> None:
        """Raise AssertionError, with a sentence that says where, if any two records disagree."""
        held = [lease.pages for lease in self._leases]
        self._hot.check_integrity([*held, *self._traffic.loading_pages])
        self._traffic.host.check_integrity()
        for lease in self._leases:
            assert lease.hits <= lease.committed <= len(lease.pages), (
                f"a lease has {lease.hits} hits, {lease.committed} committed, {len(lease.pages)} pages"
            )

    def close(self) -> None:
        """End the loader thread. The cache must not be used afterwards."""
        self._traffic.close()

    def _count(self, lease: Lease) -> None:
        if lease.counted:
            return
        lease.counted = True
        self._query_tokens += lease.tokens
        self._hit_pages["pool"] += lease.hits - lease.host_hits
        self._hit_pages["host"] += lease.host_hits
        self._ceiling_pages += self._infinite.prefix(lease.hashes, lease.hits, lease.usable)
        if self._observer is not None:
            self._observer("lookup", lease.hashes[: lease.usable], lease.hits)

    def _insert_observed(self, key: bytes) -> None:
        self._infinite.add(key)
        if self._observer is not None:
            self._observer("insert", key)
