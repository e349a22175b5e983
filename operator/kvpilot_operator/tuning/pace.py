"""The one table of durations, by ``tuning.pace``."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

PaceName = Literal["Fast", "Standard"]


@dataclass(frozen=True)
class Pace:
    """Durations of the control loop, s; request minimums are counts and never scale.

    Attributes:
        scrape, tick: between two scrapes and two decisions.
        short, long: the two windows that must both show a breach.
        settle: after a push, before its effect is judged.
        verify: shortest time over which both arms are compared.
        cooldown: after a change, before the next one.
        requests_per_arm: least judged requests of each arm in a verdict.
        idle: time without saturation before a scale-in.
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
        scrape=1, tick=2, short=10, long=60, settle=15, verify=45, cooldown=30, requests_per_arm=100, idle=120
    ),
    "Standard": Pace(
        scrape=15, tick=15, short=60, long=300, settle=120, verify=600, cooldown=600, requests_per_arm=300,
        idle=1800,
    ),
}  # fmt: skip
