"""The engine of kvpilot: a paged, tiered KV cache under continuous batching.

The public surface is this module. Nothing here imports torch until an engine is built.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvpilot_engine.contract import CacheStrategy, ConfigWarning, KVCacheConfig

if TYPE_CHECKING:
    from kvpilot_engine.analyzer import PerformanceAnalyzer
    from kvpilot_engine.api import KVCacheEngine

__version__ = "0.1.0"

_LAZY = {"KVCacheEngine": "kvpilot_engine.api", "PerformanceAnalyzer": "kvpilot_engine.analyzer"}

__all__ = ["CacheStrategy", "ConfigWarning", "KVCacheConfig", "KVCacheEngine", "PerformanceAnalyzer"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
