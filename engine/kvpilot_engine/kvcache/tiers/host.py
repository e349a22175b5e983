"""The host tier: encoded blocks below the hot pool, least recently used out, within a budget of bytes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from kvpilot_engine.kvcache.codecs import Encoded
from kvpilot_engine.kvcache.fidelity import Fidelity


@dataclass(frozen=True, eq=False)
class HostBlock:
    """A stored block and the worst codec in the ancestry of its pages, its own included."""

    encoded: Encoded
    fidelity: Fidelity


class HostTier:
    """Blocks by the hash of their last page. A block that is loaded stays: evicting it again is free."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = 0
        self._blocks: OrderedDict[bytes, HostBlock] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def over(self) -> bool:
        """True while a lowered budget is not reached yet."""
        return self.used > self.budget

    def get(self, key: bytes) -> HostBlock | None:
        """The block of that hash, now the most recently used."""
        block = self._blocks.get(key)
        if block is not None:
            self._blocks.move_to_end(key)
        return block

    def peek(self, key: bytes) -> HostBlock | None:
        """The block of that hash; its place in the order stays."""
        return self._blocks.get(key)

    def looser(self, than: Fidelity) -> list[bytes]:
        """Hashes of the blocks that a looser codec has stored, the least recently used first."""
        return [key for key, block in self._blocks.items() if block.encoded.fidelity < than]

    def replace(self, key: bytes, block: HostBlock) -> None:
        """Put another encoding of a stored block in its place in the order."""
        self.used += block.encoded.nbytes - self._blocks[key].encoded.nbytes
        self._blocks[key] = block

    def put(self, key: bytes, block: HostBlock) -> bool:
        """Keep a block; False when it alone is larger than the budget. The caller shrinks afterwards."""
        if block.encoded.nbytes > self.budget:
            return False
        self.drop(key)
        self._blocks[key] = block
        self.used += block.encoded.nbytes
        return True

    def drop(self, key: bytes) -> None:
        """Forget a block, if it is there."""
        block = self._blocks.pop(key, None)
        if block is not None:
            self.used -= block.encoded.nbytes

    def shrink(self, most: int) -> int:
        """Drop up to ``most`` least recently used blocks while over the budget; returns how many."""
        dropped = 0
        while self.over and dropped < most:
            _, block = self._blocks.popitem(last=False)
            self.used -= block.encoded.nbytes
            dropped += 1
        return dropped

    def check_integrity(self) -> None:
        """Raise AssertionError when the sum of the blocks is not the bytes counted."""
        total = sum(block.encoded.nbytes for block in self._blocks.values())
        assert total == self.used, f"host tier counts {self.used} bytes, its blocks hold {total}"
