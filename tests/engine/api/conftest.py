"""One real engine with a core process of its own, shared by these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvpilot_engine import KVCacheConfig, KVCacheEngine


@pytest.fixture(scope="session")
def engine() -> Iterator[KVCacheEngine]:
    config = KVCacheConfig(dtype="float32", num_workers=16, batch_size=16, max_tokens=16384, max_queue=32)
    with KVCacheEngine(config) as running:
        yield running
