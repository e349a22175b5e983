"""How close the bytes of a cached page are to what the model computed for it."""

from __future__ import annotations

from enum import IntEnum


class Fidelity(IntEnum):
    """Exact, or the worst codec in the ancestry of a page. Higher is worse, so ``max`` combines.

    A 16-bit or 32-bit page that was stored raw is exact. What is computed behind a lossy prefix inherits it.
    """

    EXACT = 0
    INT8 = 1
    INT4 = 2
