"""The three statements on exactness: bytes of a raw hit, bit-equal logits, and logits within 1e-5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvpilot_engine.contract import KVCacheConfig
from kvpilot_engine.contract import metrics as names
from kvpilot_engine.core.engine import Engine
from kvpilot_engine.ipc import messages
from kvpilot_engine.model.determinism import NotDeterministicError, TiledLinear

Prompt = Callable[[int, int], list[int]]
Make = Callable[..., Any]

SHARED = (0, 1, 15, 16, 17, 127, 128, 1000)
"""Tokens that a second prompt shares with a first one: around a page, around a block, and many."""

TAIL = 21
MIN_JUDGED = 5
"""New tokens behind a hit that few-row kernels compute: where bits differ without ``deterministic``."""

CODECS: dict[str, dict[str, Any]] = {
    "raw": {"use_compression": False},
    "int8": {"use_compression": True, "compression_ratio": 0.52},
    "int4": {"use_compression": True, "compression_ratio": 0.32},
}


def whole_pages(shared: int) -> int:
    return shared // 16 * 16


def differences(driver: Any, one: str, other: str) -> list[float]:
    """|dlogit| of each token that both requests chose."""
    rows = driver.logits[one], driver.logits[other]
    assert rows[0].keys() == rows[1].keys()
    return [float((rows[0][at] - rows[1][at]).nan_to_num().abs().max()) for at in rows[0]]


def same_bits(driver: Any, one: str, other: str) -> bool:
    rows = driver.logits[one], driver.logits[other]
    assert rows[0].keys() == rows[1].keys()
    return all(torch.equal(rows[0][at], rows[1][at]) for at in rows[0])


def page_bytes(driver: Any, pages: list[int]) -> torch.Tensor:
    slots = torch.tensor([16 * page + i for page in pages for i in range(16)], dtype=torch.int64)
    cache = driver.engine.cache
    return torch.stack([cache.k[:, slots], cache.v[:, slots]]).clone()


@pytest.mark.parametrize("host_memory_mb", [0, pytest.param(64, marks=pytest.mark.slow)])
def test_bytes_read_on_a_raw_hit_are_the_bytes_written(
    make_engine: Make, prompt: Prompt, host_memory_mb: int
) -> None:
    """Read back from the pool, or, with a host tier, after the pool was overrun by other prompts."""
    driver = make_engine(
        max_tokens=1280, max_step_tokens=128, host_memory_mb=host_memory_mb, use_compression=False
    )
    cache = driver.engine.cache
    written = {}
    for shared in SHARED:
        ids = prompt(shared + TAIL, 1000 + shared)
        driver.submit(f"w{shared}", ids, 2)
        while f"w{shared}" not in driver.finished:
            driver.step()
        lease = cache.lease([*ids, 0], cache.hashes(), count=False)
        written[shared] = page_bytes(driver, lease.pages[: lease.cached_tokens // 16])
        cache.release(lease)
        if host_memory_mb:
            for i in range(3):
                driver.ask(f"other{shared}{i}", prompt(640, 2 * shared + i), 1)
            driver.settle()
        lease = cache.lease([*ids, 0], cache.hashes(), count=False)
        cache.load(lease)
        while lease.loading:
            cache.wait(1.0)
            cache.poll()
        whole = whole_pages(len(ids))
        # A slower tier holds whole blocks only; the pool holds every page.
        expected = whole // 128 * 128 if host_memory_mb else whole
        assert lease.cached_tokens >= expected
        read = page_bytes(driver, lease.pages[: lease.cached_tokens // 16])
        assert torch.equal(read, written[shared][:, :, : lease.cached_tokens])
        cache.release(lease)
    if host_memory_mb:
        assert driver.counter(names.TIER_LOAD_BLOCKS_TOTAL, "host") >= 8


@pytest.mark.parametrize("model", ["builtin/tiny-llama", "builtin/tiny-qwen3"])
def test_deterministic_hit_or_miss_is_bit_equal(make_engine: Make, prompt: Prompt, model: str) -> None:
    lengths = SHARED if model == "builtin/tiny-llama" else (17, 128)
    hits = make_engine(model, deterministic=True, max_tokens=16_384)
    misses = make_engine(model, deterministic=True, max_tokens=16_384, max_step_tokens=2048)
    for shared in lengths:
        base = prompt(shared, 50 + shared)
        hits.ask(f"warm{shared}", base + prompt(TAIL, 1), 2)
        ids = base + prompt(TAIL, 2)
        assert hits.ask(f"{shared}", ids, 4).cached_tokens == whole_pages(shared)
        assert misses.ask(f"{shared}", ids, 4).cached_tokens == 0
        hits.logits[f"miss{shared}"] = misses.logits[f"{shared}"]
        assert same_bits(hits, f"{shared}", f"miss{shared}"), shared
        assert hits.tokens[f"{shared}"] == misses.tokens[f"{shared}"]


def test_deterministic_any_chunking_and_any_company(make_engine: Make, prompt: Prompt) -> None:
    ids = prompt(150, 3)
    alone = make_engine(deterministic=True, max_step_tokens=512)
    alone.ask("a", ids, 12)
    crowd = make_engine(deterministic=True, max_step_tokens=23)
    for i in range(5):
        crowd.submit(f"other{i}", prompt(30 + 17 * i, 10 + i), 20)
    crowd.submit("b", ids, 12)
    crowd.run()
    alone.logits["b"] = crowd.logits["b"]
    assert same_bits(alone, "a", "b")


@pytest.mark.slow
def test_deterministic_under_eviction_and_preemption(make_engine: Make, prompt: Prompt) -> None:
    """The pool holds a third of what runs; pages are evicted, recomputed, taken over."""
    calm = make_engine(deterministic=True, max_tokens=16_384)
    tight = make_engine(deterministic=True, max_tokens=192, num_workers=5, batch_size=5)
    base = prompt(64, 0)
    requests = {str(i): (base[: 16 * i] + prompt(40, i), 55) for i in range(4)}
    for name, (ids, new) in requests.items():
        calm.ask(name, ids, new)
        tight.submit(name, ids, new)
    tight.run()
    assert tight.counter(names.EVICTED_PAGES_TOTAL) > 0
    assert tight.counter(names.PREEMPTIONS_TOTAL) > 0
    for name in requests:
        calm.logits["tight"] = tight.logits[name]
        assert same_bits(calm, name, "tight"), name
        assert calm.tokens[name] == tight.tokens[name]


CHANGES: list[dict[str, Any]] = [
    {"cache_strategy": "lfu"},
    {"max_tokens": 400, "num_workers": 2},
    {"batch_size": 2, "max_step_tokens": 117},
    {"cache_strategy": "fifo", "max_tokens": 640},
    {"batch_size": 8, "num_workers": 8, "max_step_tokens": 250},
    {"host_memory_mb": 8, "use_compression": False},
    {"host_memory_mb": 32, "prefetch_size": 8, "cache_strategy": "lru"},
    {"enable_prefetch": False, "max_tokens": 352},
]


@pytest.mark.parametrize("codec", CODECS)
def test_deterministic_while_changes_land(make_engine: Make, prompt: Prompt, codec: str) -> None:
    """Raw: everyone. Compressed: those that ask for exact hits only, beside others that do not."""
    calm = make_engine(deterministic=True, max_tokens=16_384)
    moving = make_engine(deterministic=True, max_tokens=640, host_memory_mb=32, num_workers=3)
    base = prompt(300, 0)
    exact = codec != "raw"
    requests = {str(i): (base[: 60 * (i % 6)] + prompt(21, i), 12) for i in range(9)}
    for name, (ids, new) in requests.items():
        calm.ask(name, ids, new)
        moving.submit(name, ids, new, exact_only=exact)
        if exact:
            moving.submit(f"lossy{name}", base[:280] + prompt(20, int(name)), 2)
    steps = 0
    while moving.engine.has_work:
        if steps % 2 == 0:
            change = {**CHANGES[steps // 2 % len(CHANGES)], **CODECS[codec]}
            answer = moving.apply(generation=steps, **change)
            assert isinstance(answer, messages.Applied), answer
        moving.step()
        steps += 1
    assert steps > 2 * len(CHANGES)
    assert moving.counter(names.EVICTED_PAGES_TOTAL) > 0
    assert {end.reason for end in moving.finished.values()} == {"length"}
    for name in requests:
        calm.logits["moving"] = moving.logits[name]
        assert same_bits(calm, name, "moving"), name


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_exact_only_requests_never_see_a_lossy_page(make_engine: Make, prompt: Prompt, codec: str) -> None:
    """A plain request takes the lossy blocks, and its logits show it; an exact-only one does not."""
    driver = make_engine(deterministic=True, max_tokens=512, host_memory_mb=64, **CODECS[codec])
    ids = prompt(300, 0)
    driver.ask("first", ids, 3)
    for i in range(2):
        driver.ask(f"other{i}", prompt(400, 1 + i), 1)
    assert driver.ask("exact", ids, 3, exact_only=True).cached_tokens < 128
    assert same_bits(driver, "first", "exact")
    for i in range(2):
        driver.ask(f"another{i}", prompt(400, 5 + i), 1)
    driver.settle()
    plain = driver.ask("plain", ids, 3)
    assert plain.cached_tokens >= 256
    assert not torch.equal(driver.logits["first"][300], driver.logits["plain"][300])


def test_otherwise_hit_and_miss_agree_within_1e_5(make_engine: Make, prompt: Prompt) -> None:
    hits = make_engine(max_tokens=16_384)
    misses = make_engine(max_tokens=16_384, max_step_tokens=2048)
    worst = 0.0
    for shared in SHARED:
        base = prompt(shared, 50 + shared)
        hits.ask(f"warm{shared}", base + prompt(MIN_JUDGED, 1), 2)
        ids = base + prompt(MIN_JUDGED, 2)
        assert hits.ask(f"{shared}", ids, 4).cached_tokens == whole_pages(shared)
        misses.ask(f"{shared}", ids, 4)
        hits.logits[f"miss{shared}"] = misses.logits[f"{shared}"]
        worst = max(worst, *differences(hits, f"{shared}", f"miss{shared}"))
    assert worst <= 1e-5


def test_the_measure_can_fail(make_engine: Make, prompt: Prompt) -> None:
    """One wrong byte in a cached page shows in the logits: the tests above would see it."""
    driver = make_engine(deterministic=True)
    ids = prompt(100, 0)
    driver.ask("a", ids, 2)
    lease = driver.engine.cache.lease(ids, driver.engine.cache.hashes(), count=False)
    driver.engine.cache.v[2, 16 * lease.pages[1] + 3, 0, 5] += 1e-2
    driver.engine.cache.release(lease)
    driver.ask("b", ids, 2)
    assert not same_bits(driver, "a", "b")
    assert max(differences(driver, "a", "b")) > 1e-5


def test_engine_whose_sums_depend_on_the_batch_refuses_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    tiled = TiledLinear.forward
    monkeypatch.setattr(
        TiledLinear, "forward", lambda self, rows: tiled(self, rows) * (1 + 1e-6 * rows.shape[1])
    )
    with pytest.raises(
        NotDeterministicError, match=r"logits differ in chunks on this CPU \(\|dlogit\| up to"
    ):
        Engine(KVCacheConfig(deterministic=True, dtype="float32", device="cpu"))
