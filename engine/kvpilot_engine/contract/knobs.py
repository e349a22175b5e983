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

from kvpilot_engine.contract.wording import counted

GROWTH = 2.0
"""Factor of one step upwards of a knob of class A: few steps cross its range, and each shows an effect."""

QUOTA_GROWTH = 1.5
"""Factor of one step upwards of a cache quota (``max_tokens``, ``host_memory_mb``), which costs memory."""

SATURATED_BUSY = 0.90
SATURATED_GAIN = 0.10
"""A device is saturated if steps take at least SATURATED_BUSY of wall time and one more sequence would raise
tokens/s by less than SATURATED_GAIN."""


MIB = 1 << 20


@dataclass(frozen=True, order=True)
class Price:
    """What a remedy costs. GPUs count first, then a restart, then time with a cold cache, then its memory.

    Attributes:
        gpus: those of the replicas that it adds; below 0 for what it gives back.
        restart: replicas restart for it. No knob of the catalogue needs that.
        cold_seconds: time until the cache that it changes, or the replica that it adds, serves as a warm one.
        cache_bytes: memory that the cache takes for it, or content that the cache loses by it.
    """

    gpus: int = 0
    restart: bool = False
    cold_seconds: float = 0.0
    cache_bytes: float = 0.0

    @property
    def words(self) -> str:
        """For people: ``128 MiB of cache and 60 s of warming up``."""
        parts = [counted(abs(self.gpus), "GPU") + (" less" if self.gpus < 0 else "")] if self.gpus else []
        parts += ["a restart"] if self.restart else []
        parts += [f"{self.cache_bytes / MIB:.0f} MiB of cache"] if self.cache_bytes >= MIB / 2 else []
        parts += [f"{self.cold_seconds:.0f} s of warming up"] if self.cold_seconds >= 1 else []
        *first, last = parts or ["nothing but work"]
        return f"{', '.join(first)} and {last}" if first else last


WORK = Price()
ENCODING = Price(cold_seconds=60)
QUOTA = Price(cold_seconds=60, cache_bytes=128 * MIB)
"""Prices of knobs. WORK drops and takes nothing; with ENCODING it takes about a minute until all blocks are
of the new kind; a QUOTA also takes memory, for one step half of the default host tier."""


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
        price: of one step from the default configuration; remedies are tried in this order.
        minimum, maximum: inclusive bounds of the tuner (the field's own bounds may be wider); None for
            kinds without an order.
        unit: of the value, for people.
        effect: what a higher value does, in one clause.
    """

    name: str
    kind: Literal["int", "ratio", "flag", "choice"]
    cls: KnobClass
    price: Price
    minimum: float | None
    maximum: float | None
    unit: str
    effect: str

    @cached_property
    def resource_name(self) -> str:
        """The camelCase spelling that the resource uses."""
        return to_camel(self.name)


CATALOGUE: tuple[Knob, ...] = (
    Knob("num_workers", "int", KnobClass.HOT, WORK, 1, 128, "requests", "admits more requests at once"),
    Knob("batch_size", "int", KnobClass.HOT, WORK, 1, 256, "sequences", "runs more sequences in one step"),
    Knob("max_step_tokens", "int", KnobClass.HOT, WORK, 64, 8192, "tokens", "prefills more per step"),
    Knob("prefetch_size", "int", KnobClass.HOT, WORK, 0, 64, "blocks", "fetches further ahead"),
    Knob("enable_prefetch", "flag", KnobClass.HOT, WORK, None, None, "", "fetches blocks ahead"),
    Knob("cache_strategy", "choice", KnobClass.HOT, WORK, None, None, "", "chooses what is evicted"),
    Knob("max_tokens", "int", KnobClass.CACHE, QUOTA, 512, 65536, "tokens", "keeps more on the device"),
    Knob("host_memory_mb", "int", KnobClass.CACHE, QUOTA, 0, 65536, "MiB", "keeps more in the host tier"),
    Knob("max_memory_mb", "int", KnobClass.CACHE, QUOTA, 100, 1_048_576, "MiB", "allows more cache memory"),
    Knob("use_compression", "flag", KnobClass.CACHE, ENCODING, None, None, "", "encodes evicted blocks"),
    Knob("compression_ratio", "ratio", KnobClass.CACHE, ENCODING, 0.1, 1.0, "kept", "compresses less"),
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
