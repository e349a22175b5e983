"""Whether prefetched blocks were used."""

from __future__ import annotations


class PrefetchedBlock:
    """A prefetched block in the pool, until a lease uses it or its first page is evicted.

    Attributes:
        tier: name of the tier that it came from.
        resolved: it was counted as used or wasted.
    """

    __slots__ = ("resolved", "tier")

    def __init__(self, tier: str) -> None:
        self.tier = tier
        self.resolved = False


class PrefetchMeter:
    """Counts prefetched blocks as used or wasted; each block once, at its first event."""

    def __init__(self) -> None:
        self.used = 0
        self.wasted = 0

    def use(self, block: PrefetchedBlock) -> None:
        """A lease uses a page of the block."""
        if not block.resolved:
            block.resolved = True
            self.used += 1

    def waste(self, block: PrefetchedBlock) -> None:
        """A page of the block was evicted before any lease used one."""
        if not block.resolved:
            block.resolved = True
            self.wasted += 1
