"""What engine and operator agree on: configuration, knobs, metric names, admin API models.

Standard library and pydantic only. The operator's image holds no torch, and this package is the one part of
the engine that the operator may import.
"""

from kvpilot_engine.contract.admin import AdminConfig, ApplyReport, ConfigPatch
from kvpilot_engine.contract.config import (
    BLOCK_TOKENS,
    PAGE_TOKENS,
    CacheStrategy,
    ConfigWarning,
    KVCacheConfig,
    Notice,
    config_errors,
)
from kvpilot_engine.contract.knobs import CATALOGUE, Knob, KnobClass, codec_rung, knob

#: Raised by one whenever a field of the admin API or the meaning of a metric changes incompatibly.
CONTRACT_VERSION = 1

__all__ = [
    "BLOCK_TOKENS",
    "CATALOGUE",
    "CONTRACT_VERSION",
    "PAGE_TOKENS",
    "AdminConfig",
    "ApplyReport",
    "CacheStrategy",
    "ConfigPatch",
    "ConfigWarning",
    "KVCacheConfig",
    "Knob",
    "KnobClass",
    "Notice",
    "codec_rung",
    "config_errors",
    "knob",
]
