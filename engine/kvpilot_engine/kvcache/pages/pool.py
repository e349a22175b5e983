"""The device pool: one slab of pages, their reference counts and the free lists.

The slab is reserved once. On a CPU its memory is committed lazily: a page takes memory at its first write,
and returns it when the quota is lowered. On CUDA the whole slab is allocated.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from itertools import pairwise

import torch

from kvpilot_engine.contract import BLOCK_TOKENS, PAGE_TOKENS, knob

PAGES_PER_BLOCK = BLOCK_TOKENS // PAGE_TOKENS


@dataclass(frozen=True)
class KVLayout:
    """Shape of the K and V of one model, with the device that holds them."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def width(self) -> int:
        """Elements of K (or V) per token and layer."""
        return self.kv_heads * self.head_dim

    @property
    def page_bytes(self) -> int:
        """Size of one page, bytes: K and V of 16 tokens in all layers."""
        return 2 * self.layers * PAGE_TOKENS * self.width * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Size of one block of 8 pages, bytes."""
        return PAGES_PER_BLOCK * self.page_bytes

    @property
    def block_shape(self) -> tuple[int, int, int, int]:
        """K and V of one block: [2, layers, 128 tokens, kv_heads * head_dim]."""
        return (2, self.layers, BLOCK_TOKENS, self.width)


def reserved_pages(layout: KVLayout, max_tokens: int) -> int:
    """Pages to reserve, up to which the quota can grow without a restart.

    A CPU reserves for the catalogue's largest quota, because memory that is not committed costs nothing; a
    device reserves twice the quota that it starts with.
    """
    if layout.device.type == "cpu":
        ceiling = max(max_tokens, int(knob("max_tokens").maximum or 0))
    else:
        ceiling = 2 * max_tokens
    return ceiling // PAGE_TOKENS


class PagePool:
    """Slab, reference counts and free lists, independent of hashes and policies.

    ``used`` counts every page that is not free. ``limit`` is the quota, at most ``reserved``; it may be below
    ``used`` while a lowered quota converges.
    """

    def __init__(self, layout: KVLayout, reserved: int, limit: int) -> None:
        self.layout = layout
        self.reserved = reserved
        self.limit = limit
        self.used = 0
        self.refs = [0] * reserved
        self._fresh = 0  # pages at and above this index were never handed out
        self._warm: list[int] = []  # free, their memory is committed
        self._cold: list[int] = []  # free, their memory was returned
        self._maps: list[mmap.mmap] = []
        self.k = self._slab()
        self.v = self._slab()
        shape = (layout.layers, reserved, PAGE_TOKENS * layout.width)
        self.paged = (self.k.view(shape), self.v.view(shape))  # the same memory, by page

    def _slab(self) -> torch.Tensor:
        layout = self.layout
        shape = (layout.layers, self.reserved * PAGE_TOKENS, layout.kv_heads, layout.head_dim)
        with torch.inference_mode(False):
            if layout.device.type != "cpu":
                # Zeros: a NaN in a masked slot would make a weighted sum NaN.
                return torch.zeros(shape, dtype=layout.dtype, device=layout.device)
            size = self.reserved * self.layout.page_bytes // 2
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
            memory = mmap.mmap(-1, size, flags=flags)
            self._maps.append(memory)
            return torch.frombuffer(memory, dtype=layout.dtype).view(shape)

    def take(self) -> int:
        """Take a free page with one reference. The caller ensures that ``used`` is below ``reserved``."""
        if self._warm:
            page = self._warm.pop()
        elif self._cold:
            page = self._cold.pop()
        else:
            page = self._fresh
            self._fresh += 1
        self.used += 1
        self.refs[page] = 1
        return page

    def free(self, page: int) -> None:
        """Put a page without references on the free list."""
        self.used -= 1
        self._warm.append(page)

    def free_pages(self) -> list[int]:
        """All free pages, for the integrity check."""
        return [*self._warm, *self._cold, *range(self._fresh, self.reserved)]

    @property
    def free_slab_bytes(self) -> int:
        """Committed bytes of free pages; 0 on a device, whose slab is not host memory."""
        return len(self._warm) * self.layout.page_bytes if self._maps else 0

    @property
    def excess(self) -> int:
        """Free pages with committed memory that exceed the quota."""
        return min(len(self._warm), max(0, self.used + len(self._warm) - self.limit))

    def trim(self, max_pages: int) -> int:
        """Return the memory of up to ``max_pages`` excess pages to the system; return their number.

        This needs a page of one layer to be a whole number of memory pages; otherwise pages stay committed,
        and ``free_slab_bytes`` counts them.
        """
        span = self.layout.page_bytes // (2 * self.layout.layers)
        count = min(max_pages, self.excess)
        if not self._maps or span % mmap.PAGESIZE or not count:
            return 0
        pages = sorted(self._warm[-count:])
        del self._warm[-count:]
        self._cold.extend(pages)
        cuts = [0, *(i for i, (a, b) in enumerate(pairwise(pages), 1) if b != a + 1), len(pages)]
        stride = self.reserved * span
        for start, end in pairwise(cuts):
            length = (end - start) * span
            for memory in self._maps:
                for layer in range(self.layout.layers):
                    memory.madvise(mmap.MADV_DONTNEED, layer * stride + pages[start] * span, length)
        return count
