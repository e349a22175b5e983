"""What became of the blocks that were fetched ahead."""

from __future__ import annotations


class FetchedBlock:
    """A prefetched block from its landing until its fate is known: used by a lease, or evicted unused."""

    __slots__ = ("settled",)

    def __init__(self) -> None:
        self.settled = False


class PrefetchMeter:
    """Counts prefetched blocks by fate; each block counts once, at the first thing that happens to it."""

    def __init__(self) -> None:
        self.used = 0
        self.wasted = 0

    def use(self, block: FetchedBlock) -> None:
        """A lease took a page of it."""
        if not block.settled:
            block.settled = True
            self.used += 1

    def waste(self, block: FetchedBlock) -> None:
        """A page of it left the pool before any lease took one."""
        if not block.settled:
            block.settled = True
            self.wasted += 1
