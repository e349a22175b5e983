"""The seam below the device pool: what a tier is, and what it stores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from kvpilot_engine.contract import KVCacheConfig
from kvpilot_engine.kvcache.fidelity import Fidelity
from kvpilot_engine.kvcache.tiers.codecs import Encoded


@dataclass(frozen=True, eq=False)
class StoredBlock:
    """An encoded block of 128 tokens.

    Attributes:
        fidelity: exact, or the worst codec in the ancestry of its pages, its own included.
    """

    encoded: Encoded
    fidelity: Fidelity

    @property
    def nbytes(self) -> int:
        """Size of the payload, bytes."""
        return self.encoded.nbytes


class Tier(Protocol):
    """A store of blocks, keyed by the hash of their last page, within a budget of bytes.

    Every method runs on the stepping thread and must not block. A tier on a disk or a network keeps its index
    in memory, writes in the background, and returns blocks whose payload is read when the worker decodes
    them; a payload that is gone or damaged fails the decoding, which counts as a miss.

    Attributes:
        name: value of the ``tier`` label of its metrics.
        in_memory: its bytes count towards ``max_memory_mb``.
        budget: bytes that it may hold; may be set below ``used``, and ``shrink`` converges.
        used: bytes that it holds.
    """

    name: ClassVar[str]
    in_memory: ClassVar[bool]
    budget: int
    used: int

    @staticmethod
    def requested_bytes(config: KVCacheConfig) -> int:
        """Budget that ``config`` asks for, before ``max_memory_mb`` is applied."""
        ...

    @property
    def over(self) -> bool:
        """True while the budget is exceeded."""
        return self.used > self.budget

    def __len__(self) -> int: ...

    def get(self, key: bytes, *, touch: bool = True) -> StoredBlock | None:
        """Return a stored block; ``touch`` makes it the last to be evicted, where the tier orders by use."""
        ...

    def put(self, key: bytes, block: StoredBlock) -> bool:
        """Store a block, or a new encoding in the place of the old one.

        May exceed the budget, which the caller restores by ``shrink``. Returns False, and changes nothing,
        for a block that is larger than the whole budget.
        """
        ...

    def drop(self, key: bytes) -> None:
        """Forget a block, if it is stored."""
        ...

    def shrink(self, max_blocks: int) -> list[tuple[bytes, StoredBlock]]:
        """Evict up to ``max_blocks`` blocks while over the budget, and return them for the next tier."""
        ...

    def less_compressed(self, than: Fidelity) -> list[bytes]:
        """Keys of the blocks stored at a lower compression level, in order of eviction.

        Under a lowered budget they are recompressed before any block is evicted; a tier where that does not
        pay returns none.
        """
        ...

    def check_integrity(self) -> None:
        """Raise AssertionError when ``used`` is not the sum of the stored blocks."""
        ...
