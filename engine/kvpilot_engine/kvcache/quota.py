"""How much of the budget each tier may hold."""

from __future__ import annotations

from dataclasses import dataclass

from kvpilot_engine.contract import PAGE_TOKENS, KVCacheConfig
from kvpilot_engine.kvcache.pool import PAGES_PER_BLOCK, KVLayout


@dataclass(frozen=True)
class Quota:
    """Pages of the hot pool, and bytes of the host tier."""

    pages: int
    host_bytes: int

    @classmethod
    def of(cls, config: KVCacheConfig, layout: KVLayout) -> Quota:
        """Apply ``max_memory_mb``: the host tier gives way first, then the pool, down to one block."""
        pages = config.max_tokens // PAGE_TOKENS
        host_bytes = config.host_memory_mb << 20
        if config.max_memory_mb is not None:
            budget = config.max_memory_mb << 20
            pages = max(PAGES_PER_BLOCK, min(pages, budget // layout.page_bytes))
            host_bytes = max(0, min(host_bytes, budget - pages * layout.page_bytes))
        return cls(pages, host_bytes)
