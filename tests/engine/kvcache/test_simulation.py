"""The hit rate of the cache is that of a plain simulation fed with its own log of lookups and insertions."""

from __future__ import annotations

import random
from collections import OrderedDict
from itertools import groupby, takewhile

import pytest


def simulate(events, pages: int) -> tuple[int, int]:
    """Hit and looked-up pages of a plain lru of whole pages, whose requests touch their tail first."""
    cached: OrderedDict[bytes, None] = OrderedDict()
    hits = looked_up = 0
    for kind, group in groupby(events, key=lambda event: event[0]):
        subjects = [event[1] for event in group]
        if kind == "lookup":
            for keys in subjects:
                prefix = list(takewhile(cached.__contains__, keys))
                hits += len(prefix)
                looked_up += len(keys)
        else:
            for key in reversed(subjects):
                cached[key] = None
        for key in reversed(prefix):
            cached.move_to_end(key)
        while len(cached) > pages:
            cached.popitem(last=False)
    return hits, looked_up


@pytest.mark.parametrize("pages", [256, 512, 1024])
def test_the_hit_rate_is_that_of_a_plain_simulation(make, pages):
    h = make(max_tokens=16 * pages)
    rng = random.Random(5)
    sessions = {seed: h.prompt(seed % 4, 128) for seed in range(60)}
    for at in range(1500):
        seed = min(int(rng.expovariate(1 / 15)), 59)
        tokens = sessions[seed] = [*sessions[seed], *h.prompt(1000 + at, rng.randrange(8, 40))][:800]
        lease = h.lookup(tokens)
        answer = [*tokens, *h.prompt(5000 + at, 20)]
        assert h.cache.extend(lease, len(answer))
        h.cache.commit(lease, answer, len(answer))
        sessions[seed] = answer
        h.cache.release(lease)
    hits, looked_up = simulate(h.events, pages)
    assert looked_up * 16 > 0.9 * h.counter("prefix_query_tokens_total")
    measured = h.counter("prefix_hit_tokens_total", "pool") / 16 / looked_up
    assert measured == pytest.approx(hits / looked_up, abs=0.01)
    assert 0.1 < measured < 0.95
    ceiling = h.counter("prefix_ceiling_tokens_total") / 16 / looked_up
    assert ceiling >= measured
