"""The knob catalogue: what may be tuned, within which bounds, in which steps, at which price.

A knob is a field of :class:`KVCacheConfig` that an engine changes between two steps and that a rule moves;
the user alone sets any other field. Its class says how a change of it is proven: A loses no cached page; B
changes what the cache holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Literal

from pydantic.alias_generators import to_camel

GROWTH = 2.0
"""Factor of one step upwards of a knob of class A: few steps cross its range, and each shows an effect."""

QUOTA_GROWTH = 1.5
"""Factor of one step upwards of a cache quota (``max_tokens``, ``host_memory_mb``), which costs memory."""

SATURATED_BUSY = 0.90
SATURATED_GAIN = 0.10
"""A device is saturated if steps take at least SATURATED_BUSY of wall time and one more sequence would raise
tokens/s by less than SATURATED_GAIN."""


class KnobClass(StrEnum):
    """How a change of the knob is proven."""

    HOT = "A"
    CACHE = "B"


@dataclass(frozen=True)
class Knob:
    """One tunable field.

    Attributes:
        name: snake_case field of KVCacheConfig.
        kind: how values are written and compared.
        cls: how a change is proven.
        price: order in which remedies are tried; lower is cheaper (0 costs nothing but work).
        minimum, maximum: inclusive bounds of the tuner (the field's own bounds may be wider); None for
            kinds without an order.
        unit: of the value, for people.
        effect: what a higher value does, in one clause.
    """

    name: str
    kind: Literal["int", "ratio", "flag", "choice"]
    cls: KnobClass
    price: int
    minimum: float | None
    maximum: float | None
    unit: str
    effect: str

    @cached_property
    def resource_name(self) -> str:
        """The camelCase spelling that the resource uses."""
        return to_camel(self.name)


CATALOGUE: tuple[Knob, ...] = (
    Knob("num_workers", "int", KnobClass.HOT, 1, 1, 128, "requests", "admits more requests at once"),
    Knob("batch_size", "int", KnobClass.HOT, 1, 1, 256, "sequences", "runs more sequences in one step"),
    Knob("max_step_tokens", "int", KnobClass.HOT, 2, 64, 8192, "tokens", "prefills more per step"),
    Knob("prefetch_size", "int", KnobClass.HOT, 2, 0, 64, "blocks", "fetches further ahead"),
    Knob("enable_prefetch", "flag", KnobClass.HOT, 2, None, None, "", "fetches blocks ahead"),
    Knob("cache_strategy", "choice", KnobClass.HOT, 2, None, None, "", "chooses what is evicted"),
    Knob("max_tokens", "int", KnobClass.CACHE, 4, 512, 65536, "tokens", "keeps more on the device"),
    Knob("host_memory_mb", "int", KnobClass.CACHE, 4, 0, 65536, "MiB", "keeps more in the host tier"),
    Knob("max_memory_mb", "int", KnobClass.CACHE, 3, 100, 1_048_576, "MiB", "allows more cache memory"),
    Knob("use_compression", "flag", KnobClass.CACHE, 3, None, None, "", "encodes evicted blocks"),
    Knob("compression_ratio", "ratio", KnobClass.CACHE, 3, 0.1, 1.0, "kept", "compresses less"),
)

_BY_NAME = {knob.name: knob for knob in CATALOGUE} | {knob.resource_name: knob for knob in CATALOGUE}


def knob(name: str) -> Knob:
    """The knob of that name, in either spelling.

    Raises:
        KeyError: when no knob has that name.
    """
    return _BY_NAME[name]


@dataclass(frozen=True)
class CompressionLevel:
    """A codec and the fraction of 16-bit bytes that it keeps."""

    codec: Literal["raw", "int8", "int4"]
    kept: float


COMPRESSION_LEVELS: tuple[CompressionLevel, ...] = (
    CompressionLevel("raw", 1.0),
    CompressionLevel("int8", 0.52),
    CompressionLevel("int4", 0.32),
)
"""Levels 0, 1 and 2, from lowest to highest. The tuner moves by whole levels."""

LEVEL_TOLERANCE = 0.02


def compression_level(use_compression: bool, compression_ratio: float) -> CompressionLevel:
    """The lowest level that keeps at most ``compression_ratio`` + LEVEL_TOLERANCE of the bytes.

    The highest level if none keeps so little; level 0 (raw) without compression.
    """
    if not use_compression:
        return COMPRESSION_LEVELS[0]
    fitting = [level for level in COMPRESSION_LEVELS if level.kept <= compression_ratio + LEVEL_TOLERANCE]
    return fitting[0] if fitting else COMPRESSION_LEVELS[-1]
