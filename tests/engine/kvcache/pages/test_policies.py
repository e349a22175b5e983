"""Order of eviction, against plain reference implementations."""

from __future__ import annotations

import random
import time

import pytest

from kvpilot_engine.contract import CacheStrategy
from kvpilot_engine.kvcache.fidelity import Fidelity
from kvpilot_engine.kvcache.pages.policies import make_policy
from kvpilot_engine.kvcache.pages.prefix_index import Entry

KEYS = {
    CacheStrategy.LRU: lambda e: e.last,
    CacheStrategy.LFU: lambda e: (e.uses, e.last),
    CacheStrategy.FIFO: lambda e: e.born,
}


def entries(count: int) -> list[Entry]:
    return [
        Entry(bytes([i % 256, i // 256]), b"", 0, i, fidelity=Fidelity.EXACT, born=i) for i in range(count)
    ]


@pytest.mark.parametrize("strategy", KEYS)
def test_a_policy_evicts_the_smallest_key_under_random_use(strategy):
    rng = random.Random(strategy)
    policy, key = make_policy(strategy), KEYS[strategy]
    idle, held, now = [], entries(200), 1000
    for _ in range(5000):
        action = rng.random()
        if held and (action < 0.45 or not idle):
            entry = held.pop(rng.randrange(len(held)))
            now += 1
            entry.last = now
            policy.push(entry)
            idle.append(entry)
        elif action < 0.8:
            entry = idle.pop(rng.randrange(len(idle)))
            entry.uses += 1
            policy.discard(entry)
            held.append(entry)
        else:
            victim = policy.pop()
            assert victim is min(idle, key=key)
            idle.remove(victim)
            held.append(victim)
        assert len(policy) == len(idle)
        assert set(policy) == set(idle)


@pytest.mark.parametrize("strategy", KEYS)
def test_an_entry_that_is_put_back_keeps_its_place(strategy):
    policy = make_policy(strategy)
    for at, entry in enumerate(entries(5)):
        entry.last = at
        policy.push(entry)
    first = policy.pop()
    policy.put_back(first)
    assert policy.pop() is first


@pytest.mark.parametrize("strategy", KEYS)
def test_the_cost_of_an_eviction_does_not_grow_with_the_cache(strategy):
    def seconds(count: int) -> float:
        policy = make_policy(strategy)
        for entry in entries(count):
            policy.push(entry)
        best = float("inf")
        for _ in range(5):
            start = time.process_time()
            for _ in range(200):
                victim = policy.pop()
                victim.last += 100_000
                victim.uses += 1
                policy.push(victim)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(50_000) < 8 * seconds(500)


@pytest.mark.parametrize("strategy", [CacheStrategy.LFU, CacheStrategy.FIFO])
def test_the_head_of_a_chain_outlives_its_tail(make, strategy):
    h = make(max_tokens=384, cache_strategy=strategy)
    head = h.prompt(1, 128)
    h.serve(head)
    h.serve([*head, *h.prompt(2, 128)])
    h.serve(h.prompt(3, 192))  # fifo would take the head, which is older than what follows it
    assert h.serve([*head, 1])[0] == 128


def test_lfu_keeps_what_is_used_often(make):
    h = make(max_tokens=256, cache_strategy="lfu")
    often = h.prompt(1, 129)
    for _ in range(3):
        h.serve(often)
    for seed in range(2, 8):
        h.serve(h.prompt(seed, 128))
    assert h.serve(often)[0] == 128


def test_fifo_forgets_what_is_used_often(make):
    h = make(max_tokens=256, cache_strategy="fifo")
    often = h.prompt(1, 129)
    for _ in range(3):
        h.serve(often)
    for seed in range(2, 4):
        h.serve(h.prompt(seed, 128))
    assert h.serve(often)[0] == 0


def test_a_switch_keeps_every_page_and_orders_by_what_was_known_before(make):
    h = make(max_tokens=384)
    often, recent = h.prompt(1, 129), h.prompt(2, 129)
    for _ in range(3):
        h.serve(often)
    h.serve(recent)
    assert h.apply(cache_strategy="lfu") == (2, 0)
    h.cache.check_integrity()
    for seed in range(3, 6):
        h.serve(h.prompt(seed, 128))
    assert h.serve(often)[0] == 128, "uses were counted under lru"
    assert h.serve(recent)[0] == 0
    h.apply(cache_strategy="adaptive")
    assert h.serve(often)[0] == 128
