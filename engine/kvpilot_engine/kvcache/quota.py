"""How much the device pool and each tier may hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvpilot_engine.contract import PAGE_TOKENS, KVCacheConfig
from kvpilot_engine.kvcache.pages.pool import PAGES_PER_BLOCK, KVLayout
from kvpilot_engine.kvcache.tiers.base import Tier


@dataclass(frozen=True)
class Quota:
    """Pages of the device pool, and bytes of each tier by its name."""

    pages: int
    tier_bytes: dict[str, int]

    @classmethod
    def of(cls, config: KVCacheConfig, layout: KVLayout, tiers: Sequence[Tier]) -> Quota:
        """Apply ``max_memory_mb``: the slowest tier in memory yields first, the pool last, down to one block.

        Args:
            tiers: fastest first.
        """
        pages = config.max_tokens // PAGE_TOKENS
        tier_bytes = {tier.name: tier.requested_bytes(config) for tier in tiers}
        if config.max_memory_mb is not None:
            budget = config.max_memory_mb << 20
            pages = max(PAGES_PER_BLOCK, min(pages, budget // layout.page_bytes))
            free = max(0, budget - pages * layout.page_bytes)
            for tier in tiers:
                if tier.in_memory:
                    tier_bytes[tier.name] = min(tier_bytes[tier.name], free)
                    free -= tier_bytes[tier.name]
        return cls(pages, tier_bytes)
