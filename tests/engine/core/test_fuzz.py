"""Random requests, aborts and changes: every request ends, and all records agree after each step."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from kvpilot_engine.contract import metrics as names
from kvpilot_engine.contract.metrics import total
from kvpilot_engine.ipc import messages

STEPS = 200

CHANGES: list[dict[str, Any]] = [
    {"max_tokens": 256},
    {"max_tokens": 512},
    {"max_tokens": 768},
    {"num_workers": 4},
    {"num_workers": 9},
    {"batch_size": 4},
    {"batch_size": 7},
    {"max_step_tokens": 16},
    {"max_step_tokens": 300},
    {"cache_strategy": "lfu"},
    {"cache_strategy": "fifo"},
    {"cache_strategy": "lru"},
    {"use_compression": False},
    {"use_compression": True, "compression_ratio": 0.32},
    {"use_compression": True, "compression_ratio": 0.52},
    {"host_memory_mb": 0},
    {"host_memory_mb": 16},
    {"host_memory_mb": 16, "use_compression": False},
    {"host_memory_mb": 1},
    {"prefetch_size": 0},
    {"prefetch_size": 8},
]


COVERED = {
    names.PREEMPTIONS_TOTAL: 2,
    names.EVICTED_PAGES_TOTAL: 100,
    names.TIER_LOAD_BLOCKS_TOTAL: 1,
    names.HIT_TOKENS_TOTAL: 500,
}
"""Minimum of each event in the run: without them the checks after each step would show nothing."""


class Clock:
    """Advances by 1 ms with each reading."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


@pytest.mark.slow
def test_random_requests_aborts_and_changes_leave_the_engine_consistent(
    make_engine: Callable[..., Any], prompt: Callable[..., list[int]]
) -> None:
    choose = random.Random(1)
    clock = Clock()
    driver = make_engine(clock=clock, max_tokens=512, host_memory_mb=16, max_step_tokens=64)
    bases = [prompt(400, i) for i in range(6)]
    sent: dict[str, int] = {}
    arrived: dict[str, float] = {}
    ended: dict[str, float] = {}
    applied = aborted = 0
    for step in range(STEPS):
        action = choose.random()
        if action < 0.35:
            name = f"r{step}"
            ids = choose.choice(bases)[: choose.choice((0, 0, 15, 128, 300))] + prompt(
                choose.randint(1, 40), choose.randint(0, 3)
            )
            sent[name] = choose.choice((1, 8, 60, 90))
            arrived[name] = clock.now
            driver.submit(
                name,
                ids,
                sent[name],
                priority=choose.randint(-1, 1),
                exact_only=choose.random() < 0.3,
                temperature=choose.choice((0.0, 1.0)),
            )
        elif action < 0.40 and sent:
            driver.engine.abort(choose.choice(list(sent)))
        elif action < 0.48:
            assert isinstance(driver.apply(generation=step, **choose.choice(CHANGES)), messages.Applied)
            applied += 1
        driver.step()
        for name in driver.finished.keys() - ended.keys():
            ended[name] = clock.now
        driver.engine.check_integrity()
        if step % 10 == 0:
            driver.settle()  # else a worker that is late has stored nothing that later requests could load
    while driver.engine.has_work:
        driver.step()
        for name in driver.finished.keys() - ended.keys():
            ended[name] = clock.now
    assert driver.finished.keys() == sent.keys()
    for name, end in driver.finished.items():
        assert end.reason in {"length", "cancelled", "too_large"}, end
        assert end.output_tokens == len(driver.tokens[name])
        assert (end.reason == "length") == (end.output_tokens == sent[name])
        assert sum(end.stages.values()) == pytest.approx(ended[name] - arrived[name], abs=0.02)
        aborted += end.reason == "cancelled"
    cache = driver.engine.cache
    driver.settle()
    assert cache.pages_available == cache.pages_limit
    counters = driver.engine.sample("s").counters
    met = {name: total(counters, name) for name in COVERED}
    assert all(met[name] >= minimum for name, minimum in COVERED.items()), met
    assert min(applied, aborted) >= 5
