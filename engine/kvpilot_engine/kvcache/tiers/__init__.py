"""Tiers below the device pool: the ``Tier`` protocol, its implementations, codecs and transfer."""

from __future__ import annotations

from collections.abc import Callable

from kvpilot_engine.kvcache.tiers.base import Tier
from kvpilot_engine.kvcache.tiers.host import HostTier

TIERS: tuple[Callable[[], Tier], ...] = (
    HostTier,
)  # fmt: skip
"""Every tier, fastest first. A new tier is one module and one line here."""
