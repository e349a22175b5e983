"""KVCacheOverride as people write it: exactly one request, an end, and values that an engine accepts."""

from __future__ import annotations

import re
from typing import Any

import pytest

from kvpilot_operator.resource import KVCacheOverride, ManifestError
from kvpilot_operator.resource.override import allowed_values, knob_value
from kvpilot_operator.tuning.configuration import KNOBS

ONE = "exactly one of pause, approve, pin, boost, rollback is required"


def override(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "kvpilot.io/v1alpha1",
        "kind": "KVCacheOverride",
        "metadata": {"generateName": "chat-pause-"},
        "spec": {"target": "chat", "expiresAt": "2026-11-22T12:00:00Z", **spec},
    }


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("pause", {}),
        ("pause", {"scaling": True}),
        ("approve", {"decision": "d-0042"}),
        ("pin", {"knob": "numWorkers", "value": 16}),
        ("boost", {"minReplicas": 3}),
        ("rollback", {"to": 5}),
    ],
)
def test_an_override_asks_for_one_thing(kind: str, what: dict[str, Any]) -> None:
    assert KVCacheOverride.parse(override(**{kind: what})).spec.kind == kind


def test_an_override_that_asks_for_none_or_for_two_is_refused() -> None:
    for spec in ({}, {"pause": {}, "boost": {"minReplicas": 3}}):
        with pytest.raises(ManifestError, match=f"spec: {ONE}"):
            KVCacheOverride.parse(override(**spec))
    with pytest.raises(ManifestError, match=r"spec\.expiresAt: Input should have timezone info"):
        KVCacheOverride.parse(override(pause={}, expiresAt="2026-11-22T12:00:00"))


def test_override_ends_at_a_time_or_after_a_duration() -> None:
    assert KVCacheOverride.parse(override(pause={}, expiresAt=None, ttl="1h30m")).spec.ttl == "1h30m"
    for spec in ({"expiresAt": None}, {"ttl": "1h"}):
        with pytest.raises(ManifestError, match="spec: exactly one of ttl and expiresAt is required"):
            KVCacheOverride.parse(override(pause={}, **spec))
    for ttl in ("", "1", "1d", "-1h", "1.5h"):
        with pytest.raises(ManifestError, match=r"spec\.ttl: "):
            KVCacheOverride.parse(override(pause={}, expiresAt=None, ttl=ttl))


@pytest.mark.parametrize(
    ("knob", "value", "line"),
    [
        ("numWorkers", 500, "spec.pin.value: numWorkers must be a whole number from 1 to 128, got 500"),
        ("numWorkers", "many", "numWorkers must be a whole number from 1 to 128, got 'many'"),
        ("numWorkers", 1.5, "numWorkers must be a whole number from 1 to 128, got 1.5"),
        ("maxMemoryMb", None, "maxMemoryMb must be a whole number from 100 to 16777216, got None"),
        ("enablePrefetch", 1, "enablePrefetch must be true or false, got 1"),
        ("cacheStrategy", "random", "cacheStrategy must be one of lru, lfu, fifo, adaptive, got 'random'"),
        (
            "compressionRatio",
            0.555,
            "compressionRatio must be a number above 0 and at most 1 in steps of 0.01, got 0.555",
        ),
        (
            "useQuantization",
            True,
            f"spec.pin.knob: must be one of the knobs {', '.join(KNOBS)}; useQuantization is none, and only "
            "spec.engine.config sets it, got 'useQuantization'",
        ),
        ("maxQueue", 8, "; maxQueue is none, and only spec.engine.config sets it, got 'maxQueue'"),
        ("workers", 4, "spec.pin.knob: must be one of the knobs numWorkers, "),
    ],
)
def test_pin_that_no_engine_takes_is_refused_in_one_line(knob: str, value: Any, line: str) -> None:
    with pytest.raises(ManifestError, match=re.escape(line)) as caught:
        KVCacheOverride.parse(override(pin={"knob": knob, "value": value}))
    assert len(caught.value.lines) == 1


def test_pinned_value_is_written_as_the_configuration_writes_it() -> None:
    assert knob_value("cacheStrategy", "LRU") == "lru"
    assert knob_value("compressionRatio", 1) == 1.0
    assert knob_value("enablePrefetch", False) is False


def test_every_knob_that_may_be_pinned_says_what_it_allows() -> None:
    assert all(allowed_values(name) for name in KNOBS)


@pytest.mark.parametrize("what", [{"approve": {"decision": "42"}}, {"rollback": {"to": 0}}])
def test_decision_and_generation_have_a_form(what: dict[str, Any]) -> None:
    with pytest.raises(ManifestError, match=r"spec\.(approve\.decision|rollback\.to): "):
        KVCacheOverride.parse(override(**what))
