"""Which rules can ever act, from a base configuration within the bounds; for checks of a manifest.

A rule acts only where its knob has room. The values that a knob can take begin at its base value, and grow
with every rule that can act: at a bound a rule is dead only where no other one leads its knob away again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from kvpilot_engine.contract.config import CacheStrategy
from kvpilot_engine.contract.knobs import COMPRESSION_LEVELS, compression_level
from kvpilot_operator.tuning.configuration import KNOBS, value
from kvpilot_operator.tuning.context import format_value
from kvpilot_operator.tuning.policy import KnobBounds, Policy
from kvpilot_operator.tuning.rules.order import Remedy
from kvpilot_operator.tuning.rules.signals import Move, down, up

LEVELS = tuple(level.kept for level in reversed(COMPRESSION_LEVELS))
"""Values of ``compressionRatio`` that rules choose, ascending."""


@dataclass(frozen=True)
class Obstacle:
    """Why a rule cannot act at the base values.

    Attributes:
        field: of the resource, in which it lies.
        knobs: those whose values are in the way; () for an objective.
        message: the value that is in the way, and what would let the rule act.
        asked: it follows from what somebody asks for.
        ends: moves of other rules, each of which can end it.
        after: rules that can act and make such a move; () if there is none, so that the rule never acts.
    """

    field: str
    knobs: tuple[str, ...]
    message: str
    asked: bool = False
    ends: tuple[Move, ...] = ()
    after: tuple[str, ...] = ()


def stuck(bounds: KnobBounds | None, move: Move) -> str | None:
    """Why a knob cannot be moved that way, whatever its value; None if it can."""
    if bounds is None or not bounds.tune:
        return "is excluded from tuning"
    if bounds.minimum is not None and bounds.minimum == bounds.maximum:
        return f"has min and max {bounds.minimum:g}"
    if bounds.direction == ("DownOnly" if move.way == "up" else "UpOnly"):
        return f"has direction {bounds.direction}"
    return None


def obstacles(
    rules: Iterable[Remedy],
    base: Mapping[str, Any],
    policy: Policy,
    limits: Mapping[str, tuple[float, float]],
) -> dict[str, Obstacle]:
    """What keeps rules from acting at the base values, by the name of the rule.

    Args:
        rules: those that change knobs and are not disabled.
        base: the user's values (camelCase).
        limits: the least and the largest value of each knob that an engine accepts.
    """
    reach, waiting, acting = _Reach(base, policy, limits), list(rules), list[Remedy]()
    found: dict[str, Obstacle] = {}
    while True:
        now = {rule.name: reach.obstacle(rule) for rule in waiting}
        found = {**{name: item for name, item in now.items() if item is not None}, **found}
        free = [rule for rule in waiting if now[rule.name] is None]
        if not free:
            break
        reach.extend(move for rule in free for move in rule.moves)
        acting += free
        waiting = [rule for rule in waiting if rule not in free]
    return {
        rule.name: reach.ended(found[rule.name], acting) if rule in acting else found[rule.name]
        for rule in (*acting, *waiting)
        if rule.name in found
    }


class _Reach:
    """The least and the largest value that each knob can take; a flag is 0 or 1, adaptive eviction is 1."""

    def __init__(
        self, base: Mapping[str, Any], policy: Policy, limits: Mapping[str, tuple[float, float]]
    ) -> None:
        self._base, self._policy, self._limits = base, policy, limits
        self._spans = {knob: (at, at) for knob in KNOBS for at in [_position(base, knob)]}

    def extend(self, moves: Iterable[Move]) -> None:
        """Let knobs be moved that far."""
        for move in moves:
            if not self._stuck(move):
                (low, high), (least, most) = self._spans[move.knob], self._edges(move.knob)
                span = (low, max(high, most)) if move.way == "up" else (min(low, least), high)
                self._spans[move.knob] = span

    def ended(self, obstacle: Obstacle, acting: Iterable[Remedy]) -> Obstacle:
        """An obstacle with the rules and the moves that do end it."""
        ends = tuple(move for move in obstacle.ends if not self._stuck(move))
        after = tuple(rule for rule in acting if not set(ends).isdisjoint(rule.moves))
        made = tuple(move for move in ends if any(move in rule.moves for rule in after))
        return replace(obstacle, ends=made, after=tuple(rule.name for rule in after))

    def obstacle(self, rule: Remedy) -> Obstacle | None:
        """The first thing that keeps a rule from acting."""
        if rule.needs and not self._high(rule.needs):
            return _by_base((rule.needs,), "is 0 and stays so", up(rule.needs), asked=True)
        moves = rule.moves if rule.any_knob else rule.moves[:1]
        fixed = [self._stuck(move) for move in moves]
        switches_off = bool(rule.switch) and down(rule.switch)[0] in rule.moves
        if switches_off and fixed[0] and not self._at_least(moves[0].knob):
            moves, fixed = moves[:1], fixed[:1]
        if all(fixed):
            message = "; ".join(f"{move.knob} {why}" for move, why in zip(moves, fixed, strict=True))
            excluded = all(not self._policy.bounds[move.knob].tune for move in moves)
            return Obstacle("spec.tuning.knobs", tuple(m.knob for m in moves), message, asked=excluded)
        if rule.cures == ("misses",) and not self._policy.objectives.hit_rate:
            message = "0% asks for no hit rate; any above lets it act"
            return Obstacle("spec.objectives.hitRate", (), message, asked=True)
        if rule.switch and not self._high(rule.switch):
            return self._switched_off(rule)
        free = tuple(move for move, why in zip(moves, fixed, strict=True) if not why)
        return self._without_room(free) or self._overtaken(rule)

    def _switched_off(self, rule: Remedy) -> Obstacle | None:
        """A flag is off that the rule needs and cannot turn on."""
        on = Move(rule.switch, "up")
        if on in rule.moves and not self._stuck(on):
            return None
        excluded = not self._policy.bounds[rule.switch].tune
        why = "excluded from tuning" if excluded else "nothing turns it on"
        return _by_base((rule.switch,), f"is false, and {why}; true lets it act", (on,), asked=excluded)

    def _without_room(self, moves: tuple[Move, ...]) -> Obstacle | None:
        """All knobs stand where the rule leads them."""
        if any(self._has_room(move) for move in moves):
            return None
        names = tuple(move.knob for move in moves)
        if names == ("cacheStrategy",):
            return _by_base(names, _strategy_text(value(self._base, "cacheStrategy")), (), asked=True)
        texts = (f"{move.knob} {self._bound_text(move)}" for move in moves)
        return _by_base(
            names, "; ".join(texts).removeprefix(f"{names[0]} "), tuple(m.opposite for m in moves)
        )

    def _overtaken(self, rule: Remedy) -> Obstacle | None:
        """More of its knob would only wait for another one, which cannot go along."""
        along = Move(rule.within, "up")
        goes_along = along in rule.moves and not self._stuck(along) and self._has_room(along)
        if not rule.within or goes_along or self._spans[rule.knobs[0]][0] < self._high(rule.within):
            return None
        now, other = (value(self._base, knob) for knob in (rule.knobs[0], rule.within))
        message = (
            f"is {now}, and more would wait for {rule.within} {other}; a larger {rule.within} lets it act"
        )
        return _by_base((rule.knobs[0], rule.within), message, (along, *down(rule.knobs[0])))

    def _stuck(self, move: Move) -> str | None:
        return stuck(self._policy.bounds.get(move.knob), move)

    def _has_room(self, move: Move) -> bool:
        (low, high), (least, most) = self._spans[move.knob], self._edges(move.knob)
        if move.knob == "compressionRatio":
            return any(
                least <= after <= most for at in LEVELS if low <= at <= high for after in _next(at, move)
            )
        return low < most if move.way == "up" else high > least

    def _bound_text(self, move: Move) -> str:
        """Where a knob without room stands, and what would give it room."""
        now, rising = value(self._base, move.knob), move.way == "up"
        least, most = self._edges(move.knob)
        back = "lower" if rising else "higher"
        if move.knob == "compressionRatio":
            following = _next(_position(self._base, move.knob), move)
            if following:
                outside = f"the next level {following[0]:g} is outside of {least:g} to {most:g}"
                return f"is {now:g}, and {outside}; wider bounds let it act"
            return (
                f"is {now:g}, and no level is {'higher' if rising else 'lower'}; a {back} value lets it act"
            )
        edge, limit = ("max", self._limits[move.knob][1]) if rising else ("min", self._limits[move.knob][0])
        wider = "" if limit == (most if rising else least) else f"{edge} {limit:g} or "
        return f"is {format_value(now)}, its {edge}; {wider}a {back} value lets it act"

    def _at_least(self, knob: str) -> bool:
        """True if a tuned knob stands at its least value: then a rule may switch off what it sizes."""
        return self._policy.bounds[knob].tune and self._spans[knob][0] <= self._edges(knob)[0]

    def _high(self, knob: str) -> float:
        return self._spans[knob][1]

    def _edges(self, knob: str) -> tuple[float, float]:
        """Inclusive bounds of the tuner."""
        known = self._policy.bounds[knob]
        return (
            0.0 if known.minimum is None else known.minimum,
            1.0 if known.maximum is None else known.maximum,
        )


def _position(base: Mapping[str, Any], knob: str) -> float:
    """The base value of a knob as a number; no budget is without end."""
    given = value(base, knob)
    if knob == "compressionRatio":
        return compression_level(value(base, "useCompression"), given).kept
    if knob == "cacheStrategy":
        return float(CacheStrategy(given).runs_as is CacheStrategy.ADAPTIVE.runs_as)
    return inf if given is None else float(given)


def _next(at: float, move: Move) -> tuple[float, ...]:
    """The next compression level in the way of a move; () at the end."""
    ahead = [kept for kept in LEVELS if (kept > at if move.way == "up" else kept < at)]
    return tuple(ahead[:1] if move.way == "up" else ahead[-1:])


def _strategy_text(strategy: str) -> str:
    runs = CacheStrategy.ADAPTIVE.runs_as
    others = " or ".join(item for item in CacheStrategy if item.runs_as is not runs)
    said = f"which runs as {runs}" if strategy == CacheStrategy.ADAPTIVE else "and adaptive runs as that"
    return f"is {strategy}, {said} so far; {others} lets it act"


def _by_base(
    knobs: tuple[str, ...], message: str, ends: tuple[Move, ...], *, asked: bool = False
) -> Obstacle:
    """An obstacle in a base value; ``message`` follows the name of the first knob."""
    return Obstacle(f"spec.engine.config.{knobs[0]}", knobs, f"{knobs[0]} {message}", asked, ends)
