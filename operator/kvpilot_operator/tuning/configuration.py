"""Arithmetic of configurations: base, overlay, candidates, and what to push to an engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvpilot_engine.contract import CATALOGUE, KVCacheConfig
from kvpilot_engine.contract.config import COLD_FIELDS, LENGTH_FIELDS, QUIET
from kvpilot_operator.tuning.observation import EngineView
from kvpilot_operator.tuning.policy import KnobBounds
from kvpilot_operator.tuning.state import KnobChange, OverlayEntry

DEFAULTS: Mapping[str, Any] = KVCacheConfig.model_validate({}, context=QUIET).model_dump(
    by_alias=True, mode="json"
)
"""Default of every field (camelCase)."""

KNOBS: tuple[str, ...] = tuple(knob.resource_name for knob in CATALOGUE)
"""The knobs of the catalogue (camelCase)."""

HOT_FIELDS: frozenset[str] = frozenset(
    info.alias or name for name, info in KVCacheConfig.model_fields.items() if name not in COLD_FIELDS
)
"""Every field that takes effect without a restart (camelCase)."""

LIMITS_LENGTH: frozenset[str] = frozenset(
    info.alias or name for name, info in KVCacheConfig.model_fields.items() if name in LENGTH_FIELDS
)
"""Fields whose change can make requests too large (camelCase)."""


def value(config: Mapping[str, Any], name: str) -> Any:
    """The value of a field (camelCase), or its default."""
    return config.get(name, DEFAULTS[name])


def effective(base: Mapping[str, Any], overlay: Iterable[OverlayEntry]) -> dict[str, Any]:
    """The user's base with the tuned knobs over it."""
    return {**base, **{entry.knob: entry.value for entry in overlay}}


def with_cold(config: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the user's values of fields that need a restart: what the next pod starts with."""
    hot = {name: item for name, item in config.items() if name in HOT_FIELDS}
    return {**hot, **{name: item for name, item in base.items() if name not in HOT_FIELDS}}


def candidate(config: Mapping[str, Any], changes: Iterable[KnobChange]) -> dict[str, Any]:
    """``config`` with a change made."""
    return {**config, **{change.knob: change.after for change in changes}}


def kept_overlay(
    base: Mapping[str, Any], overlay: Iterable[OverlayEntry], bounds: Mapping[str, KnobBounds]
) -> tuple[tuple[OverlayEntry, ...], tuple[OverlayEntry, ...]]:
    """Entries that stay, and those that the user's edit drops: another base value, or other bounds.

    A pin stays: it holds whatever the base is.
    """
    entries = tuple(overlay)
    kept = tuple(
        entry
        for entry in entries
        if entry.pinned
        or (base.get(entry.knob) == entry.based_on and within(bounds.get(entry.knob), entry.value))
    )
    return kept, tuple(entry for entry in entries if entry not in kept)


def within(bounds: KnobBounds | None, item: Any) -> bool:
    """True if the bounds allow a value; flags and choices have no order."""
    if bounds is None or isinstance(item, bool) or not isinstance(item, int | float):
        return True
    low = bounds.minimum if bounds.minimum is not None else item
    high = bounds.maximum if bounds.maximum is not None else item
    return low <= item <= high


def overlay_with(
    base: Mapping[str, Any], overlay: Iterable[OverlayEntry], changes: Iterable[KnobChange], decision: str
) -> tuple[OverlayEntry, ...]:
    """The overlay after a promotion. A knob that has the user's value again leaves it."""
    given = tuple(overlay)
    entries = {entry.knob: entry for entry in given if not entry.pinned}
    for change in changes:
        entries[change.knob] = OverlayEntry(change.knob, base.get(change.knob), change.after, decision)
    tuned = (e for e in entries.values() if e.knob not in base or base[e.knob] != e.value)
    return (*tuned, *(entry for entry in given if entry.pinned))


def overlay_between(base: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[OverlayEntry, ...]:
    """The overlay that a lost status held, for knobs only: other differences are the user's edit."""
    return tuple(
        OverlayEntry(name, base.get(name), config[name], "")
        for name in KNOBS
        if name in config and config[name] != base.get(name)
    )


def is_valid(config: Mapping[str, Any]) -> bool:
    """True if an engine would accept the configuration."""
    try:
        KVCacheConfig.model_validate(dict(config), context=QUIET)
    except ValueError:
        return False
    return True


def runs(engine: EngineView, generation: int, config: Mapping[str, Any]) -> bool:
    """True if an engine runs that configuration, as far as it can without a restart."""
    return engine.generation == generation and all(
        value(engine.config, name) == config[name] for name in KNOBS if name in config
    )


def to_push(engine: EngineView, config: Mapping[str, Any]) -> dict[str, Any]:
    """What to push: the whole configuration, and the default of hot fields that it no longer contains.

    Fields that need a restart are pushed as the engine has them: they take effect at the next start of the
    pod, and must not make the engine refuse the others.
    """
    gone = {
        name: DEFAULTS[name]
        for name in HOT_FIELDS
        if name not in config and value(engine.config, name) != DEFAULTS[name]
    }
    given = {
        name: item
        for name, item in config.items()
        if name in HOT_FIELDS or value(engine.config, name) == item
    }
    return {**given, **gone}
