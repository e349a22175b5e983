"""Configuration changes of a running engine: whole or not at all, and nothing fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from kvpilot_engine.contract import metrics as names
from kvpilot_engine.ipc import messages

Prompt = Callable[[int, int], list[int]]
Make = Callable[..., Any]


def refused(answer: Any) -> tuple[str, str]:
    assert isinstance(answer, messages.Refused)
    return answer.code, answer.message


def test_refused_change_has_a_reason_and_no_effect(make_engine: Make) -> None:
    driver = make_engine(max_tokens=4096)
    assert isinstance(driver.apply(generation=3, epoch=2, batchSize=4), messages.Applied)
    before = driver.engine.describe("d")
    code, line = refused(driver.apply(generation=4, epoch=1, batchSize=5))
    assert (code, line) == ("stale_epoch", "epoch: 1 is behind the engine's 2")
    code, line = refused(driver.apply(generation=4, epoch=2, batchSize=5, dtype="float16"))
    assert (code, line) == ("cold", "dtype: needs a restart, is 'float32', got 'float16'")
    code, line = refused(driver.apply(generation=4, epoch=2, num_workers=3, batchSize=0))
    assert code == "invalid"
    assert line.startswith("batchSize: "), "as it was spelled"
    assert line.endswith("got 0")
    code, line = refused(driver.apply(generation=4, epoch=2, batch=5))
    assert (code, line) == ("invalid", "batch: unknown field")
    code, line = refused(driver.apply(generation=4, epoch=2, max_tokens=10_000_000))
    assert code == "cold"
    assert line == "max_tokens: at most 65536 without a restart, got 10000000"
    assert driver.engine.describe("d") == before


def test_the_same_change_twice_is_the_same_as_once(make_engine: Make) -> None:
    driver = make_engine()
    first = driver.apply(generation=7, epoch=1, batchSize=3, cache_strategy="lfu")
    described = driver.engine.describe("d")
    second = driver.apply(generation=7, epoch=1, batchSize=3, cache_strategy="lfu")
    assert first.changed == ["batchSize", "cacheStrategy"]
    assert second.changed == []
    assert driver.engine.describe("d") == described
    assert (described.generation, described.epoch) == (7, 1)
    assert described.config["batchSize"] == 3


def test_a_cold_field_at_its_own_value_is_no_change(make_engine: Make) -> None:
    driver = make_engine()
    answer = driver.apply(dtype="float32", batch_size=2)
    assert isinstance(answer, messages.Applied)
    assert answer.changed == ["batchSize"]


def test_lowered_workers_and_rows_let_running_requests_finish(make_engine: Make, prompt: Prompt) -> None:
    driver = make_engine(num_workers=8, batch_size=6)
    for i in range(8):
        driver.submit(str(i), prompt(30, i), 8)
    for _ in range(3):
        driver.step()
    answer = driver.apply(num_workers=1, batch_size=1)
    assert answer.converging
    while driver.engine.describe("d").converging:
        driver.step()
    assert len(driver.finished) >= 6
    before = driver.engine.meter.rows_sum
    while driver.engine.has_work:
        driver.step()
        rows, before = driver.engine.meter.rows_sum - before, driver.engine.meter.rows_sum
        assert rows <= 1
        assert driver.gauge(names.REQUESTS_RUNNING) <= 1
    assert {end.reason for end in driver.finished.values()} == {"length"}


def test_raised_workers_and_rows_take_effect_at_the_next_step(make_engine: Make, prompt: Prompt) -> None:
    driver = make_engine(num_workers=1, batch_size=1)
    for i in range(6):
        driver.submit(str(i), prompt(10, i), 20)
    driver.step()
    driver.apply(num_workers=6, batch_size=6)
    driver.step()
    before = driver.engine.meter.rows_sum
    driver.step()
    assert driver.engine.meter.rows_sum - before == 6
    driver.run()


def test_quota_below_accepted_requests_fails_none_of_them(make_engine: Make, prompt: Prompt) -> None:
    """Accepted under 4,096, the requests need 340 tokens each; the quota falls to 256 meanwhile."""
    driver = make_engine(max_tokens=4096, num_workers=3, batch_size=3)
    for i in range(4):
        driver.submit(str(i), prompt(300, i), 40)
    for _ in range(3):
        driver.step()
    answer = driver.apply(max_tokens=256)
    assert answer.converging
    driver.submit("late", prompt(300, 9), 40)
    driver.run()
    assert driver.finished.pop("late").message.endswith("the cache holds 256 (the engine's max_tokens)")
    assert {end.reason for end in driver.finished.values()} == {"length"}
    assert all(len(ids) == 40 for ids in driver.tokens.values())
    assert not driver.engine.describe("d").converging
    assert driver.gauge(names.CACHED_PAGES, "pool") <= 16


@pytest.mark.parametrize(
    ("change", "cut"),
    [
        ({"max_tokens": 3072}, False),
        ({"host_memory_mb": 8}, False),
        ({"compression_ratio": 0.27}, False),
        ({"use_compression": False}, False),
        ({"max_tokens": 1024}, True),  # its pages find no room in the host tier
        ({"host_memory_mb": 0}, True),
    ],
)
def test_what_shapes_the_cache_keeps_it_but_for_what_a_cut_leaves_no_room_for(
    make_engine: Make, prompt: Prompt, change: dict[str, Any], cut: bool
) -> None:
    """No change empties the cache of an engine, so the arms of an experiment stay equally old."""
    driver = make_engine(max_tokens=2048, host_memory_mb=1)

    def lost() -> float:
        return sum(driver.engine.sample("s").counters[names.BLOCKS_LOST_TOTAL].values())

    for i in range(12):
        driver.ask(f"a{i}", prompt(500, i), 1)
        driver.settle()
    before, held = lost(), sum(driver.engine.sample("s").gauges[names.CACHED_PAGES].values())
    answer = driver.apply(generation=2, **change)
    driver.settle()
    assert (answer.blocks_kept, answer.blocks_lost) == (math.ceil(held / 8), 0)
    assert (lost() > before) == cut


def test_a_change_of_policy_and_codec_loses_no_page(make_engine: Make, prompt: Prompt) -> None:
    driver = make_engine(max_tokens=4096, host_memory_mb=32)
    driver.ask("a", prompt(500, 0), 1)
    for generation, change in enumerate(
        (
            {"cache_strategy": "lfu"},
            {"cache_strategy": "fifo"},
            {"compression_ratio": 0.52},
            {"prefetch_size": 0},
        )
    ):
        answer = driver.apply(generation=generation, **change)
        assert (answer.blocks_kept, answer.blocks_lost) == (4, 0)
    assert driver.ask("b", prompt(500, 0), 1).cached_tokens == 496
