"""The engine of kvpilot: a paged, tiered KV cache under continuous batching.

This module is the public API. It does not import torch until an engine is built.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvpilot_engine.contract import VERSION, CacheStrategy, ConfigWarning, KVCacheConfig

if TYPE_CHECKING:
    from kvpilot_engine.api.analyzer import PerformanceAnalyzer
    from kvpilot_engine.api.engine import KVCacheEngine

__version__ = VERSION

_LAZY = {"KVCacheEngine": "kvpilot_engine.api.engine", "PerformanceAnalyzer": "kvpilot_engine.api.analyzer"}

__all__ = ["CacheStrategy", "ConfigWarning", "KVCacheConfig", "KVCacheEngine", "PerformanceAnalyzer"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
