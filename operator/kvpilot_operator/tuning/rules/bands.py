"""Pairs of rules that can undo each other for ever, by what the rules declare; for checks of a manifest.

Two rules that move one knob in opposite ways do not cycle where the values of a signal at which they act are
apart, or where another rule cures the side effect of the one before the other acts on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice, product

from kvpilot_operator.tuning.assess.capacity import USE
from kvpilot_operator.tuning.policy import Policy
from kvpilot_operator.tuning.rules.cache import (
    ACCURATE,
    MAX_MEASURED_MEMORY,
    MAX_PREDICTED_MEMORY,
    WASTED,
)
from kvpilot_operator.tuning.rules.memory import EMERGENCY_MEMORY
from kvpilot_operator.tuning.rules.order import REMEDIES, Remedy
from kvpilot_operator.tuning.rules.signals import Move, Signal

Movable = Callable[[Move], bool]
"""Whether the bounds let a knob be moved that way."""


@dataclass(frozen=True)
class Band:
    """The values of a signal, inclusive, at which a rule acts."""

    rule: str
    signal: str
    low: float
    high: float


@dataclass(frozen=True)
class Cycle:
    """Two rules that can undo each other's move of a knob.

    Attributes:
        move: what the first rule does; the second one does the opposite.
        signals: what each of the two acts on, and what the move of the other one raises.
        cures: rules that would cure what the move raises before the second rule acts, if they could.
        along: moves that would make up for what either of the two raises, if they could.
    """

    move: Move
    rules: tuple[Remedy, Remedy]
    signals: tuple[Signal, Signal]
    cures: tuple[Remedy, ...]
    along: tuple[Move, ...]


def bands(policy: Policy) -> tuple[Band, ...]:
    """What rules decide by besides a stage at fault."""
    memory = policy.objectives.memory
    return (
        # Slots grow once requests queue, and shrink only to what completes the load with room to spare.
        Band("workers-up", "load of a replica", 1.0, math.inf),
        Band("workers-down", "load of a replica", 0.0, USE),
        Band("prefetch-up", "used share of prefetched blocks", ACCURATE, 1.0),
        Band("prefetch-down", "used share of prefetched blocks", 0.0, WASTED),
        Band("memory-emergency", "memory", EMERGENCY_MEMORY, math.inf),
        Band("memory-relief", "memory", memory, math.inf),
        Band("cache-quota-up", "memory", 0.0, MAX_PREDICTED_MEMORY * memory),
        Band("compression-down", "memory", 0.0, MAX_MEASURED_MEMORY * memory),
    )


def cycles(firing: Sequence[Remedy], found: Sequence[Band], movable: Movable) -> Iterator[Cycle]:
    """Pairs that can cycle, once for each knob.

    Args:
        firing: the rules that can fire, in the order of the list.
        found: the bands of the rules.
    """
    for second, first in combinations(firing, 2):
        if _apart(first.name, second.name, found):
            continue
        for move in first.moves:
            back = move.opposite
            if back in second.moves and movable(move) and movable(back):
                yield from islice(_by_signals(firing, found, movable, Pair(first, second, move)), 1)


@dataclass(frozen=True)
class Pair:
    """Two rules, and what the first one does with a knob that the second one moves back."""

    first: Remedy
    second: Remedy
    move: Move


def _by_signals(
    firing: Sequence[Remedy], found: Sequence[Band], movable: Movable, pair: Pair
) -> Iterator[Cycle]:
    """The signals over which two rules cycle."""
    for cured, raised in product(pair.first.cures, pair.second.cures):
        if pair.move.effect(raised) <= 0 or pair.move.opposite.effect(cured) <= 0:
            continue
        along = (*_along(pair.first, raised), *_along(pair.second, cured))
        cures = tuple(
            item for item in REMEDIES if item.urgent and item is not pair.second and raised in item.cures
        )
        before = (item for item in cures if item in firing)
        if any(_acts_in_time(item.name, pair.second.name, raised, found) for item in before):
            continue
        if not any(movable(item) for item in along):
            yield Cycle(pair.move, (pair.first, pair.second), (cured, raised), cures, along)


def _along(rule: Remedy, signal: Signal) -> tuple[Move, ...]:
    """Moves that go along with a rule and make up for what its leading one does to a signal."""
    return () if rule.any_knob else tuple(item for item in rule.moves if item.effect(signal) < 0)


def _apart(one: str, other: str, found: Sequence[Band]) -> bool:
    """True if there is a signal with a gap between the values at which the two act."""
    return any(
        a.signal == b.signal and (a.high < b.low or b.high < a.low)
        for a in found
        for b in found
        if a.rule == one and b.rule == other
    )


def _acts_in_time(one: str, other: str, signal: Signal, found: Sequence[Band]) -> bool:
    """True if a rule acts on a signal no later than another one."""
    lows = {band.rule: band.low for band in found if band.signal == signal}
    return one in lows and other in lows and lows[one] <= lows[other]
