"""The jobs of the loader: decode a block into pages of the pool, encode one that leaves it, tighten one."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from kvpilot_engine.kvcache.codecs import Codec, Encoded, decode
from kvpilot_engine.kvcache.fidelity import Fidelity
from kvpilot_engine.kvcache.host_tier import HostBlock
from kvpilot_engine.kvcache.lease import Lease
from kvpilot_engine.kvcache.loader import Job
from kvpilot_engine.kvcache.pool import PAGES_PER_BLOCK, KVLayout, PagePool


@dataclass(frozen=True)
class Place:
    """Where one page of a loaded block goes: its place in the chain, its hashes and its page of the pool."""

    position: int
    key: bytes
    parent: bytes
    page: int


@dataclass(eq=False)
class LoadJob(Job):
    """Bring the missing pages of one block back. The pages are private to the job until it lands.

    Attributes:
        key: hash of the last page of the block.
        ahead: started by a prefetch, and no lease has asked for it yet.
        waiters: leases that wait for it.
        seconds: time it took on the loader's thread.
    """

    key: bytes
    block: HostBlock
    places: list[Place]
    pool: PagePool
    clock: Callable[[], float]
    landed: Callable[[LoadJob], None]
    ahead: bool = False
    waiters: list[Lease] = field(default_factory=list)
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
        self.landed(self)


@dataclass(eq=False)
class EncodeJob(Job):
    """Encode the copy of a block whose pages are leaving the pool.

    Attributes:
        source: the copy, in ``layout.block_shape``; its buffer goes back to ``buffers`` at once.
        ancestry: the worst fidelity of its pages.
    """

    key: bytes
    source: torch.Tensor
    buffers: SnapshotBuffers
    codec: Codec
    ancestry: Fidelity
    clock: Callable[[], float]
    landed: Callable[[EncodeJob], None]
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
        self.landed(self)


@dataclass(eq=False)
class TightenJob(Job):
    """Encode a block of the host tier anew by a tighter codec; ``tightened`` is the result."""

    key: bytes
    block: HostBlock
    codec: Codec
    layout: KVLayout
    clock: Callable[[], float]
    landed: Callable[[TightenJob], None]
    tightened: HostBlock | None = None
    seconds: float = 0.0

    def run(self) -> None:
        """See Job."""
        start = self.clock()
        encoded = self.codec.encode(decode(self.block.encoded, self.layout))
        self.tightened = HostBlock(encoded, max(self.block.fidelity, encoded.fidelity))
        self.seconds = self.clock() - start

    def land(self) -> None:
        """See Job."""
        self.landed(self)


class TrimJob(Job):
    """Return freed heap memory to the system, after the host tier has become smaller."""

    def run(self) -> None:
        """See Job. Does nothing where the C library has no malloc_trim."""
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

    def land(self) -> None:
        """See Job."""


class SnapshotBuffers:
    """Reusable buffers for blocks on their way to the encoder; their number bounds its queue.

    The stepping thread takes them, the loader gives them back; appending to a list is atomic. An encoding has
    read all of its source when it returns, on a device too, since its result is in host memory.
    """

    _MOST_BLOCKS = 32
    _MOST_BYTES = 32 << 20

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._most = max(2, min(self._MOST_BLOCKS, self._MOST_BYTES // pool.layout.block_bytes))
        self._made = 0
        self._free: list[torch.Tensor] = []

    def copy(self, pages: list[int]) -> torch.Tensor | None:
        """A copy of 8 pages in ``block_shape``, or None: all buffers are on their way."""
        buffer = self._buffer()
        if buffer is None:
            return None
        layout = self._pool.layout
        index = torch.tensor(pages, device=layout.device)
        for slab, part in zip(self._pool.paged, buffer, strict=True):
            torch.index_select(slab, 1, index, out=part.view(layout.layers, PAGES_PER_BLOCK, -1))
        return buffer

    @property
    def left(self) -> bool:
        """True when another copy can be made now."""
        return bool(self._free) or self._made < self._most

    def give_back(self, buffer: torch.Tensor) -> None:
        """The encoder is done with it."""
        self._free.append(buffer)

    def _buffer(self) -> torch.Tensor | None:
        if self._free:
            return self._free.pop()
        if self._made == self._most:
            return None
        self._made += 1
        layout = self._pool.layout
        with torch.inference_mode(False):
            return torch.empty(layout.block_shape, dtype=layout.dtype, device=layout.device)
