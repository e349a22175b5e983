"""Blocks on their way between the hot pool and the host tier.

Down: a complete block whose first page is evicted is copied at once and encoded by the loader; under a
lowered budget, stored blocks are encoded anew by a tighter codec before any is dropped. Up: the blocks that
continue a lease's prefix are decoded into private pages and published when they land, for whoever waits.
Nothing here ever fails a request: a block that cannot be had is a miss, and counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from kvpilot_engine.contract import KVCacheConfig, codec_rung
from kvpilot_engine.kvcache.codecs import Codec, codec_named
from kvpilot_engine.kvcache.host_tier import HostBlock, HostTier
from kvpilot_engine.kvcache.hot_tier import HotTier
from kvpilot_engine.kvcache.jobs import EncodeJob, LoadJob, Place, SnapshotBuffers, TightenJob, TrimJob
from kvpilot_engine.kvcache.lease import Lease
from kvpilot_engine.kvcache.loader import Loader
from kvpilot_engine.kvcache.pool import PAGES_PER_BLOCK
from kvpilot_engine.kvcache.prefetch import FetchedBlock
from kvpilot_engine.kvcache.prefix_index import Entry

LOST_REASONS = ("busy", "incomplete", "evicted", "shrunk", "corrupt", "failed")
"""Why a block is gone: the encoder was behind; a page of it had left before; the host tier was full; its
budget was lowered; its checksum did not match; encoding it raised."""

_TRIM_BYTES = 16 << 20
"""Evicted bytes after which the heap is asked to return memory: a block of a tighter codec leaves a hole
where a looser one was, and a heap full of holes would undo what a lowered budget frees."""

_TIGHTEN_AT_ONCE = 4
"""Blocks on their way to a tighter codec: enough to keep the loader busy between two polls, no more than a
lowered budget needs."""

_PREFETCH_SHARE = 4  # unused prefetched pages may fill a quarter of the pool


class TierTraffic:
    """Moves blocks between ``hot`` and its host tier."""

    def __init__(
        self, hot: HotTier, host_bytes: int, config: KVCacheConfig, clock: Callable[[], float]
    ) -> None:
        self._clock = clock
        self.hot = hot
        self.host = HostTier(host_bytes)
        self.lost = dict.fromkeys(LOST_REASONS, 0)
        self.codec_seconds = {"encode": 0.0, "decode": 0.0}
        self.loaded_blocks = 0
        self._served = 0  # leases whose load has landed
        self._loader = Loader(hot.pool.layout.device)
        self._buffers = SnapshotBuffers(hot.pool)
        self._encoding: set[bytes] = set()
        self._loads: dict[bytes, LoadJob] = {}
        self._ahead_pages = 0
        self._looser: deque[bytes] = deque()  # may be tightened on the way to a lowered budget
        self._tightening = 0
        self._untrimmed = 0
        self.configure(config, host_bytes)

    def configure(self, config: KVCacheConfig, host_bytes: int) -> None:
        """Take new settings. The codec applies to blocks that leave the pool from now on, and under a lowered
        budget to those that are stored.
        """
        rung = codec_rung(config.use_compression, config.compression_ratio)
        self._codec: Codec = codec_named(rung.codec)
        self._ahead = config.prefetch_size if config.enable_prefetch else 0
        self.host.budget = host_bytes
        self._looser = deque(self.host.looser(self._codec.fidelity) if host_bytes and self.host.over else ())

    @property
    def prefetches(self) -> bool:
        """True when a prefetch could find anything to do."""
        return bool(self._ahead and len(self.host))

    @property
    def has_room(self) -> bool:
        """True when a page can be evicted now without losing its block to a busy encoder."""
        return not self.host.budget or self._buffers.left

    @property
    def loading_pages(self) -> list[list[int]]:
        """The private pages of each load under way."""
        return [[place.page for place in load.places] for load in self._loads.values()]

    def leaving(self, entry: Entry) -> None:
        """Send the block that ``entry`` ends to the encoder, unless the host tier has one as good."""
        if not self.host.budget or entry.position % PAGES_PER_BLOCK != PAGES_PER_BLOCK - 1:
            return
        stored = self.host.get(entry.hash)
        best = max(entry.fidelity, self._codec.fidelity)
        if entry.hash in self._encoding or (stored is not None and stored.fidelity <= best):
            return
        block = self.hot.block_of(entry)
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
        self._loader.submit(
            EncodeJob(entry.hash, source, self._buffers, self._codec, ancestry, self._clock, self._encoded),
            urgent=False,
        )

    def _encoded(self, job: EncodeJob) -> None:
        self._encoding.discard(job.key)
        self.codec_seconds["encode"] += job.seconds
        if job.encoded is None:
            self.lost["failed"] += 1
            return
        shrinking = self.host.over
        kept = self.host.put(job.key, HostBlock(job.encoded, max(job.ancestry, job.encoded.fidelity)))
        self.lost["evicted"] += not kept
        if kept and not shrinking:
            full = self.host.used
            self.lost["evicted"] += self.host.shrink(most=PAGES_PER_BLOCK)
            self._trim_after(full - self.host.used)

    def _trim_after(self, freed: int, *, at_once: bool = False) -> None:
        self._untrimmed += freed
        if self._untrimmed >= _TRIM_BYTES or (at_once and self._untrimmed):
            self._untrimmed = 0
            self._loader.submit(TrimJob(), urgent=False)

    def advance(self, lease: Lease) -> None:
        """Have the next blocks of the lease's prompt loaded: one at a time, or as many as are prefetched."""
        if not len(self.host) and not self._loads:
            return
        most, at = max(1, self._ahead), lease.hits
        while at < lease.usable and len(lease.waiting) < most:
            at = (at // PAGES_PER_BLOCK + 1) * PAGES_PER_BLOCK
            if at > len(lease.hashes):
                return
            key = lease.hashes[at - 1]
            load = self._loads.get(key)
            if load is not None and load in lease.waiting:
                continue
            if key in lease.tried:
                return
            if load is None:
                load = self._start(lease.hashes, lease.root, at, lease.usable, lease.exact_only)
            if load is None or (lease.exact_only and load.block.fidelity):
                return
            lease.tried.add(key)
            lease.waiting.append(load)
            load.waiters.append(lease)
            if load.ahead:
                load.ahead = False
                self._ahead_pages -= len(load.places)
                self.hot.meter.used += 1

    def prefetch(self, hashes: Sequence[bytes], root: bytes, usable: int, exact_only: bool) -> None:
        """Start on the first blocks behind the cached prefix, for a request that is still queued."""
        entries, at = self.hot.index.entries, 0
        while at < usable and (entry := entries.get(hashes[at])) and not (exact_only and entry.fidelity):
            at += 1
        cached = at
        for _ in range(self._ahead):
            at = (at // PAGES_PER_BLOCK + 1) * PAGES_PER_BLOCK
            if at > len(hashes) or at - PAGES_PER_BLOCK >= usable:
                return
            if hashes[at - 1] in self._loads:
                continue
            unused = self.hot.prefetched_pages + self._ahead_pages + PAGES_PER_BLOCK
            if unused * _PREFETCH_SHARE > self.hot.pool.limit or self.host.get(hashes[at - 1]) is None:
                return
            # Making room must not evict the very prefix that the block continues.
            self.hot.touch(hashes[:cached])
            cached = 0
            load = self._start(hashes, root, at, usable, exact_only)
            if load is None:
                return
            load.ahead = True
            self._ahead_pages += len(load.places)

    def _start(
        self, hashes: Sequence[bytes], root: bytes, end: int, usable: int, exact_only: bool
    ) -> LoadJob | None:
        """Load what is missing of the block of pages ``end - 8`` to ``end``; None when that cannot be."""
        block = self.host.get(hashes[end - 1])
        if block is None or (exact_only and block.fidelity):
            return None
        entries = self.hot.index.entries
        missing = [
            at
            for at in range(end - PAGES_PER_BLOCK, min(end, usable))
            if (entry := entries.get(hashes[at])) is None or (exact_only and entry.fidelity)
        ]
        if not missing or not self.hot.make_room(len(missing)):
            return None
        places = [
            Place(at, hashes[at], hashes[at - 1] if at else root, self.hot.pool.take()) for at in missing
        ]
        load = LoadJob(hashes[end - 1], block, places, self.hot.pool, self._clock, self._loaded)
        self._loads[load.key] = load
        self._loader.submit(load, urgent=True)
        return load

    def _loaded(self, load: LoadJob) -> None:
        del self._loads[load.key]
        self.codec_seconds["decode"] += load.seconds
        if load.ahead:
            self._ahead_pages -= len(load.places)
        entries = [] if load.error else self._publish(load)
        if load.error:
            self.host.drop(load.key)
            self.lost["corrupt"] += 1
            for place in load.places:
                self.hot.drop_private(place.page)
        for lease in load.waiters:
            lease.waiting.remove(load)
            before = lease.hits
            self.hot.pin(lease)
            lease.host_hits += lease.hits - before
            self._served += 1
            self.advance(lease)
        refs = self.hot.pool.refs
        for place, entry in zip(reversed(load.places), reversed(entries), strict=False):
            refs[place.page] -= 1
            if not refs[place.page]:
                self.hot.let_go(entry, place.page)

    def _publish(self, load: LoadJob) -> list[Entry]:
        self.loaded_blocks += 1
        fetched = FetchedBlock()
        entries = []
        for place in load.places:
            entry = self.hot.publish(place.key, place.parent, place.position, place.page, load.block.fidelity)
            if load.ahead and entry.page == place.page:
                self.hot.mark_fetched(entry, fetched)
            entries.append(entry)
        if load.ahead and not any(entry.fetched is fetched for entry in entries):
            self.hot.meter.waste(fetched)
        return entries

    def forget(self, lease: Lease) -> None:
        """A lease waits no longer; what it waited for still lands in the pool."""
        for load in lease.waiting:
            load.waiters.remove(lease)
        lease.waiting.clear()

    def land(self) -> bool:
        """Land finished jobs; True if a lease waits for less than before."""
        before = self._served
        self._loader.land()
        return self._served > before

    def shrink(self, most: int) -> None:
        """One bounded step towards a lowered budget: tighten what a looser codec has stored, then drop."""
        if not self.host.over:
            return
        while self._looser and self._tightening < _TIGHTEN_AT_ONCE:
            key = self._looser.popleft()
            if (block := self.host.peek(key)) is not None and block.encoded.fidelity < self._codec.fidelity:
                self._tightening += 1
                layout = self.hot.pool.layout
                job = TightenJob(key, block, self._codec, layout, self._clock, self._tightened)
                self._loader.submit(job, urgent=False)
        if self._tightening:
            return
        full = self.host.used
        self.lost["shrunk"] += self.host.shrink(most)
        self._trim_after(full - self.host.used, at_once=not self.host.over)

    def _tightened(self, job: TightenJob) -> None:
        self._tightening -= 1
        self.codec_seconds["encode"] += job.seconds
        if self.host.peek(job.key) is not job.block:
            return
        full = self.host.used
        if job.tightened is None:
            self.host.drop(job.key)
            self.lost["corrupt"] += 1
        else:
            self.host.replace(job.key, job.tightened)
        self._trim_after(full - self.host.used, at_once=not self.host.over)

    def wait(self, timeout_s: float) -> None:
        """Block until something can land, or the time is up."""
        self._loader.wait(timeout_s)

    def close(self) -> None:
        """End the loader."""
        self._loader.close()
