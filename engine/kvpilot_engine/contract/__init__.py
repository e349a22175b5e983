"""The interface between engine and operator: configuration, knobs, metrics and admin API models.

It needs the standard library and pydantic only: the operator's image holds no torch, and the operator imports
no other part of the engine.
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
from kvpilot_engine.contract.knobs import CATALOGUE, Knob, KnobClass, compression_level, knob

VERSION = "0.1.0"
"""Version of the engine, as in pyproject.toml."""

CONTRACT_VERSION = 1
"""Goes up by one with each incompatible change of an admin API field or of a metric's meaning."""

__all__ = [
    "BLOCK_TOKENS",
    "CATALOGUE",
    "CONTRACT_VERSION",
    "PAGE_TOKENS",
    "VERSION",
    "AdminConfig",
    "ApplyReport",
    "CacheStrategy",
    "ConfigPatch",
    "ConfigWarning",
    "KVCacheConfig",
    "Knob",
    "KnobClass",
    "Notice",
    "compression_level",
    "config_errors",
    "knob",
]
