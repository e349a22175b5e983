"""The worker's jobs: decode a block into pages, encode an evicted one, recompress a stored one."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvpilot_engine.kvcache.fidelity import Fidelity
from kvpilot_engine.kvcache.pages.pool import PAGES_PER_BLOCK, KVLayout, PagePool
from kvpilot_engine.kvcache.tiers.base import StoredBlock, Tier
from kvpilot_engine.kvcache.tiers.codecs import Codec, Encoded, decode
from kvpilot_engine.kvcache.tiers.worker import Job


@dataclass(frozen=True)
class Place:
    """Destination of one page of a loaded block.

    Attributes:
        position: index of the page in its sequence.
        key, parent: its hash and that of the page before it.
        page: number of the page in the pool.
    """

    position: int
    key: bytes
    parent: bytes
    page: int


@dataclass(eq=False)
class LoadJob(Job):
    """Decode the missing pages of one block into pages that are private to the job until it lands.

    Attributes:
        key: hash of the last page of the block.
        tier: where the block is stored.
        ahead: started by a prefetch, and no lease waits for it yet.
        seconds: time on the worker's thread.
    """

    key: bytes
    tier: Tier
    block: StoredBlock
    places: list[Place]
    pool: PagePool
    clock: Callable[[], float]
    on_landed: Callable[[LoadJob], None]
    ahead: bool = False
    seconds: float = 0.0

    def run(self) -> None:
        """See Job."""
        start = self.clock()
        layout = self.pool.layout
        values = decode(self.block.encoded, layout)
        values = values.view(2, layout.layers, PAGES_PER_BLOCK, -1)
        offsets = [place.position % PAGES_PER_BLOCK for place in self.places]
        if len(offsets) < PAGES_PER_BLOCK:
            values = values.index_select(2, torch.tensor(offsets, device=layout.device))
        pages = torch.tensor([place.page for place in self.places], device=layout.device)
        for slab, part in zip(self.pool.paged, values, strict=True):
            slab.index_copy_(1, pages, part)
        self.seconds = self.clock() - start

    def land(self) -> None:
        """See Job."""
        self.on_landed(self)


@dataclass(eq=False)
class EncodeJob(Job):
    """Encode the copy of a block whose pages are being evicted.

    Attributes:
        source: the copy, in ``layout.block_shape``; its buffer returns to ``buffers`` after the encoding.
        ancestry: the worst fidelity of its pages.
    """

    key: bytes
    source: torch.Tensor
    buffers: SnapshotBuffers
    codec: Codec
    ancestry: Fidelity
    clock: Callable[[], float]
    on_landed: Callable[[EncodeJob], None]
    encoded: Encoded | None = None
    seconds: float = 0.0

    def run(self) -> None:
        """See Job."""
        start = self.clock()
        try:
            self.encoded = self.codec.encode(self.source)
        finally:
            self.buffers.give_back(self.source)
        self.seconds = self.clock() - start

    def land(self) -> None:
        """See Job."""
        self.on_landed(self)


@dataclass(eq=False)
class RecompressJob(Job):
    """Encode a stored block at a higher compression level.

    Attributes:
        recompressed: the result; None if the block could not be decoded.
    """

    key: bytes
    tier: Tier
    block: StoredBlock
    codec: Codec
    layout: KVLayout
    clock: Callable[[], float]
    on_landed: Callable[[RecompressJob], None]
    recompressed: StoredBlock | None = None
    seconds: float = 0.0

    def run(self) -> None:
        """See Job."""
        start = self.clock()
        encoded = self.codec.encode(decode(self.block.encoded, self.layout))
        self.recompressed = StoredBlock(encoded, max(self.block.fidelity, encoded.fidelity))
        self.seconds = self.clock() - start

    def land(self) -> None:
        """See Job."""
        self.on_landed(self)


class TrimJob(Job):
    """Return freed heap memory to the system."""

    def run(self) -> None:
        """See Job. Does nothing where the C library has no malloc_trim."""
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

    def land(self) -> None:
        """See Job."""


class SnapshotBuffers:
    """Reusable buffers for copies of evicted blocks; their number bounds the queue of the encoder.

    The stepping thread takes them, the worker returns them; appending to a list is atomic. An encoding has
    read all of its source when it returns, on a device too, because its result is in host memory.
    """

    _MAX_BLOCKS = 32
    _MAX_BYTES = 32 << 20

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._max_buffers = max(2, min(self._MAX_BLOCKS, self._MAX_BYTES // pool.layout.block_bytes))
        self._made = 0
        self._free: list[torch.Tensor] = []

    def copy(self, pages: list[int]) -> torch.Tensor | None:
        """Copy 8 pages into a buffer of ``block_shape``; None if all buffers are in use."""
        buffer = self._buffer()
        if buffer is None:
            return None
        layout = self._pool.layout
        index = torch.tensor(pages, device=layout.device)
        for slab, part in zip(self._pool.paged, buffer, strict=True):
            torch.index_select(slab, 1, index, out=part.view(layout.layers, PAGES_PER_BLOCK, -1))
        return buffer

    @property
    def available(self) -> bool:
        """True if another copy can be made now."""
        return bool(self._free) or self._made < self._max_buffers

    def give_back(self, buffer: torch.Tensor) -> None:
        """Return a buffer after its encoding."""
        self._free.append(buffer)

    def _buffer(self) -> torch.Tensor | None:
        if self._free:
            return self._free.pop()
        if self._made == self._max_buffers:
            return None
        self._made += 1
        layout = self._pool.layout
        with torch.inference_mode(False):
            return torch.empty(layout.block_shape, dtype=layout.dtype, device=layout.device)
