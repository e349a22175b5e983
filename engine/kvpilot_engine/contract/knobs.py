"""The knob catalogue: what may be tuned, within which bounds, at which price.

A knob is a field of :class:`KVCacheConfig`. Its class says how a change of it is proven (source: the tuning
classes of the design): A hot, no cache loss; B shapes the cache; C bears on quality and needs an opt-in.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from pydantic.alias_generators import to_camel


class KnobClass(StrEnum):
    """How a change of the knob is proven."""

    HOT = "A"
    CACHE = "B"
    QUALITY = "C"


@dataclass(frozen=True)
class Knob:
    """One tunable field.

    Attributes:
        name: snake_case field of KVCacheConfig.
        kind: how values are written and compared.
        cls: how a change is proven.
        price: order in which remedies are tried; lower is cheaper (0 costs nothing but work).
        hot: True when the engine changes it between two steps.
        minimum, maximum: inclusive bounds of the tuner (the field's own bounds may be wider); None for
            kinds without an order.
        unit: of the value, for people.
        effect: what a higher value does, in one clause.
    """

    name: str
    kind: Literal["int", "ratio", "flag", "choice"]
    cls: KnobClass
    price: int
    hot: bool
    minimum: float | None
    maximum: float | None
    unit: str
    effect: str

    @property
    def resource_name(self) -> str:
        """The camelCase spelling that the resource uses."""
        return to_camel(self.name)


CATALOGUE: tuple[Knob, ...] = (
    Knob("num_workers", "int", KnobClass.HOT, 1, True, 1, 128, "requests", "admits more requests at once"),
    Knob("batch_size", "int", KnobClass.HOT, 1, True, 1, 256, "sequences", "steps more sequences together"),
    Knob("max_step_tokens", "int", KnobClass.HOT, 2, True, 64, 8192, "tokens", "prefills more per step"),
    Knob("prefetch_size", "int", KnobClass.HOT, 2, True, 0, 64, "blocks", "fetches further ahead"),
    Knob("enable_prefetch", "flag", KnobClass.HOT, 2, True, None, None, "", "fetches ahead at all"),
    Knob("cache_strategy", "choice", KnobClass.HOT, 2, True, None, None, "", "chooses what is evicted"),
    Knob("max_tokens", "int", KnobClass.CACHE, 4, True, 512, 65536, "tokens", "keeps more in the hot cache"),
    Knob("host_memory_mb", "int", KnobClass.CACHE, 4, True, 0, 65536, "MiB", "keeps more in the host tier"),
    Knob("max_memory_mb", "int", KnobClass.CACHE, 3, True, 100, 1_048_576, "MiB", "allows more cache memory"),
    Knob("use_compression", "flag", KnobClass.CACHE, 3, True, None, None, "", "encodes evicted blocks"),
    Knob("compression_ratio", "ratio", KnobClass.CACHE, 3, True, 0.1, 1.0, "kept", "encodes less tightly"),
    Knob("gc_threshold", "ratio", KnobClass.CACHE, 3, True, 0.5, 0.95, "of limit", "collects later"),
    Knob("use_quantization", "flag", KnobClass.QUALITY, 8, False, None, None, "", "quantises the hot pool"),
    Knob("quantization_bits", "choice", KnobClass.QUALITY, 8, False, None, None, "bits", "keeps more bits"),
)

_BY_NAME = {knob.name: knob for knob in CATALOGUE} | {knob.resource_name: knob for knob in CATALOGUE}


def knob(name: str) -> Knob:
    """The knob of that name, in either spelling.

    Raises:
        KeyError: when no knob has that name.
    """
    return _BY_NAME[name]


@dataclass(frozen=True)
class CodecRung:
    """One step of the compression ladder: a codec and the fraction of 16-bit bytes it keeps."""

    codec: Literal["raw", "int8", "int4"]
    kept: float


LADDER: tuple[CodecRung, ...] = (CodecRung("raw", 1.0), CodecRung("int8", 0.52), CodecRung("int4", 0.32))
"""From loosest to tightest. The tuner steps over rungs, never over bare numbers."""

RUNG_TOLERANCE = 0.02


def codec_rung(use_compression: bool, compression_ratio: float) -> CodecRung:
    """The rung for a configuration: the loosest one that keeps at most ``compression_ratio`` + .02.

    A ratio below the tightest rung gives the tightest rung. Without compression it is always raw.
    """
    if not use_compression:
        return LADDER[0]
    fitting = [rung for rung in LADDER if rung.kept <= compression_ratio + RUNG_TOLERANCE]
    return fitting[0] if fitting else LADDER[-1]
