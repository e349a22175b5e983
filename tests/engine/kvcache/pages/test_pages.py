"""Lookups, sharing, eviction and quotas of the device pool."""

from __future__ import annotations

import pytest
import torch

from kvpilot_engine.kvcache import KVLayout

PAGE = 16


@pytest.mark.parametrize(
    ("shared", "cached"), [(0, 0), (1, 0), (15, 0), (16, 16), (17, 16), (127, 112), (128, 128), (200, 192)]
)
def test_a_hit_serves_whole_shared_pages_with_the_bytes_written(make, shared, cached):
    h = make(max_tokens=1024)
    first = h.prompt(1, 256)
    second = first[:shared] + h.prompt(2, 256 - shared)
    h.serve(first)
    assert h.serve(second)[0] == cached


def test_at_least_one_token_is_always_computed(make):
    h = make()
    tokens = h.prompt(1, 64)
    h.serve(tokens)
    assert h.serve(tokens)[0] == 48
    assert h.serve([*tokens, 5])[0] == 64
    assert h.serve([9])[0] == 0


def test_salts_and_roots_share_nothing(make):
    h = make()
    tokens = h.prompt(1, 128)
    h.serve(tokens, salt="a")
    assert h.serve(tokens, salt="b")[0] == 0
    assert h.serve(tokens)[0] == 0
    assert h.serve(tokens, salt="a")[0] == 112


def test_output_pages_are_found_by_the_next_turn(make):
    h = make()
    turn = h.prompt(1, 40)
    lease = h.lookup(turn)
    answer = list(turn)
    for token in range(30):
        answer.append(token)
        assert h.cache.extend(lease, len(answer))
        h.write(lease, answer, lease.committed, len(answer) // PAGE)
        h.cache.commit(lease, answer, len(answer))
    h.cache.release(lease)
    assert h.serve([*answer, *h.prompt(2, 20)])[0] == 64


def test_a_released_lease_frees_what_was_not_committed_and_releasing_twice_is_harmless(make):
    h = make()
    lease = h.lookup(h.prompt(1, 100))
    assert h.cache.extend(lease, 100)
    h.cache.release(lease)
    h.cache.release(lease)
    assert h.cache.pages_free == h.cache.pages_limit == 32


def test_refresh_holds_pages_that_others_committed_and_frees_its_own(make):
    h = make()
    tokens = h.prompt(1, 100)
    waiting = h.lookup(tokens)
    assert h.cache.extend(waiting, 100)
    h.serve(tokens)
    used = h.cache.pages_free
    h.cache.refresh(waiting)
    assert waiting.cached_tokens == 96
    assert h.error(waiting, tokens) == 0.0
    assert h.cache.pages_free == used + 6
    h.compute(waiting, tokens)
    assert h.counter("prefix_hit_tokens_total", "pool") == 96
    h.cache.release(waiting)


def test_refresh_has_no_effect_once_the_sequence_computes(make):
    h = make()
    tokens = h.prompt(1, 100)
    lease = h.lookup(tokens)
    assert h.cache.extend(lease, 100)
    h.write(lease, tokens, 0, 1)
    h.cache.commit(lease, tokens, 20)
    h.serve(tokens)
    h.cache.refresh(lease)
    assert lease.cached_tokens == 0
    h.cache.release(lease)


def test_two_sequences_that_compute_the_same_prompt_leave_one_copy(make):
    h = make()
    tokens = h.prompt(1, 96)
    leases = [h.lookup(tokens) for _ in range(2)]
    for lease in leases:
        assert h.cache.extend(lease, 96)
        h.write(lease, tokens, 0, 6)
        h.cache.commit(lease, tokens, 96)
    h.cache.check_integrity()
    for lease in leases:
        h.cache.release(lease)
    assert h.cache.pages_limit - h.cache.pages_free == 6


def test_a_chain_stays_whole_when_the_first_copy_of_its_head_is_evicted(make):
    h = make(max_tokens=256)
    tokens = h.prompt(1, 128)
    short, long = h.lookup(tokens[:64]), h.lookup(tokens)
    for lease, end in ((short, 64), (long, 128)):
        assert h.cache.extend(lease, end)
        h.write(lease, tokens, 0, end // PAGE)
        h.cache.commit(lease, tokens, end)
    h.cache.release(short)
    h.serve(h.prompt(2, 128))  # evicts the indexed copy of the head
    h.cache.release(long)
    assert h.serve([*tokens, 1])[0] == 128


def test_a_second_copy_counts_as_use_of_the_first(make):
    h = make(max_tokens=512)
    tokens, other = h.prompt(1, 128), h.prompt(2, 128)
    leases = [h.lookup(tokens) for _ in range(2)]
    for lease in leases:
        assert h.cache.extend(lease, 128)
        h.write(lease, tokens, 0, 8)
        h.cache.commit(lease, tokens, 128)
    h.cache.release(leases[0])
    h.serve(other)
    h.cache.release(leases[1])
    h.serve(h.prompt(3, 300))
    assert h.serve([*tokens, 1])[0] == 128
    assert h.serve([*other, 1])[0] == 80


def test_eviction_takes_the_tail_of_the_least_recent_prompt_first(make):
    h = make(max_tokens=256)
    old, new = h.prompt(1, 128), h.prompt(2, 128)
    h.serve(old)
    h.serve(new)
    h.serve(h.prompt(3, 32))
    assert h.counter("evicted_pages_total") == 2
    lease = h.lookup([*old, 1])
    assert lease.cached_tokens == 96
    h.cache.release(lease)


def test_extend_returns_false_and_changes_nothing_when_every_page_is_held(make):
    h = make(max_tokens=256)
    first, second = h.lookup(h.prompt(1, 200)), h.lookup(h.prompt(2, 100))
    assert h.cache.extend(first, 200)
    assert not h.cache.extend(second, 100)
    assert second.pages == []
    assert h.cache.pages_available == 3
    assert h.cache.extend(second, 48)
    h.cache.release(first)
    assert h.cache.extend(second, 100)
    h.cache.release(second)


def test_query_hit_and_ceiling_tokens_are_counted(make):
    h = make(max_tokens=256)
    prompts = [h.prompt(seed, 128) for seed in (1, 2, 3)]
    for tokens in [*prompts, *prompts]:
        h.serve(tokens)
    assert h.counter("prefix_query_tokens_total") == 6 * 128
    assert h.counter("prefix_hit_tokens_total", "pool") == 0
    assert h.counter("prefix_ceiling_tokens_total") == 3 * 112
    h.serve(prompts[2])
    assert h.counter("prefix_hit_tokens_total", "pool") == 112
    assert h.counter("prefix_ceiling_tokens_total") == 4 * 112
    h.cache.release(h.lookup(prompts[2], count=False))
    assert h.counter("prefix_query_tokens_total") == 7 * 128


def test_observer_gets_lookups_and_insertions_in_order(make):
    h = make()
    tokens = h.prompt(1, 48)
    h.serve(tokens)
    h.serve([*tokens, 1])
    kinds = [event[0] for event in h.events]
    assert kinds == ["lookup", "insert", "insert", "insert", "lookup"]
    (_, looked_up, hits), inserted = h.events[-1], [event[1] for event in h.events[1:4]]
    assert looked_up == inserted
    assert hits == 3


def test_a_lowered_quota_converges_in_bounded_steps_without_losing_what_is_held(make):
    h = make(max_tokens=8192)
    held_tokens = h.prompt(0, 256)
    held = h.lookup(held_tokens)
    assert h.cache.extend(held, 256)
    h.write(held, held_tokens, 0, 16)
    h.cache.commit(held, held_tokens, 256)
    for seed in range(1, 16):
        h.serve(h.prompt(seed, 512))
    assert h.cache.pages_free == 16
    kept, lost = h.apply(max_tokens=512)
    assert (kept, lost) == (62, 0)
    assert h.cache.converging
    h.cache.poll()
    assert h.cache.pages_limit == 32
    assert h.counter("evicted_pages_total") == 256
    h.cache.poll()
    h.cache.check_integrity()
    assert not h.cache.converging
    assert h.cache.pages_free == 0
    lease = h.lookup(held_tokens)
    assert h.error(lease, held_tokens) == 0.0
    assert lease.cached_tokens == 240
    h.cache.release(lease)
    h.cache.release(held)


def test_requests_go_on_while_a_quota_converges(make):
    h = make(max_tokens=1024)
    running = h.prompt(0, 400)
    lease = h.lookup(running)
    assert h.cache.extend(lease, 400)
    h.serve(h.prompt(1, 600))
    h.apply(max_tokens=128)
    assert h.cache.max_request_tokens == 128
    assert h.cache.extend(lease, 500), "an accepted request grows beyond a lowered quota"
    h.until(lambda: h.counter("evicted_pages_total") >= 37)
    assert h.cache.converging
    h.cache.release(lease)
    h.until(lambda: not h.cache.converging)


def test_the_quota_grows_up_to_the_reservation_only(make):
    h = make(max_tokens=128)
    assert h.cache.ceilings() == {"maxTokens": 65536}
    h.apply(max_tokens=65536)
    assert h.cache.pages_limit == 4096
    with pytest.raises(ValueError, match="max_tokens: at most 65536 without a restart, got 65552"):
        h.apply(max_tokens=65552)
    assert h.cache.pages_limit == 4096


def test_a_memory_budget_takes_from_the_host_tier_first(make):
    layout = KVLayout(4, 4, 32, torch.float32, torch.device("cpu"))  # 64 KiB a page
    h = make(layout, max_tokens=16_000, host_memory_mb=256)
    budgets = {None: (62.5, 256), 300: (62.5, 237.5), 100: (62.5, 37.5)}
    for budget, (pool, host) in budgets.items():
        h.apply(max_memory_mb=budget)
        gauges = h.cache.gauges()
        assert gauges["kvpilot_cache_budget_bytes"]["pool"] == pool * 2**20
        assert gauges["kvpilot_cache_budget_bytes"]["host"] == host * 2**20
    h.apply(max_memory_mb=100, max_tokens=65536)
    assert h.cache.pages_limit == 1600
    assert h.cache.gauges()["kvpilot_cache_budget_bytes"]["host"] == 0
    assert h.cache.budgeted_bytes == 100 * 2**20


def test_a_page_costs_memory_from_its_first_use_until_the_quota_is_lowered(make):
    layout = KVLayout(4, 4, 32, torch.float32, torch.device("cpu"))
    h = make(layout, max_tokens=8192)
    resident = _resident_bytes()
    assert h.cache.k.nbytes + h.cache.v.nbytes == 256 * 2**20
    for seed in range(4):
        h.serve(h.prompt(seed, 2048))
    grown = _resident_bytes() - resident
    assert 30 * 2**20 < grown < 45 * 2**20
    assert h.cache.free_slab_bytes == 0
    h.apply(max_tokens=128)
    h.cache.poll()
    assert h.cache.free_slab_bytes == 0
    h.until(lambda: not h.cache.converging)
    assert _resident_bytes() - resident < 8 * 2**20
    h.apply(max_tokens=4096)
    assert h.serve(h.prompt(3, 2048))[0] == 128, "pages whose memory was given back are usable again"


def test_free_pages_within_the_quota_are_counted_as_free_slab(make):
    h = make()
    lease = h.lookup(h.prompt(1, 160))
    assert h.cache.extend(lease, 160)
    assert h.cache.free_slab_bytes == 0
    h.cache.release(lease)
    assert h.cache.free_slab_bytes == 10 * h.layout.page_bytes


def _resident_bytes() -> int:
    from pathlib import Path

    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
