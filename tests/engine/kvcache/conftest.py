"""A cache whose pages hold content that follows from their tokens, so that every hit can be checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from kvpilot_engine.contract import PAGE_TOKENS, KVCacheConfig
from kvpilot_engine.contract.config import QUIET
from kvpilot_engine.kvcache import Fidelity, KVCache, KVLayout, Lease
from kvpilot_engine.kvcache.tiers.base import Tier
from kvpilot_engine.kvcache.tiers.host import HostTier

TINY = KVLayout(layers=2, kv_heads=1, head_dim=8, dtype=torch.float32, device=torch.device("cpu"))


def config(**values: Any) -> KVCacheConfig:
    """A small lru cache without a host tier."""
    base = {
        "max_tokens": 512,
        "cache_strategy": "lru",
        "host_memory_mb": 0,
        "dtype": "float32",
        "use_compression": False,
        "enable_prefetch": False,
    }
    return KVCacheConfig.model_validate({**base, **values}, context=QUIET)


class Harness:
    """Drives a cache as an engine does, and knows what each page must hold."""

    def __init__(
        self, layout: KVLayout = TINY, *, tiers: Sequence[Tier] | None = None, **values: Any
    ) -> None:
        self.layout = layout
        self.values = values
        self.events: list[tuple[Any, ...]] = []
        self.cache = KVCache(
            layout,
            config(**values),
            b"root",
            observer=lambda *event: self.events.append(event),
            tiers=tiers,
        )

    @staticmethod
    def prompt(seed: int, tokens: int) -> list[int]:
        """Tokens that differ between seeds from the first one on."""
        return [(seed * 7919 + i * 31) % 50021 for i in range(tokens)]

    def apply(self, **values: Any) -> tuple[int, int]:
        """Change the named fields."""
        self.values = {**self.values, **values}
        return self.cache.apply(config(**self.values))

    def content(self, tokens: Sequence[int], page: int, salt: str = "") -> torch.Tensor:
        """K and V of a page, [2, layers, 16, kv_heads, head_dim], from the tokens up to its end."""
        prefix = np.asarray(tokens[: (page + 1) * PAGE_TOKENS], dtype=np.uint32).tobytes() + salt.encode()
        shape = (2, self.layout.layers, PAGE_TOKENS, self.layout.kv_heads, self.layout.head_dim)
        seed = xxhash.xxh3_64_intdigest(prefix) % 2**32
        values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
        return torch.from_numpy(values).to(self.layout.dtype)

    def read(self, page: int) -> torch.Tensor:
        """What the pool holds in a page."""
        slots = slice(page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS)
        return torch.stack((self.cache.k[:, slots], self.cache.v[:, slots]))

    def write(self, lease: Lease, tokens: Sequence[int], start: int, end: int, salt: str = "") -> None:
        """Compute pages [start, end) of a lease; behind a lossy prefix the result is off, as in a model."""
        off = 0.01 if lease.fidelity else 0.0
        for at in range(start, end):
            slots = slice(lease.pages[at] * PAGE_TOKENS, (lease.pages[at] + 1) * PAGE_TOKENS)
            self.cache.k[:, slots], self.cache.v[:, slots] = self.content(tokens, at, salt) + off

    def error(self, lease: Lease, tokens: Sequence[int], salt: str = "") -> float:
        """Largest deviation of the cached pages of a lease from what was written."""
        return max(
            (
                float((self.read(lease.pages[at]) - self.content(tokens, at, salt)).abs().max())
                for at in range(lease.hits)
            ),
            default=0.0,
        )

    def lease(self, tokens: Sequence[int], salt: str = "", exact_only: bool = False) -> Lease:
        """Look up, hold and start loading, as the scheduler does for a prompt that has room."""
        lease = self.lookup(tokens, salt, exact_only)
        self.cache.load(lease)
        return lease

    def lookup(self, tokens: Sequence[int], salt: str = "", exact_only: bool = False, **rest: Any) -> Lease:
        """Look up and hold what the pool has, without a load."""
        return self.cache.lease(tokens, self.cache.hashes(salt), exact_only, **rest)

    def prefetch(self, tokens: Sequence[int], salt: str = "", exact_only: bool = False) -> None:
        """Prefetch as for a request that is queued."""
        self.cache.prefetch(tokens, self.cache.hashes(salt), exact_only)

    @property
    def host(self) -> HostTier:
        """The host tier."""
        tier = self.cache._transfer.tiers[0]
        assert isinstance(tier, HostTier)
        return tier

    def loaded(self, lease: Lease, timeout_s: float = 30.0) -> Lease:
        """Poll until the lease waits for nothing."""
        deadline = time.monotonic() + timeout_s
        while lease.loading:
            assert time.monotonic() < deadline, "a load did not land"
            self.cache.wait(0.5)
            self.cache.poll()
        return lease

    def until(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Poll until a condition holds."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true"
            self.cache.wait(0.05)
            self.cache.poll()

    def compute(self, lease: Lease, tokens: Sequence[int], salt: str = "") -> None:
        """The rest of the prompt, behind the hits: they are counted now."""
        assert self.cache.extend(lease, len(tokens))
        self.write(lease, tokens, lease.hits, len(tokens) // PAGE_TOKENS, salt)
        self.cache.commit(lease, tokens, len(tokens))

    def serve(self, tokens: list[int], salt: str = "", *, exact_only: bool = False) -> tuple[int, Fidelity]:
        """One request from lookup to release: cached tokens and their fidelity. Raw hits must be exact."""
        lease = self.loaded(self.lease(tokens, salt, exact_only))
        cached, fidelity = lease.cached_tokens, lease.fidelity
        if fidelity is Fidelity.EXACT:
            assert self.error(lease, tokens, salt) == 0.0
        self.compute(lease, tokens, salt)
        self.cache.release(lease)
        self.cache.check_integrity()
        return cached, fidelity

    def counter(self, name: str, label: str = "") -> float:
        """One counter by its name without the prefix, and the value of its label."""
        return self.cache.counters()[f"kvpilot_{name}"][label]

    def flush(self) -> None:
        """Wait until every encoding has landed."""
        self.until(lambda: not self.cache._transfer._encoding)


@pytest.fixture
def harness_class() -> type[Harness]:
    """For tests that end their caches themselves."""
    return Harness


@pytest.fixture
def make() -> Iterator[Callable[..., Harness]]:
    """Build harnesses; at the end each must be whole, and its loader is ended."""
    made: list[Harness] = []

    def build(layout: KVLayout = TINY, **values: Any) -> Harness:
        made.append(Harness(layout, **values))
        return made[-1]

    yield build
    for harness in made:
        harness.cache.check_integrity()
        harness.cache.close()
