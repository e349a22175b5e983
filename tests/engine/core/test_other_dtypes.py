"""Hit against miss in the shorter types: the bounds that docs/decisions publishes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

BOUNDS = {"float16": 0.02, "bfloat16": 0.15}


@pytest.mark.parametrize("dtype", BOUNDS)
def test_hit_and_miss_agree_within_the_published_bound(
    make_engine: Callable[..., Any], prompt: Callable[..., list[int]], dtype: str
) -> None:
    hits = make_engine(dtype=dtype)
    misses = make_engine(dtype=dtype, max_step_tokens=2048)
    worst = 0.0
    for shared in (16, 17, 128, 500):
        base = prompt(shared, 50 + shared)
        hits.ask(f"warm{shared}", base + prompt(5, 1), 1)
        ids = base + prompt(5, 2)
        assert hits.ask(f"{shared}", ids, 1).cached_tokens == shared // 16 * 16
        misses.ask(f"{shared}", ids, 1)
        rows = hits.logits[f"{shared}"][len(ids)], misses.logits[f"{shared}"][len(ids)]
        worst = max(worst, float((rows[0] - rows[1]).nan_to_num().abs().max()))
    assert worst <= BOUNDS[dtype]
