"""The one table of durations, by ``tuning.pace``."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

PaceName = Literal["Fast", "Standard"]


MIN_SCRAPES = 4
"""Scrapes that a window holds at least; with fewer, increases are wrong or empty."""

MAX_SCRAPE_S = 60.0
"""A source that scrapes more seldom is no basis for decisions."""


@dataclass(frozen=True)
class Pace:
    """Durations of tuning, s; request minimums are counts and never scale.

    Attributes:
        scrape, tick: interval of scrapes, and of reconciles.
        short, long: the two windows that must both show a breach.
        settle: after a push, before its effect is judged.
        verify: shortest time over which both arms are compared.
        cooldown: after a change, before the next one.
        requests_per_arm: judged requests that each arm needs for a verdict.
        idle: look-back of a scale-in: the highest need within it counts.
        takeover: after another field manager wrote the replicas, before kvpilot takes them over.
    """

    scrape: float
    tick: float
    short: float
    long: float
    settle: float
    verify: float
    cooldown: float
    requests_per_arm: int
    idle: float
    takeover: float

    def fitted(self, scrape_s: float) -> Pace:
        """The pace for a source that scrapes every ``scrape_s``: all durations longer, if it is too slow."""
        if scrape_s <= self.scrape:
            return self
        least = MIN_SCRAPES * scrape_s
        found = self.scaled(max(1.0, least / self.short))
        return replace(found, scrape=scrape_s, short=max(found.short, least))  # not below it by rounding

    def scaled(self, factor: float) -> Pace:
        """All durations times ``factor``; the scrape interval belongs to the source and stays."""
        durations = {
            field.name: getattr(self, field.name) * factor
            for field in fields(self)
            if field.name not in {"requests_per_arm", "scrape"}
        }
        return replace(self, **durations)


PACES: dict[PaceName, Pace] = {
    "Fast": Pace(
        scrape=1, tick=2, short=10, long=60, settle=15, verify=45, cooldown=30, requests_per_arm=100,
        idle=60, takeover=600,
    ),
    "Standard": Pace(
        scrape=15, tick=15, short=60, long=300, settle=120, verify=600, cooldown=600, requests_per_arm=300,
        idle=300, takeover=600,
    ),
}  # fmt: skip
