"""The cache: device pool, prefix index and the tiers below, behind :class:`KVCache`."""

from kvpilot_engine.kvcache.cache import KVCache
from kvpilot_engine.kvcache.fidelity import Fidelity
from kvpilot_engine.kvcache.lease import Lease
from kvpilot_engine.kvcache.pages.pool import PAGES_PER_BLOCK, KVLayout
from kvpilot_engine.kvcache.pages.prefix_index import PrefixHashes

__all__ = ["PAGES_PER_BLOCK", "Fidelity", "KVCache", "KVLayout", "Lease", "PrefixHashes"]
