"""Random requests, aborts and changes: every request ends, and the books agree after every step."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from kvpilot_engine import protocol

CHANGES: list[dict[str, Any]] = [
    {"max_tokens": 128},
    {"max_tokens": 256},
    {"max_tokens": 1024},
    {"num_workers": 1},
    {"num_workers": 9},
    {"batch_size": 1},
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
    {"prefetch_size": 0},
    {"prefetch_size": 8},
]


@pytest.mark.parametrize("seed", range(2))
def test_random_life(make_engine: Callable[..., Any], prompt: Callable[..., list[int]], seed: int) -> None:
    choose = random.Random(seed)
    driver = make_engine(max_tokens=512, host_memory_mb=16, max_step_tokens=64)
    bases = [prompt(400, i) for i in range(3)]
    sent: dict[str, int] = {}
    for step in range(100):
        action = choose.random()
        if action < 0.4:
            name = f"r{step}"
            ids = choose.choice(bases)[: choose.choice((0, 15, 16, 128, 200, 300))] + prompt(
                choose.randint(1, 40), choose.randint(0, 3)
            )
            sent[name] = choose.randint(1, 12)
            driver.submit(
                name,
                ids,
                sent[name],
                priority=choose.randint(-1, 1),
                exact_only=choose.random() < 0.3,
                temperature=choose.choice((0.0, 1.0)),
            )
        elif action < 0.47 and sent:
            driver.engine.abort(choose.choice(list(sent)))
        elif action < 0.6:
            assert isinstance(driver.apply(generation=step, **choose.choice(CHANGES)), protocol.Applied)
        driver.step()
        driver.engine.check_integrity()
    driver.run()
    assert driver.finished.keys() == sent.keys()
    for name, end in driver.finished.items():
        assert end.reason in {"length", "cancelled", "invalid"}, end
        assert end.output_tokens == len(driver.tokens[name])
        assert (end.reason == "length") == (end.output_tokens == sent[name])
        assert sum(end.stages.values()) >= 0
    cache = driver.engine.cache
    cache.wait(5.0)
    cache.poll()
    assert cache.pages_available == cache.pages_limit
