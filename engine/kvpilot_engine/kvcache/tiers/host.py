"""The host tier: encoded blocks in host memory, evicted in order of use."""

from __future__ import annotations

from collections import OrderedDict

from kvpilot_engine.contract import KVCacheConfig
from kvpilot_engine.kvcache.fidelity import Fidelity
from kvpilot_engine.kvcache.tiers.base import StoredBlock, Tier


class HostTier(Tier):
    """A block stays stored after it was loaded, so that its next eviction from the pool costs nothing."""

    name = "host"
    in_memory = True

    def __init__(self) -> None:
        self.budget = 0
        self.used = 0
        self._blocks: OrderedDict[bytes, StoredBlock] = OrderedDict()  # least recently used first

    @staticmethod
    def requested_bytes(config: KVCacheConfig) -> int:
        """See Tier."""
        return config.host_memory_mb << 20

    def __len__(self) -> int:
        return len(self._blocks)

    def get(self, key: bytes, *, touch: bool = True) -> StoredBlock | None:
        """See Tier."""
        block = self._blocks.get(key)
        if touch and block is not None:
            self._blocks.move_to_end(key)
        return block

    def put(self, key: bytes, block: StoredBlock) -> bool:
        """See Tier."""
        if block.nbytes > self.budget:
            return False
        old = self._blocks.get(key)
        self._blocks[key] = block
        self.used += block.nbytes - (old.nbytes if old else 0)
        return True

    def drop(self, key: bytes) -> None:
        """See Tier."""
        block = self._blocks.pop(key, None)
        if block is not None:
            self.used -= block.nbytes

    def shrink(self, max_blocks: int) -> list[tuple[bytes, StoredBlock]]:
        """See Tier."""
        evicted: list[tuple[bytes, StoredBlock]] = []
        while self.over and len(evicted) < max_blocks:
            key, block = self._blocks.popitem(last=False)
            self.used -= block.nbytes
            evicted.append((key, block))
        return evicted

    def less_compressed(self, than: Fidelity) -> list[bytes]:
        """See Tier."""
        return [key for key, block in self._blocks.items() if block.encoded.fidelity < than]

    def check_integrity(self) -> None:
        """See Tier."""
        total = sum(block.nbytes for block in self._blocks.values())
        assert total == self.used, f"the host tier counts {self.used} bytes, its blocks hold {total}"
