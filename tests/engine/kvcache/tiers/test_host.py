"""Blocks that leave the pool for the host tier, and come back."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch

from kvpilot_engine.kvcache import Fidelity
from kvpilot_engine.kvcache.tiers.base import StoredBlock
from kvpilot_engine.kvcache.tiers.host import HostTier

BLOCK = 128


def spill(h, seeds, tokens: int = 257) -> None:
    """Serve prompts until the earlier ones have left the pool, every encoding landed."""
    for seed in seeds:
        h.serve(h.prompt(seed, tokens))
        h.flush()


def damage(host, key: bytes) -> None:
    """Turn a bit of a stored block over."""
    block = host.get(key, touch=False)
    payload = block.encoded.payload.clone()
    payload[5] ^= 1
    host.put(key, StoredBlock(dataclasses.replace(block.encoded, payload=payload), block.fidelity))


def test_a_raw_block_comes_back_with_the_bytes_written(make):
    h = make(max_tokens=512, host_memory_mb=8)
    spill(h, range(4))
    lease = h.lease(h.prompt(0, 257))
    assert lease.loading
    assert lease.cached_tokens == 0
    h.loaded(lease)
    assert lease.cached_tokens == 256
    assert lease.fidelity is Fidelity.EXACT
    assert h.error(lease, h.prompt(0, 257)) == 0.0
    h.compute(lease, h.prompt(0, 257))
    assert h.counter("prefix_hit_tokens_total", "host") == 256
    assert h.counter("tier_load_blocks_total", "host") == 2
    h.cache.release(lease)


def test_a_block_is_loaded_around_the_pages_that_are_still_there(make):
    h = make(max_tokens=256, host_memory_mb=8)
    tokens = h.prompt(0, 129)
    h.serve(tokens)
    h.serve(h.prompt(1, 200))  # evicts five pages of the block
    h.flush()
    lease = h.loaded(h.lease(tokens))
    assert lease.cached_tokens == 128
    assert h.error(lease, tokens) == 0.0
    h.compute(lease, tokens)
    assert h.counter("prefix_hit_tokens_total", "pool") == 48
    assert h.counter("prefix_hit_tokens_total", "host") == 80
    h.cache.release(lease)


@pytest.mark.parametrize("strategy", ["lru", "lfu", "fifo"])
def test_each_policy_spills_whole_blocks(make, strategy):
    h = make(max_tokens=512, host_memory_mb=8, cache_strategy=strategy)
    spill(h, range(6))
    assert h.counter("blocks_lost_total", "incomplete") == 0
    assert h.serve(h.prompt(0, 257)) == (256, Fidelity.EXACT)


@pytest.mark.parametrize(
    ("ratio", "fidelity", "most"),
    [(1.0, Fidelity.EXACT, 0), (0.52, Fidelity.INT8, 0.05), (0.3, Fidelity.INT4, 0.5)],
)
def test_compression_ratio_selects_the_codec_and_a_hit_reports_its_fidelity(make, ratio, fidelity, most):
    h = make(max_tokens=512, host_memory_mb=8, use_compression=True, compression_ratio=ratio)
    spill(h, range(4))
    tokens = h.prompt(0, 257)
    lease = h.loaded(h.lease(tokens))
    assert lease.fidelity is fidelity
    assert (h.error(lease, tokens) > 0) == (fidelity is not Fidelity.EXACT)
    assert h.error(lease, tokens) <= most
    h.cache.release(lease)


def test_a_new_codec_applies_to_new_blocks_and_old_ones_keep_theirs(make):
    h = make(max_tokens=512, host_memory_mb=8)
    spill(h, range(3))
    kept, lost = h.apply(use_compression=True, compression_ratio=0.3)
    assert lost == 0
    assert kept == 4 + len(h.host)
    spill(h, range(3, 6))
    assert h.serve(h.prompt(0, 257)) == (256, Fidelity.EXACT)
    h.flush()
    assert h.serve(h.prompt(3, 257)) == (256, Fidelity.INT4)


def test_pages_computed_behind_a_lossy_prefix_are_lossy(make):
    h = make(max_tokens=512, host_memory_mb=8, use_compression=True, compression_ratio=0.52)
    spill(h, range(4), tokens=128)
    spill(h, range(10, 14), tokens=128)
    longer = [*h.prompt(0, 128), *h.prompt(7, 100)]
    assert h.serve(longer) == (128, Fidelity.INT8)
    assert h.serve(h.prompt(0, 129), exact_only=True) == (0, Fidelity.EXACT)
    assert h.serve(longer) == (224, Fidelity.INT8), "its own pages stay lossy behind a prefix made exact"
    assert h.serve(longer, exact_only=True) == (128, Fidelity.EXACT)
    assert h.serve(longer) == (224, Fidelity.EXACT)


def test_a_raw_copy_of_lossy_pages_is_still_lossy(make):
    h = make(max_tokens=512, host_memory_mb=8, use_compression=True, compression_ratio=0.52)
    spill(h, range(4), tokens=129)
    spill(h, range(10, 14), tokens=129)
    longer = [*h.prompt(0, 128), *h.prompt(7, 129)]
    assert h.serve(longer) == (128, Fidelity.INT8)
    h.apply(use_compression=False)
    spill(h, range(20, 26))
    assert h.serve(h.prompt(0, 129), exact_only=True) == (0, Fidelity.EXACT)
    assert h.serve(longer) == (256, Fidelity.INT8)
    assert h.serve(longer, exact_only=True) == (128, Fidelity.EXACT)


def test_exact_pages_replace_lossy_ones_and_never_the_reverse(make):
    h = make(max_tokens=1024, host_memory_mb=8, use_compression=True, compression_ratio=0.52)
    tokens = h.prompt(0, 257)
    spill(h, range(6))
    assert h.serve(tokens)[1] is Fidelity.INT8
    h.flush()
    lossy = h.lease(tokens)
    assert h.serve(tokens, exact_only=True) == (0, Fidelity.EXACT)
    assert h.serve(tokens) == (256, Fidelity.EXACT)
    h.cache.commit(lossy, tokens, 256)
    h.cache.release(lossy)
    assert h.serve(tokens, exact_only=True) == (256, Fidelity.EXACT)


def test_an_exact_request_may_use_raw_blocks_of_exact_pages_only(make):
    h = make(max_tokens=512, host_memory_mb=8)
    spill(h, range(4))
    assert h.serve(h.prompt(0, 257), exact_only=True) == (256, Fidelity.EXACT)
    h.apply(use_compression=True, compression_ratio=0.52)
    spill(h, range(20, 24))
    lease = h.lease(h.prompt(20, 257), exact_only=True)
    assert not lease.loading
    h.cache.release(lease)


def test_without_a_host_tier_nothing_is_copied_and_no_thread_runs(make):
    h = make(max_tokens=256)
    spill(h, range(6))
    assert h.counter("evicted_pages_total") > 0
    assert h.cache._transfer._worker._thread is None
    assert h.cache._transfer._buffers._made == 0


def test_a_block_in_the_host_tier_is_not_encoded_again(make):
    h = make(max_tokens=512, host_memory_mb=8)
    for _ in range(3):
        spill(h, range(4))
    stored = h.host
    assert len(stored) == 8
    encodings = []
    submit = h.cache._transfer._worker.submit
    h.cache._transfer._worker.submit = lambda job, urgent: (
        encodings.append(urgent),
        submit(job, urgent=urgent),
    )
    spill(h, range(4))
    assert encodings.count(False) == 0
    assert encodings.count(True) > 0


def test_a_corrupt_block_is_a_miss_and_a_count(make):
    h = make(max_tokens=512, host_memory_mb=8)
    spill(h, range(4))
    host = h.host
    tokens = h.prompt(0, 257)
    key = h.lease(tokens).hashes.pages[15]
    damage(host, key)
    lease = h.loaded(h.lease(tokens))
    assert lease.cached_tokens == 128
    assert h.counter("blocks_lost_total", "corrupt") == 1
    assert host.get(key) is None
    h.cache.release(lease)
    for held in list(h.cache._leases):
        h.cache.release(held)


def test_when_the_encoder_is_behind_blocks_are_dropped_and_counted(make):
    h = make(max_tokens=8192, host_memory_mb=64)
    gate = threading.Event()
    transfer = h.cache._transfer
    encode = transfer._codec.encode

    class Slow:
        fidelity = Fidelity.EXACT

        def encode(self, block: torch.Tensor):
            assert gate.wait(30)
            return encode(block)

    transfer._codec = Slow()
    h.serve(h.prompt(0, 8192))
    h.serve(h.prompt(1, 8192))
    assert h.counter("blocks_lost_total", "busy") == 32
    gate.set()
    h.flush()
    assert len(h.host) == 32


def test_a_shrinking_pool_waits_for_the_encoder(make):
    h = make(max_tokens=4096, host_memory_mb=64)
    h.serve(h.prompt(0, 4096))
    h.apply(max_tokens=128)
    h.until(lambda: not h.cache.converging)
    h.flush()
    assert h.counter("blocks_lost_total", "busy") == 0
    h.apply(max_tokens=8192)
    assert h.serve(h.prompt(0, 4097))[0] == 4096


def test_a_lowered_host_budget_converges(make):
    h = make(max_tokens=256, host_memory_mb=8, tiers=[HostTier()])  # the last tier: evicted blocks are lost
    spill(h, range(60))
    assert len(h.host) > 100
    h.apply(host_memory_mb=1)
    assert h.cache.converging
    h.until(lambda: not h.cache.converging)
    assert h.cache.gauges()["kvpilot_cache_bytes"]["host"] <= 2**20
    assert h.counter("blocks_lost_total", "shrunk") > 50
    assert h.counter("blocks_lost_total", "evicted") == 0
    spill(h, range(60, 80))
    assert h.counter("blocks_lost_total", "evicted") > 0


def test_higher_compression_level_keeps_the_blocks_of_a_lowered_budget(make):
    h = make(max_tokens=256, host_memory_mb=8)
    spill(h, range(60))
    host = h.host
    blocks, raw = len(host), host.used
    h.apply(host_memory_mb=1, use_compression=True, compression_ratio=0.52)
    assert 1 < raw / 2**20 < 3.5, "8 bits hold in a megabyte what 32 held"
    h.until(lambda: not h.cache.converging)
    assert len(host) == blocks
    assert h.counter("blocks_lost_total", "shrunk") == 0
    kept_raw = [block for block in host._blocks.values() if block.fidelity is Fidelity.EXACT]
    assert kept_raw, "no more blocks are recompressed than the budget needs"
    assert next(reversed(host._blocks.values())).fidelity is Fidelity.EXACT, "the least recent ones go first"
    lease = h.loaded(h.lease(h.prompt(0, 129)))
    assert (lease.cached_tokens, lease.fidelity) == (128, Fidelity.INT8)
    h.cache.release(lease)


def test_block_that_cannot_be_recompressed_is_dropped_and_counted(make):
    h = make(max_tokens=256, host_memory_mb=8)
    spill(h, range(60))
    host = h.host
    damage(host, next(iter(host._blocks)))
    h.apply(host_memory_mb=1, use_compression=True, compression_ratio=0.52)
    h.until(lambda: not h.cache.converging)
    assert h.counter("blocks_lost_total", "corrupt") == 1


def test_releasing_a_lease_that_still_loads_leaves_the_cache_whole(make):
    h = make(max_tokens=512, host_memory_mb=8)
    spill(h, range(4))
    lease = h.lease(h.prompt(0, 257))
    assert lease.loading
    h.cache.release(lease)
    h.cache.check_integrity()
    h.until(lambda: h.counter("tier_load_blocks_total", "host") == 1)
    h.cache.check_integrity()
    assert h.lease(h.prompt(0, 129)).cached_tokens == 128


def test_two_leases_share_one_load(make):
    h = make(max_tokens=1024, host_memory_mb=8)
    spill(h, range(8))
    tokens = h.prompt(0, 257)
    leases = [h.lease(tokens) for _ in range(2)]
    for lease in leases:
        h.loaded(lease)
        assert lease.cached_tokens == 256
    assert h.counter("tier_load_blocks_total", "host") == 2
    for lease in leases:
        h.cache.release(lease)


def polls_to_load(h, tokens) -> int:
    """Polls with something landed until a lease has all of its blocks."""
    lease, polls = h.lease(tokens), 0
    while lease.loading:
        h.cache.wait(5)
        polls += h.cache.poll()
    assert lease.cached_tokens == len(tokens) // 16 * 16
    h.cache.release(lease)
    return polls


def test_without_prefetch_blocks_come_one_by_one_and_with_it_together(make):
    h = make(max_tokens=2048, host_memory_mb=32)
    spill(h, range(4), tokens=1025)
    assert polls_to_load(h, h.prompt(0, 1025)) == 8
    h.apply(enable_prefetch=True, prefetch_size=4)
    spill(h, range(4, 8), tokens=1025)
    lease = h.lease(h.prompt(4, 1025))
    assert lease.pending_pages == 4 * 8
    h.loaded(lease)
    h.cache.release(lease)


def test_a_prefetched_prompt_does_not_wait(make):
    h = make(max_tokens=2048, host_memory_mb=32, enable_prefetch=True, prefetch_size=2)
    spill(h, range(8), tokens=513)
    tokens = h.prompt(0, 513)
    h.prefetch(tokens)
    h.until(lambda: h.counter("tier_load_blocks_total", "host") == 2)
    h.cache.check_integrity()
    lease = h.lease(tokens)
    assert lease.cached_tokens == 256
    h.loaded(lease)
    assert lease.cached_tokens == 512
    assert h.error(lease, tokens) == 0.0
    assert h.counter("prefetch_blocks_total", "used") == 2
    assert h.counter("prefetch_blocks_total", "wasted") == 0
    h.compute(lease, tokens)
    assert h.counter("prefix_hit_tokens_total", "host") == 512
    assert h.counter("prefix_hit_tokens_total", "pool") == 0
    h.cache.release(lease)


def test_a_lease_joins_a_prefetch_that_is_under_way(make):
    h = make(max_tokens=2048, host_memory_mb=32, enable_prefetch=True, prefetch_size=2)
    spill(h, range(8), tokens=513)
    tokens = h.prompt(0, 257)
    h.prefetch(tokens)
    lease = h.loaded(h.lease(tokens))
    assert lease.cached_tokens == 256
    assert h.counter("prefetch_blocks_total", "used") == 2
    assert h.counter("tier_load_blocks_total", "host") == 2
    h.cache.release(lease)


def test_a_prefetch_that_nobody_uses_is_counted_as_wasted(make):
    h = make(max_tokens=2048, host_memory_mb=32, enable_prefetch=True, prefetch_size=2)
    spill(h, range(8), tokens=513)
    h.prefetch(h.prompt(0, 513))
    h.until(lambda: h.counter("tier_load_blocks_total", "host") == 2)
    spill(h, range(8, 13), tokens=513)
    assert h.counter("prefetch_blocks_total", "wasted") == 2
    assert h.counter("prefetch_blocks_total", "used") == 0


def test_unused_prefetches_fill_a_quarter_of_the_pool_at_most(make):
    h = make(max_tokens=1024, host_memory_mb=32, enable_prefetch=True, prefetch_size=4)
    spill(h, range(16))
    for seed in range(12):
        h.prefetch(h.prompt(seed, 257))
    h.until(lambda: not h.cache._transfer._loads)
    assert h.counter("tier_load_blocks_total", "host") == 2
    h.apply(enable_prefetch=False)
    h.prefetch(h.prompt(11, 257))
    assert not h.cache._transfer._loads


def test_exact_only_prefetch_leaves_lossy_blocks_alone(make):
    h = make(max_tokens=1024, host_memory_mb=8, use_compression=True, enable_prefetch=True)
    spill(h, range(8))
    h.prefetch(h.prompt(0, 257), exact_only=True)
    assert not h.cache._transfer._loads


def test_loads_that_cannot_have_pages_are_misses(make):
    h = make(max_tokens=512, host_memory_mb=8)
    spill(h, range(4))
    hog = h.lease(h.prompt(50, 500))
    assert h.cache.extend(hog, 500)
    lease = h.lease(h.prompt(0, 257))
    assert not lease.loading
    assert lease.cached_tokens == 0
    h.cache.release(hog)
    h.cache.release(lease)


def test_torch_uses_one_thread_in_the_worker(make):
    h = make(max_tokens=512, host_memory_mb=8)
    seen = []
    encode = h.cache._transfer._codec.encode

    class Spy:
        fidelity = Fidelity.EXACT

        def encode(self, block: torch.Tensor):
            seen.append((torch.get_num_threads(), threading.current_thread().name))
            return encode(block)

    h.cache._transfer._codec = Spy()
    spill(h, range(4))
    assert set(seen) == {(1, "kvpilot-tier-worker")}


def test_a_cache_built_and_driven_in_inference_mode_works(make):
    with torch.inference_mode():
        h = make(max_tokens=512, host_memory_mb=8)
        spill(h, range(2))
    spill(h, range(2, 4))
    with torch.inference_mode():
        assert h.serve(h.prompt(0, 257)) == (256, Fidelity.EXACT)
