"""Transfer of blocks between the device pool and the tiers.

Store: a complete block whose first page is evicted is copied at once, encoded by the worker and put in the
first tier that takes it; what a tier evicts moves to the next one. Under a lowered budget, stored blocks are
recompressed before any is evicted. Load: the blocks that continue a lease's prefix are decoded into private
pages, which enter the index when the job lands. No failure reaches a request: a block that cannot be loaded
is a miss, and counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

from kvpilot_engine.contract import KVCacheConfig, compression_level
from kvpilot_engine.contract.metrics import LOST_REASONS
from kvpilot_engine.kvcache.lease import Lease
from kvpilot_engine.kvcache.pages.page_table import PageTable
from kvpilot_engine.kvcache.pages.pool import PAGES_PER_BLOCK
from kvpilot_engine.kvcache.pages.prefetch import PrefetchedBlock
from kvpilot_engine.kvcache.pages.prefix_index import Entry, PrefixHashes
from kvpilot_engine.kvcache.tiers.base import StoredBlock, Tier
from kvpilot_engine.kvcache.tiers.codecs import Codec, codec_named
from kvpilot_engine.kvcache.tiers.jobs import (
    EncodeJob,
    LoadJob,
    Place,
    RecompressJob,
    SnapshotBuffers,
    TrimJob,
)
from kvpilot_engine.kvcache.tiers.worker import TierWorker

_TRIM_BYTES = 16 << 20
"""Evicted bytes after which the heap returns memory to the system. A block that replaces one of a lower
compression level leaves a hole in the heap; without trimming, a lowered budget would free no memory."""

_MAX_RECOMPRESSING = 4
"""Recompressions in flight: enough to keep the worker busy between two polls, and few enough that no more
blocks are recompressed than a lowered budget needs."""

_PREFETCH_SHARE = 4  # unused prefetched pages fill at most 1/4 of the pool


class TierTransfer:
    """Moves blocks between the device pool and its tiers.

    Args:
        page_table: of the device pool.
        tiers: fastest first; each block is stored in at most one of them.
        clock: times the codecs, s.

    Attributes:
        loaded_blocks: blocks that were decoded into the pool, by name of the tier.
        lost: lost blocks, by reason.
        codec_seconds: time on the worker's thread, by operation.
    """

    def __init__(self, page_table: PageTable, tiers: Sequence[Tier], clock: Callable[[], float]) -> None:
        self._clock = clock
        self.page_table = page_table
        self.tiers = tiers
        self.lost = dict.fromkeys(LOST_REASONS, 0)
        self.codec_seconds = {"encode": 0.0, "decode": 0.0}
        self.loaded_blocks = {tier.name: 0 for tier in tiers}
        self._served = 0  # leases for which a load has landed
        self._worker = TierWorker(page_table.pool.layout.device)
        self._buffers = SnapshotBuffers(page_table.pool)
        self._encoding: set[bytes] = set()
        self._loads: dict[bytes, LoadJob] = {}
        self._waiting: dict[Lease, list[LoadJob]] = {}
        self._ahead_pages = 0
        self._less_compressed: deque[tuple[Tier, bytes]] = deque()  # candidates for recompression
        self._recompressing = 0
        self._untrimmed = 0

    def configure(self, config: KVCacheConfig, tier_bytes: Mapping[str, int]) -> None:
        """Take codec, prefetch size and budgets.

        The codec applies to blocks that are evicted from now on, and to stored blocks under a lowered budget.
        """
        level = compression_level(config.use_compression, config.compression_ratio)
        self._codec: Codec = codec_named(level.codec)
        self._ahead = config.prefetch_size if config.enable_prefetch else 0
        self._less_compressed.clear()
        for tier in self.tiers:
            tier.budget = tier_bytes[tier.name]
            if tier.budget and tier.over:
                keys = tier.less_compressed(self._codec.fidelity)
                self._less_compressed.extend((tier, key) for key in keys)

    @property
    def stored_blocks(self) -> int:
        """Blocks in all tiers."""
        return sum(map(len, self.tiers))

    @property
    def converging(self) -> bool:
        """True until every lowered budget is reached."""
        return any(tier.over for tier in self.tiers)

    @property
    def prefetches(self) -> bool:
        """True if a prefetch could find a block."""
        return bool(self._ahead and self.stored_blocks)

    @property
    def ready_to_store(self) -> bool:
        """True if a page can be evicted now without losing its block because the encoder is busy."""
        return self._buffers.available or not self._stores

    @property
    def _stores(self) -> bool:
        return any(tier.budget for tier in self.tiers)

    @property
    def loading_pages(self) -> list[list[int]]:
        """The private pages of each load in flight."""
        return [[place.page for place in load.places] for load in self._loads.values()]

    def _find(self, key: bytes) -> tuple[Tier, StoredBlock] | None:
        for tier in self.tiers:
            if (block := tier.get(key)) is not None:
                return tier, block
        return None

    def store_evicted(self, entry: Entry) -> None:
        """Encode the block that ends with ``entry``, unless a tier has an equally good one."""
        if entry.position % PAGES_PER_BLOCK != PAGES_PER_BLOCK - 1 or not self._stores:
            return
        found = self._find(entry.hash)
        stored = found[1] if found else None
        best = max(entry.fidelity, self._codec.fidelity)
        if entry.hash in self._encoding or (stored is not None and stored.fidelity <= best):
            return
        block = self.page_table.block_of(entry)
        if block is None:
            self.lost["incomplete"] += stored is None
            return
        ancestry = max(page.fidelity for page in block)
        if stored is not None and stored.fidelity <= max(ancestry, best):
            return
        source = self._buffers.copy([page.page for page in block])
        if source is None:
            self.lost["busy"] += stored is None
            return
        self._encoding.add(entry.hash)
        self._worker.submit(
            EncodeJob(entry.hash, source, self._buffers, self._codec, ancestry, self._clock, self._encoded),
            urgent=False,
        )

    def _encoded(self, job: EncodeJob) -> None:
        self._encoding.discard(job.key)
        self.codec_seconds["encode"] += job.seconds
        if job.encoded is None:
            self.lost["failed"] += 1
            return
        block = StoredBlock(job.encoded, max(job.ancestry, job.encoded.fidelity))
        if not self._put(job.key, block):
            self.lost["evicted"] += 1

    def _put(self, key: bytes, block: StoredBlock, first: int = 0) -> bool:
        """Store a block in the first tier, from ``tiers[first]`` on, that takes it."""
        for at, tier in enumerate(self.tiers[first:], first):
            converging = tier.over  # ``shrink`` restores a lowered budget in bounded steps
            if tier.put(key, block):
                for other in self.tiers:
                    if other is not tier:
                        other.drop(key)
                if not converging:
                    self._evict(at, "evicted", PAGES_PER_BLOCK)
                return True
        return False

    def _evict(self, at: int, reason: str, max_blocks: int) -> None:
        """Evict from ``tiers[at]`` while it is over budget; each block moves to the next tier or is lost."""
        tier = self.tiers[at]
        before = tier.used
        for key, block in tier.shrink(max_blocks):
            if not self._put(key, block, at + 1):
                self.lost[reason] += 1
        self._trim_after(before - tier.used)

    def _trim_after(self, freed: int, *, at_once: bool = False) -> None:
        """Trim the heap once enough bytes were freed; ``at_once`` does so for any number of them."""
        self._untrimmed += freed
        if self._untrimmed >= _TRIM_BYTES or (at_once and self._untrimmed):
            self._untrimmed = 0
            self._worker.submit(TrimJob(), urgent=False)

    def advance(self, lease: Lease) -> None:
        """Load the next blocks of the lease's prompt: as many at a time as are prefetched, at least one."""
        if not self._loads and not self.stored_blocks:
            return
        max_loads, at = max(1, self._ahead), lease.hits
        while at < lease.usable and len(self._waiting.get(lease, ())) < max_loads:
            at = (at // PAGES_PER_BLOCK + 1) * PAGES_PER_BLOCK
            if at > len(lease.hashes.pages):
                return
            key = lease.hashes.pages[at - 1]
            load = self._loads.get(key)
            if load is not None and load in self._waiting.get(lease, ()):
                continue
            if key in lease.requested_blocks:
                return
            if load is None:
                load = self._start(lease.hashes, at, lease.usable, lease.exact_only)
            if load is None or (lease.exact_only and load.block.fidelity):
                return
            lease.requested_blocks.add(key)
            lease.pending_pages += len(load.places)
            self._waiting.setdefault(lease, []).append(load)
            if load.ahead:
                load.ahead = False
                self._ahead_pages -= len(load.places)
                self.page_table.meter.used += 1

    def prefetch(self, hashes: PrefixHashes, usable: int, exact_only: bool) -> None:
        """Load the first blocks behind the cached prefix, for a request that is still queued."""
        entries, pages, at = self.page_table.index.entries, hashes.pages, 0
        while at < usable and (entry := entries.get(pages[at])) and not (exact_only and entry.fidelity):
            at += 1
        cached = at
        for _ in range(self._ahead):
            at = (at // PAGES_PER_BLOCK + 1) * PAGES_PER_BLOCK
            if at > len(pages) or at - PAGES_PER_BLOCK >= usable:
                return
            if pages[at - 1] in self._loads:
                continue
            unused = self.page_table.prefetched_pages + self._ahead_pages + PAGES_PER_BLOCK
            if unused * _PREFETCH_SHARE > self.page_table.pool.limit or self._find(pages[at - 1]) is None:
                return
            # Making room must not evict the prefix that the block continues.
            self.page_table.touch(pages[:cached])
            cached = 0
            load = self._start(hashes, at, usable, exact_only)
            if load is None:
                return
            load.ahead = True
            self._ahead_pages += len(load.places)

    def _start(self, hashes: PrefixHashes, end: int, usable: int, exact_only: bool) -> LoadJob | None:
        """Load the missing pages of the block of pages ``end - 8`` to ``end``; None if that is impossible."""
        found = self._find(hashes.pages[end - 1])
        if found is None or (exact_only and found[1].fidelity):
            return None
        entries = self.page_table.index.entries
        missing = [
            at
            for at in range(end - PAGES_PER_BLOCK, min(end, usable))
            if (entry := entries.get(hashes.pages[at])) is None or (exact_only and entry.fidelity)
        ]
        if not missing or not self.page_table.reserve(len(missing)):
            return None
        pool = self.page_table.pool
        places = [Place(at, hashes.pages[at], hashes.parent(at), pool.take()) for at in missing]
        load = LoadJob(hashes.pages[end - 1], *found, places, pool, self._clock, self._loaded)
        self._loads[load.key] = load
        self._worker.submit(load, urgent=True)
        return load

    def _loaded(self, load: LoadJob) -> None:
        del self._loads[load.key]
        self.codec_seconds["decode"] += load.seconds
        if load.ahead:
            self._ahead_pages -= len(load.places)
        entries = self._discard(load) if load.error else self._publish(load)
        for lease in [lease for lease, loads in self._waiting.items() if load in loads]:
            self._resume(lease, load)
        refs = self.page_table.pool.refs
        for place, entry in zip(reversed(load.places), reversed(entries), strict=False):
            refs[place.page] -= 1
            if not refs[place.page]:
                self.page_table.unpin(entry, place.page)

    def _discard(self, load: LoadJob) -> list[Entry]:
        for tier in self.tiers:  # it may have moved since the load started
            tier.drop(load.key)
        self.lost["corrupt"] += 1
        for place in load.places:
            self.page_table.free_private(place.page)
        return []

    def _publish(self, load: LoadJob) -> list[Entry]:
        self.loaded_blocks[load.tier.name] += 1
        prefetched = PrefetchedBlock(load.tier.name)
        entries = []
        for place in load.places:
            entry = self.page_table.publish(
                place.key, place.parent, place.position, place.page, load.block.fidelity
            )
            if load.ahead and entry.page == place.page:
                self.page_table.mark_prefetched(entry, prefetched)
            entries.append(entry)
        if load.ahead and not any(entry.prefetched is prefetched for entry in entries):
            self.page_table.meter.waste(prefetched)
        return entries

    def _resume(self, lease: Lease, load: LoadJob) -> None:
        """Let a lease hold what a landed load brought, and load the next block."""
        loads = self._waiting[lease]
        loads.remove(load)
        if not loads:
            del self._waiting[lease]
        lease.pending_pages -= len(load.places)
        before = lease.hits
        self.page_table.pin(lease)
        if load.error is None:
            served = sum(before <= place.position < lease.hits for place in load.places)
            lease.hits_by_tier[load.tier.name] += served
        self._served += 1
        self.advance(lease)

    def forget(self, lease: Lease) -> None:
        """Let a lease wait for no load; the loads still land in the pool."""
        self._waiting.pop(lease, None)
        lease.pending_pages = 0

    def land(self) -> bool:
        """Land finished jobs; True if a lease waits for fewer loads than before."""
        before = self._served
        self._worker.land()
        return self._served > before

    def shrink(self, max_blocks: int) -> None:
        """Take one bounded step towards lowered budgets: recompress stored blocks, then evict."""
        if not self.converging:
            return
        while self._less_compressed and self._recompressing < _MAX_RECOMPRESSING:
            tier, key = self._less_compressed.popleft()
            block = tier.get(key, touch=False)
            if tier.over and block is not None and block.encoded.fidelity < self._codec.fidelity:
                self._recompressing += 1
                layout = self.page_table.pool.layout
                job = RecompressJob(key, tier, block, self._codec, layout, self._clock, self._recompressed)
                self._worker.submit(job, urgent=False)
        if self._recompressing:
            return
        for at, tier in enumerate(self.tiers):
            if tier.over:
                self._evict(at, "shrunk", max_blocks)
        self._trim_after(0, at_once=not any(tier.over for tier in self.tiers))

    def _recompressed(self, job: RecompressJob) -> None:
        self._recompressing -= 1
        self.codec_seconds["encode"] += job.seconds
        tier = job.tier
        if tier.get(job.key, touch=False) is not job.block:
            return
        before = tier.used
        if job.recompressed is None:
            tier.drop(job.key)
            self.lost["corrupt"] += 1
        else:
            tier.put(job.key, job.recompressed)
        self._trim_after(before - tier.used, at_once=not self.converging)

    def check_integrity(self) -> None:
        """Raise AssertionError, with the record that differs, if tiers, loads and leases disagree."""
        for tier in self.tiers:
            tier.check_integrity()
        for lease, loads in self._waiting.items():
            pending = sum(len(load.places) for load in loads)
            assert lease.pending_pages == pending > 0, (
                f"a lease counts {lease.pending_pages} pending pages, its loads hold {pending}"
            )

    def wait(self, timeout_s: float) -> None:
        """Block until a job can land, none is pending, or the timeout."""
        self._worker.wait(timeout_s)

    def close(self) -> None:
        """End the worker."""
        self._worker.close()
