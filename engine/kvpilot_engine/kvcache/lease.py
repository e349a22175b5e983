"""The pages that one sequence holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from kvpilot_engine.contract import PAGE_TOKENS
from kvpilot_engine.kvcache.fidelity import Fidelity
from kvpilot_engine.kvcache.pages.prefix_index import PrefixHashes


@dataclass(eq=False, slots=True)
class Lease:
    """Pages of one sequence, from ``KVCache.lease`` until ``KVCache.release``.

    Attributes:
        hashes: of the sequence's whole pages.
        exact_only: uses exact pages only.
        usable: pages of the prompt that a hit may serve; at least one token is always computed.
        tokens: length of the prompt.
        counted: the lookup is in the counters. It is counted when the sequence starts to compute, because
            hits can grow until then; a preempted sequence was counted under its first lease.
        pages: ``pages[i]`` holds tokens [16 i, 16 i + 16). Read it again after ``refresh`` or ``poll``: both
            may replace pages that nothing was written to yet.
        hits: pages at the front that came from the cache.
        hits_by_tier: how many of ``hits`` a tier served, by its name; the device pool served the others.
        fidelity: exact, or the worst codec behind ``cached_tokens``; later pages inherit it.
        committed: pages at the front whose content is final.
        computing: the sequence writes behind its hits, which can no longer grow.
        pending_pages: pages that loads have reserved and the lease will hold when they land.
        requested_blocks: blocks whose load it has waited for; each is requested once.
    """

    hashes: PrefixHashes
    exact_only: bool
    usable: int
    tokens: int
    counted: bool
    pages: list[int] = field(default_factory=list)
    hits: int = 0
    hits_by_tier: Counter[str] = field(default_factory=Counter)
    fidelity: Fidelity = Fidelity.EXACT
    committed: int = 0
    computing: bool = False
    released: bool = False
    pending_pages: int = 0
    requested_blocks: set[bytes] = field(default_factory=set)

    @property
    def cached_tokens(self) -> int:
        """Tokens from the start that need not be computed; a multiple of 16."""
        return self.hits * PAGE_TOKENS

    @property
    def loading(self) -> bool:
        """True while blocks of a tier are being loaded; ``cached_tokens`` may grow until it turns False."""
        return self.pending_pages > 0
