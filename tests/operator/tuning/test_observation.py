"""Samples and their sums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from math import inf, nan
from typing import Any

import pytest
from tests.operator.tuning.observations import replica

from kvpilot_operator.tuning.observation import Counts, Gauges, MemoryUse, Sample

FULL = Sample(
    windows={
        "short": Counts(),
        "long": Counts(
            outcomes={"ok": 1.0},
            request_within={0.5: 1.0},
            first_token_within={0.5: 1.0},
            stage_seconds={"decode": 1.0},
            bucket_rows={1: 1.0},
            bucket_seconds={1: 1.0},
        ),
    },
    gauges=Gauges(host=MemoryUse(), device=MemoryUse(), curve={1: 0.01}),
    age_s=0.0,
    coverage_s=60.0,
)
"""A sample in which every number of every part has a place."""


def numbers_of(part: Any, path: str = "") -> Iterator[str]:
    """Where each number of a sample's windows and gauges is."""
    if is_dataclass(part):
        for item in fields(part):
            yield from numbers_of(getattr(part, item.name), f"{path}.{item.name}")
    elif isinstance(part, Mapping):
        for key, value in part.items():
            yield from numbers_of(value, f"{path}.{key}")
    else:
        assert isinstance(part, int | float), path
        yield path


def with_number(part: Any, at: str, number: float, path: str = "") -> Any:
    """The part with another number at a place."""
    if is_dataclass(part) and not isinstance(part, type):
        values = {item.name: getattr(part, item.name) for item in fields(part)}
        return replace(part, **{n: with_number(v, at, number, f"{path}.{n}") for n, v in values.items()})
    if isinstance(part, Mapping):
        return {key: with_number(value, at, number, f"{path}.{key}") for key, value in part.items()}
    return number if path == at else part


PLACES = [*numbers_of(FULL.windows, ".windows"), *numbers_of(FULL.gauges, ".gauges")]


@pytest.mark.parametrize("number", [nan, inf, -inf])
def test_a_number_that_is_not_finite_is_seen_wherever_it_is(number: float) -> None:
    assert FULL.finite
    assert len(PLACES) > 50
    assert [at for at in PLACES if with_number(FULL, at, number).finite] == []


def test_total_adds_every_number_and_keeps_the_keys_of_all() -> None:
    one, other = (replica(rate=rate).sample for rate in (10.0, 30.0))
    assert one is not None and other is not None
    parts = [one.windows["long"], replace(other.windows["long"], outcomes={"shed": 3.0})]
    total = Counts.total(parts)
    assert total.outcomes == {"ok": 600.0, "shed": 3.0, "error": 0.0}
    plain = [item.name for item in fields(Counts) if isinstance(getattr(total, item.name), float)]
    assert len(plain) == 16
    for name in plain:
        assert getattr(total, name) == sum(getattr(part, name) for part in parts), name
    assert Counts.total([]) == Counts()
