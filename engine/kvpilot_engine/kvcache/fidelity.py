"""How exactly a cached page represents what the model computed."""

from __future__ import annotations

from enum import IntEnum


class Fidelity(IntEnum):
    """Exact, or the worst codec in the ancestry of a page. Higher is worse, so ``max`` combines two.

    A page that was stored raw is exact. A page computed behind a lossy prefix inherits the prefix's fidelity.
    """

    EXACT = 0
    INT8 = 1
    INT4 = 2
