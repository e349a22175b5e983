"""The cache: pool, prefix index, policies, codecs and the host tier, behind :class:`KVCache`."""

from kvpilot_engine.kvcache.cache import KVCache
from kvpilot_engine.kvcache.fidelity import Fidelity
from kvpilot_engine.kvcache.lease import Lease
from kvpilot_engine.kvcache.pool import PAGES_PER_BLOCK, KVLayout

__all__ = ["PAGES_PER_BLOCK", "Fidelity", "KVCache", "KVLayout", "Lease"]
