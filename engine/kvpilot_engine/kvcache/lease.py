"""One sequence's hold on the cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvpilot_engine.contract import PAGE_TOKENS
from kvpilot_engine.kvcache.fidelity import Fidelity

if TYPE_CHECKING:
    from kvpilot_engine.kvcache.jobs import LoadJob


@dataclass(eq=False, slots=True)
class Lease:
    """Pages of one sequence, from ``KVCache.lease`` until ``KVCache.release``.

    Attributes:
        root: start of its hash chain.
        exact_only: takes exact pages only.
        usable: pages of the prompt that a hit may serve; at least one token is always computed.
        tokens: length of the prompt.
        counted: the lookup was counted: when it computes first, as hits can grow until then; or, when a
            preempted sequence resumes, by an earlier lease.
        pages: page table; ``pages[i]`` covers tokens ``[16 i, 16 i + 16)``. Read it anew after a ``relook``
            or a ``poll``: either may replace pages that nothing was written to yet.
        hits: pages at the front that came from the cache. host_hits: those that a slower tier had.
        fidelity: exact, or the worst codec behind ``cached_tokens``; later pages inherit it.
        hashes: of its whole pages, as far as they are known.
        committed: pages at the front whose content is final.
        computing: the sequence has begun to write behind its hits, which can grow no more.
        waiting: loads that it waits for. tried: blocks it has waited for, each once.
    """

    root: bytes
    exact_only: bool
    usable: int
    tokens: int
    counted: bool
    pages: list[int] = field(default_factory=list)
    hits: int = 0
    host_hits: int = 0
    fidelity: Fidelity = Fidelity.EXACT
    hashes: list[bytes] = field(default_factory=list)
    committed: int = 0
    computing: bool = False
    released: bool = False
    waiting: list[LoadJob] = field(default_factory=list)
    tried: set[bytes] = field(default_factory=set)

    @property
    def cached_tokens(self) -> int:
        """Tokens from the start that need not be computed; a multiple of 16."""
        return self.hits * PAGE_TOKENS

    @property
    def coming(self) -> int:
        """Pages that its loads have taken already and that it will hold when they land."""
        return sum(len(load.places) for load in self.waiting)

    @property
    def loading(self) -> bool:
        """Blocks of a slower tier are on their way; ``cached_tokens`` may grow until this turns False."""
        return bool(self.waiting)
