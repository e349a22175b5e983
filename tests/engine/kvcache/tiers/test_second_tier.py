"""The seam between the cache and its tiers: a second tier below the host tier, made of this file alone."""

from __future__ import annotations

import pytest

from kvpilot_engine.kvcache import Fidelity
from kvpilot_engine.kvcache.tiers.base import StoredBlock, Tier
from kvpilot_engine.kvcache.tiers.host import HostTier

PROMPT_TOKENS = 257
PROMPT_BLOCKS = 2


class ShelfTier(Tier):
    """Blocks in a dictionary, first in first out, that never recompresses."""

    name = "shelf"
    in_memory = False

    def __init__(self) -> None:
        self.budget = self.used = 0
        self.blocks: dict[bytes, StoredBlock] = {}

    @staticmethod
    def requested_bytes(config) -> int:
        return 8 << 20

    def __len__(self) -> int:
        return len(self.blocks)

    def get(self, key, *, touch=True):
        return self.blocks.get(key)

    def put(self, key, block) -> bool:
        if block.nbytes > self.budget:
            return False
        self.drop(key)
        self.blocks[key] = block
        self.used += block.nbytes
        return True

    def drop(self, key) -> None:
        if (block := self.blocks.pop(key, None)) is not None:
            self.used -= block.nbytes

    def shrink(self, max_blocks):
        evicted = []
        while self.over and len(evicted) < max_blocks:
            evicted.append((key := next(iter(self.blocks)), self.blocks[key]))
            self.drop(key)
        return evicted

    def less_compressed(self, than):
        return []

    def check_integrity(self) -> None:
        assert self.used == sum(block.nbytes for block in self.blocks.values())


@pytest.fixture
def shelf() -> ShelfTier:
    return ShelfTier()


def fill(h, prompts) -> None:
    for seed in prompts:
        h.serve(h.prompt(seed, PROMPT_TOKENS))
        h.flush()


def stored_once(h, shelf) -> bool:
    return not set(h.host._blocks) & set(shelf.blocks)


def test_blocks_that_the_host_tier_evicts_move_to_the_next_tier_and_load_exactly(make, shelf):
    h = make(max_tokens=256, host_memory_mb=1, tiers=[HostTier(), shelf])
    fill(h, range(60))
    assert 0 < len(h.host) < 60 * PROMPT_BLOCKS - len(shelf) < 60 * PROMPT_BLOCKS
    assert h.counter("blocks_lost_total", "evicted") == 0
    assert stored_once(h, shelf)
    assert h.serve(h.prompt(0, PROMPT_TOKENS)) == (256, Fidelity.EXACT)
    assert h.counter("tier_load_blocks_total", "shelf") == PROMPT_BLOCKS
    assert h.counter("tier_load_blocks_total", "host") == 0
    assert h.counter("prefix_hit_tokens_total", "shelf") == 256
    assert h.counter("prefix_hit_tokens_total", "host") == 0
    gauges = h.cache.gauges()
    assert gauges["kvpilot_cached_pages"]["shelf"] == 8 * len(shelf)
    assert gauges["kvpilot_cache_bytes"]["shelf"] == shelf.used
    assert gauges["kvpilot_cache_budget_bytes"]["shelf"] == 8 << 20


def test_one_prompt_is_served_by_both_tiers(make, shelf):
    h = make(max_tokens=256, host_memory_mb=4, tiers=[HostTier(), shelf])
    tokens = h.prompt(0, PROMPT_TOKENS)
    fill(h, range(4))
    hashes = h.cache.hashes()
    hashes.extend(tokens, 16)
    first, second = hashes.pages[7::8]
    block = h.host.get(first)
    h.host.drop(first)
    assert shelf.put(first, block)
    lease = h.loaded(h.lease(tokens))
    assert lease.hits_by_tier == {"shelf": 8, "host": 8}
    assert h.error(lease, tokens) == 0.0
    h.cache.release(lease)
    assert h.host.get(second) is not None


def test_without_a_budget_for_the_host_tier_blocks_go_to_the_next_one(make, shelf):
    h = make(max_tokens=256, host_memory_mb=0, tiers=[HostTier(), shelf])
    fill(h, range(4))
    assert len(h.host) == 0
    assert h.serve(h.prompt(0, PROMPT_TOKENS)) == (256, Fidelity.EXACT)
    assert h.counter("prefix_hit_tokens_total", "shelf") == 256


def test_a_lowered_host_budget_moves_its_blocks_and_loses_none(make, shelf):
    h = make(max_tokens=256, host_memory_mb=8, tiers=[HostTier(), shelf])
    fill(h, range(30))
    blocks = len(h.host)
    h.apply(host_memory_mb=0)
    h.until(lambda: not h.cache.converging)
    assert (len(h.host), len(shelf)) == (0, blocks)
    assert h.counter("blocks_lost_total", "shrunk") == 0


def test_the_last_tier_loses_what_exceeds_its_budget(make, shelf):
    h = make(max_tokens=256, host_memory_mb=1, tiers=[HostTier(), shelf])
    fill(h, range(300))
    assert shelf.used <= shelf.budget
    assert (
        h.counter("blocks_lost_total", "evicted")
        == 300 * PROMPT_BLOCKS - len(h.host) - len(shelf) - len(h.cache._page_table.index.entries) // 8
    )


def test_a_memory_budget_bounds_only_tiers_in_memory(make, shelf):
    h = make(max_tokens=256, host_memory_mb=500, max_memory_mb=100, tiers=[HostTier(), shelf])
    assert shelf.budget == 8 << 20
    assert h.host.budget == (100 << 20) - 16 * h.layout.page_bytes


def test_a_prefetch_from_a_tier_counts_for_that_tier(make, shelf):
    h = make(max_tokens=2048, host_memory_mb=0, enable_prefetch=True, tiers=[HostTier(), shelf])
    fill(h, range(12))
    tokens = h.prompt(0, PROMPT_TOKENS)
    h.prefetch(tokens)
    h.until(lambda: h.counter("tier_load_blocks_total", "shelf") == PROMPT_BLOCKS)
    lease = h.lease(tokens)
    assert (lease.hits, lease.hits_by_tier) == (16, {"shelf": 16})
    h.cache.release(lease)
