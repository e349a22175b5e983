"""What rules do by their thresholds, for checks of a manifest and of the rules themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from types import MappingProxyType
from typing import Literal

from kvpilot_operator.tuning.policy import Policy
from kvpilot_operator.tuning.rules.cache import (
    ACCURATE,
    MAX_MEASURED_MEMORY,
    MAX_PREDICTED_MEMORY,
    WASTED,
)
from kvpilot_operator.tuning.rules.memory import EMERGENCY_MEMORY

Way = Literal["up", "down"]

WAYS: Mapping[str, Way] = MappingProxyType(
    {
        "memory-emergency": "down",
        "memory-relief": "down",
        "workers-up": "up",
        "workers-down": "down",
        "batch-up": "up",
        "step-tokens-up": "up",
        "prefetch-up": "up",
        "prefetch-down": "down",
        "compression-down": "up",  # of compressionRatio, the share that is kept
        "compression-up": "down",
        "cache-quota-up": "up",
    }
)
"""Which way each rule moves its knobs; rules of flags, choices and replicas are left out."""

ANY_KNOB = frozenset({"memory-relief", "cache-quota-up"})
"""Rules that change one of their knobs, whichever fits; the others need their leading one."""


@dataclass(frozen=True)
class Band:
    """The values of a signal, inclusive, at which a rule moves a knob."""

    rule: str
    knob: str
    way: Way
    signal: str
    low: float
    high: float


def bands(policy: Policy) -> tuple[Band, ...]:
    """The bands of all rules that decide by a threshold of one signal."""
    memory = policy.objectives.memory
    quotas = ("maxTokens", "hostMemoryMb", "maxMemoryMb")
    return (
        Band("prefetch-up", "prefetchSize", "up", "used share of prefetched blocks", ACCURATE, 1.0),
        Band("prefetch-down", "prefetchSize", "down", "used share of prefetched blocks", 0.0, WASTED),
        *(Band("memory-relief", name, "down", "memory", memory, 1.0) for name in quotas),
        *(Band("cache-quota-up", n, "up", "memory", 0.0, MAX_PREDICTED_MEMORY * memory) for n in quotas),
        Band("memory-relief", "compressionRatio", "down", "memory", memory, 1.0),
        Band("compression-down", "compressionRatio", "up", "memory", 0.0, MAX_MEASURED_MEMORY * memory),
        Band("memory-emergency", "batchSize", "down", "memory", EMERGENCY_MEMORY, 1.0),
    )


def cycles(found: tuple[Band, ...]) -> Iterator[tuple[Band, Band]]:
    """Pairs that move one knob in opposite directions by one signal, with no gap between their bands."""
    for one, other in combinations(found, 2):
        same = (one.knob, one.signal) == (other.knob, other.signal) and one.way != other.way
        if same and one.low <= other.high and other.low <= one.high:
            yield one, other
