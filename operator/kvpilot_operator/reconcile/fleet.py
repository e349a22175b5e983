"""Limits over all resources of one operator: changes at a time, rules that did harm, the kill switch.

The state lives in this process. ``rebuild`` makes it anew from the statuses, so a restart forgets nothing
that counts. A slot is taken when a change is decided, before its status is written, and freed when it ends.
"""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable

from kvpilot_operator.status.model import Status
from kvpilot_operator.status.snapshot import Key
from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.context import at_text
from kvpilot_operator.tuning.decision import Decision
from kvpilot_operator.tuning.observation import FleetLimits
from kvpilot_operator.tuning.state import TuningState

SHARE = 0.05
"""At most max(1, SHARE) of the resources are in a change, and act by new rules after an upgrade."""

HARMS, HOUR_S = 3, 3600.0
"""So many harmful changes of one rule within an hour send the rule to Recommend for an hour, s."""


class Fleet:
    """What the other resources permit each one to do.

    Args:
        clock: seconds since the epoch.
        pace_scale: factor on the hour, for tests.
        rules: digest of the running rules.
    """

    def __init__(
        self, clock: Callable[[], float] = time.time, *, pace_scale: float = 1.0, rules: str | None = None
    ) -> None:
        self._clock = clock
        self._hour = HOUR_S * pace_scale
        self._rules = running_rules() if rules is None else rules
        self._known: set[Key] = set()
        self._changing: set[Key] = set()
        self._harms: dict[tuple[Key, str], tuple[str, float]] = {}
        self._upgraded_at: float | None = None
        self.off = ""
        """Why tuning is switched off; "" while it is on."""

    def rebuild(self, statuses: Mapping[Key, Status]) -> None:
        """Take over what the statuses of all resources show; resources that are gone free their slots."""
        self._known = set(statuses)
        self._changing &= self._known
        for key, status in statuses.items():
            if status.tuning is not None and status.tuning.change is not None:
                self._changing.add(key)
            for item in status.decisions:
                if item.outcome == "Reverted" and item.verdict == reasons.HARMFUL:
                    self._harms[key, item.id] = (item.rule, item.at)

    def limits(self, key: Key, state: TuningState) -> FleetLimits:
        """What this resource may do now, given the state that its status holds."""
        self._known.add(key)
        now = self._clock()
        if state.rules_hash not in {"", self._rules} and self._upgraded_at is None:
            self._upgraded_at = now
        waits = self._trial(key, now) or self._slots(key)
        return FleetLimits(
            off=self.off,
            waits=waits,
            recommend_only=self.recommend_only(),
            rules_hash="" if waits is not None and waits[0] == reasons.UPGRADE_TRIAL else self._rules,
        )

    def note(self, key: Key, decision: Decision) -> tuple[str, ...]:
        """Take or free the slot of a resource; returns rules that are only recommended from now on."""
        before = self.recommend_only()
        if decision.state.change is not None:
            self._changing.add(key)
        else:
            self._changing.discard(key)
        for record in decision.records:
            if record.outcome == "Reverted" and record.evidence.get("verdict") == reasons.HARMFUL:
                self._harms[key, record.id] = (record.rule, record.at)
        return tuple(sorted(self.recommend_only() - before))

    def forget(self, key: Key) -> None:
        """A resource was deleted: free its slot. What its changes did still counts."""
        self._known.discard(key)
        self._changing.discard(key)

    def recommend_only(self) -> frozenset[str]:
        """Rules that did harm too often: they are only recommended for an hour."""
        now = self._clock()
        self._harms = {k: harm for k, harm in self._harms.items() if harm[1] > now - 2 * self._hour}
        times: dict[str, list[float]] = {}
        for rule, at in sorted(self._harms.values(), key=lambda harm: harm[1]):
            times.setdefault(rule, []).append(at)
        return frozenset(rule for rule, found in times.items() if self._blocked(found, now))

    def _blocked(self, times: list[float], now: float) -> bool:
        return any(
            last - first <= self._hour and last > now - self._hour
            for first, last in zip(times, times[HARMS - 1 :], strict=False)
        )

    def _slots(self, key: Key) -> tuple[str, str] | None:
        if len(self._changing - {key}) < self._share():
            return None
        return (
            reasons.FLEET_LIMIT,
            "as many resources of the operator are in a change as may be at a time; this one waits",
        )

    def _trial(self, key: Key, now: float) -> tuple[str, str] | None:
        if self._upgraded_at is None or now >= self._upgraded_at + self._hour:
            return None
        chosen = sorted(self._known, key=lambda one: (zlib.crc32(str(one).encode()), one))[: self._share()]
        if key in chosen:
            return None
        until = at_text(self._upgraded_at + self._hour)
        return (
            reasons.UPGRADE_TRIAL,
            f"an upgrade of the operator changed the rules; until {until} they act on a few resources only",
        )

    def _share(self) -> int:
        return max(1, int(SHARE * len(self._known)))


@cache
def running_rules() -> str:
    """Digest of the source of the tuning core: 8 hexadecimal digits."""
    digest = hashlib.sha256()
    for file in _sources(resources.files("kvpilot_operator.tuning")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def _sources(folder: Traversable) -> list[Traversable]:
    found: list[Traversable] = []
    for item in sorted(folder.iterdir(), key=lambda one: one.name):
        if item.is_dir():
            found += _sources(item)
        elif item.name.endswith(".py"):
            found.append(item)
    return found
