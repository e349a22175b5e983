"""What a knob does to the signals that rules act on. Every signal is the worse the higher it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Signal = Literal[
    "admission wait", "batch wait", "time in work", "tier load", "misses", "wasted prefetches", "memory"
]
Way = Literal["up", "down"]

EFFECTS: Mapping[str, Mapping[Signal, int]] = MappingProxyType(
    {
        "numWorkers": {"admission wait": -1, "batch wait": 1, "time in work": 1, "memory": 1},
        "batchSize": {"admission wait": -1, "batch wait": -1, "time in work": 1, "memory": 1},
        "maxStepTokens": {"batch wait": -1, "time in work": -1, "memory": 1},
        "prefetchSize": {"tier load": -1, "wasted prefetches": 1},
        "enablePrefetch": {"tier load": -1, "wasted prefetches": 1},
        "cacheStrategy": {"misses": -1},
        "maxTokens": {"misses": -1, "admission wait": -1, "memory": 1},
        "hostMemoryMb": {"misses": -1, "memory": 1},
        "maxMemoryMb": {"memory": 1},  # the quotas within it hold what is cached
        "useCompression": {"misses": -1, "tier load": 1},
        "compressionRatio": {"misses": 1, "tier load": -1},  # a higher one keeps more bytes of a block
    }
)
"""Whether a higher value of a knob raises a signal (1) or lowers it (-1). ``cacheStrategy`` goes up to
adaptive."""


@dataclass(frozen=True)
class Move:
    """A knob and the way in which a rule moves it."""

    knob: str
    way: Way

    @property
    def opposite(self) -> Move:
        """The same knob the other way."""
        return Move(self.knob, "down" if self.way == "up" else "up")

    def effect(self, signal: Signal) -> int:
        """1 if it raises the signal, -1 if it lowers it, 0 if it leaves it alone."""
        return EFFECTS[self.knob].get(signal, 0) * (1 if self.way == "up" else -1)


def up(*knobs: str) -> tuple[Move, ...]:
    """Moves upwards."""
    return tuple(Move(knob, "up") for knob in knobs)


def down(*knobs: str) -> tuple[Move, ...]:
    """Moves downwards."""
    return tuple(Move(knob, "down") for knob in knobs)
