"""`kvpilot explain --why-not`: every reason why a knob stays as it is, as a sentence, the strongest first."""

from __future__ import annotations

from typing import Any

import pytest

from kvpilot_operator.resource.times import from_rfc3339
from kvpilot_operator.status.history import history_of
from kvpilot_operator.status.model import Status
from kvpilot_operator.status.overrides import overrides_of
from kvpilot_operator.status.why_not import MAX_LINES, known_of, why_not

NOW = from_rfc3339("2026-11-22T10:00:00Z")
LATE = "2026-11-22T11:00:00Z"
BREACHED = [{"name": "p95", "state": "Breached", "since": "2026-11-22T09:30:00Z"}]


def answer(
    knob: str = "numWorkers",
    *,
    tuning: dict[str, Any] | None = None,
    status: dict[str, Any] | None = None,
    records: list[dict[str, Any]] | None = None,
    overrides: list[dict[str, Any]] | None = None,
    config: dict[str, Any] | None = None,
    held: dict[str, Any] | None = None,
) -> list[str]:
    manifest = {
        "apiVersion": "kvpilot.io/v1alpha1",
        "kind": "KVCacheDeployment",
        "metadata": {"name": "chat", "namespace": "default"},
        "spec": {
            "scaling": {"min": 1, "max": 4},
            "engine": {"config": config or {"numWorkers": 8}},
            "tuning": tuning or {},
        },
        "status": {"objectives": BREACHED, "tuning": {"state": "Observe", **(held or {})}, **(status or {})},
    }
    typed = Status.model_validate(manifest["status"])
    asked = overrides_of(overrides or [], "chat", manifest, NOW)
    known = known_of(manifest, typed, history_of(typed, records or []), asked, NOW)
    return why_not(known, knob)


def override(name: str, **what: Any) -> dict[str, Any]:
    return {
        "apiVersion": "kvpilot.io/v1alpha1",
        "kind": "KVCacheOverride",
        "metadata": {"name": name, "creationTimestamp": "2026-11-22T09:00:00Z"},
        "spec": {"target": "chat", "expiresAt": LATE, **what},
    }


@pytest.mark.parametrize(
    ("knob", "said"),
    [
        ("prefetchSize", ("raises it against tier load", "lowers it against wasted prefetches")),
        ("enablePrefetch", ("turns it on against tier load", "turns it off against wasted prefetches")),
    ],
)
def test_a_rule_that_had_no_reason_says_what_it_would_do(knob: str, said: tuple[str, str]) -> None:
    up, down = said
    assert answer(knob)[-2:] == [
        f"Rule prefetch-up {up}; it had no reason to so far.",
        f"Rule prefetch-down {down}; it had no reason to so far.",
    ]


def test_value_and_its_origin_come_first() -> None:
    overlay = [{"knob": "numWorkers", "basedOn": "8", "value": "16", "decision": "d-0003"}]
    assert answer()[0] == "numWorkers is 8, as the spec says."
    assert answer("batchSize")[0] == "batchSize is 1, the default."
    assert answer(status={"config": {"overlay": overlay}})[0] == (
        "numWorkers is 16; d-0003 set it, the spec has it 8."
    )
    overlay += [{"knob": "numWorkers", "basedOn": "8", "value": "12", "decision": "pin:keep"}]
    assert answer(status={"config": {"overlay": overlay}})[0] == (
        "numWorkers is 12 by a pin; without it, it is 16."
    )


def test_a_rule_that_lacks_a_metric_says_which() -> None:
    message = "Not every engine exports kvpilot_prefetch_blocks_total. Without it stand aside: x."
    trusted = {
        "type": "MetricsTrusted",
        "status": "True",
        "reason": "MetricAbsent",
        "message": message,
        "lastTransitionTime": LATE,
    }
    aside = "stands aside, since not every engine exports kvpilot_prefetch_blocks_total."
    said = answer("prefetchSize", status={"conditions": [trusted]})
    assert {f"Rule prefetch-up {aside}", f"Rule prefetch-down {aside}"} <= set(said)
    assert not any("stands aside" in line for line in answer("numWorkers", status={"conditions": [trusted]}))
    assert not any("stands aside" in line for line in answer("prefetchSize"))


CHANGE = {
    "id": "d-0042",
    "rule": "workers-up",
    "values": [{"knob": "numWorkers", "from": "8", "to": "16"}],
    "epoch": 1,
    "generation": 2,
    "startedAt": "2026-11-22T09:50:00Z",
    "phaseSince": "2026-11-22T09:50:00Z",
    "canary": {"name": "chat-0", "uid": "u"},
    "objective": "p95",
}
PENDING = {**CHANGE, "since": "2026-11-22T09:50:00Z", "expires": LATE}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"held": {"change": CHANGE}},
            "It is being changed right now: d-0042 tries 8 -> 16 on chat-0, for p95.",
        ),
        (
            {"held": {"pending": [PENDING]}},
            f"A change to 16 waits for an approval until {LATE}: kvpilot approve chat d-0042.",
        ),
        (
            {"knob": "batchSize", "held": {"change": CHANGE}},
            "One change at a time: d-0042 tries numWorkers first.",
        ),
        ({"tuning": {"mode": "Off"}}, "spec.tuning.mode is Off: kvpilot only measures."),
        (
            {"tuning": {"mode": "Recommend"}},
            "spec.tuning.mode is Recommend: kvpilot recommends changes and makes none.",
        ),
        (
            {"tuning": {"mode": "Approve"}},
            "spec.tuning.mode is Approve: a change of it waits until somebody approves it.",
        ),
        (
            {"overrides": [override("keep", pin={"knob": "numWorkers", "value": 4})]},
            f"Override keep pins it to 4 until {LATE}; kvpilot unpin ends that.",
        ),
        (
            {"overrides": [override("stop", pause={})]},
            "Tuning is paused by override stop; kvpilot resume ends that.",
        ),
        (
            {"tuning": {"knobs": [{"name": "numWorkers", "tune": False}]}},
            "spec.tuning.knobs says tune: false, which keeps kvpilot's hands off it.",
        ),
        (
            {"tuning": {"knobs": [{"name": "numWorkers", "direction": "DownOnly"}]}},
            "spec.tuning.knobs lets it go down only.",
        ),
        (
            {
                "tuning": {"knobs": [{"name": "numWorkers", "min": 2, "max": 16}]},
                "status": {"config": {"effective": {"numWorkers": 16}}},
            },
            "It is at its upper bound of 16, so it can only go down; spec.tuning.knobs can allow more.",
        ),
        (
            {"held": {"holds": [{"reason": "MetricsStale", "since": "2026-11-22T09:40:00Z"}]}},
            "Nothing has begun since 2026-11-22T09:40:00Z: The metrics of a ready replica are older than 3 "
            "scrapes (MetricsStale).",
        ),
        (
            {"held": {"state": "Cooldown", "cooldownUntil": LATE}},
            f"The last change ended a short while ago; the next one may begin at {LATE}.",
        ),
        (
            {
                "held": {
                    "reversals": [
                        {"knob": "numWorkers", "at": "2026-11-22T05:00:00Z"},
                        {"knob": "numWorkers", "at": "2026-11-22T09:00:00Z"},
                        {"knob": "numWorkers", "at": "2026-11-22T01:00:00Z"},
                    ]
                }
            },
            "It was changed and taken back 2 times in six hours, as often as is allowed; it is free again at "
            "2026-11-22T11:00:00Z.",
        ),
        (
            {"held": {"blockedValues": [{"knob": "numWorkers", "value": "16", "until": LATE}]}},
            "The value 16 did harm, did not help enough, or was rolled back; it is not tried again before "
            f"{LATE}.",
        ),
        (
            {"status": {"objectives": []}},
            "No objective is breached, so there is nothing that it should cure.",
        ),
        (
            {"status": {"objectives": [{**BREACHED[0], "state": "Infeasible"}]}},
            "What is missed is out of reach, so no knob is moved for it: p95.",
        ),
        ({}, "Nothing stands in its way, but no rule sees it as the cure of p95 at the moment."),
        (
            {"tuning": {"disabledRules": ["workers-up"]}},
            "Rule workers-up would change it, and spec.tuning.disabledRules leaves it out.",
        ),
        (
            {"config": {"numWorkers": 500}},
            "The present spec is invalid, and the last valid one is in force: spec.engine.config.numWorkers: "
            "Input should be less than or equal to 128, got 500.",
        ),
    ],
)
def test_each_reason_is_a_sentence(given: dict[str, Any], sentence: str) -> None:
    assert sentence in answer(**given)


def record(**changes: Any) -> dict[str, Any]:
    return {
        "id": "d-0007",
        "at": NOW - 60,
        "rule": "batch-up",
        "outcome": "Started",
        "summary": "x",
        **changes,
    }


def test_each_rule_says_what_it_said_last() -> None:
    rejected = [{"rule": "workers-up", "reason": "DeviceSaturated", "message": "steps take 95%"}]
    assert (
        "Rule workers-up stood back when d-0007 was decided at 2026-11-22T09:59:00Z: steps take 95%."
    ) in answer(records=[record(rejected=rejected)])
    assert "Rule workers-up last acted at 2026-11-22T09:59:00Z (d-0007): numWorkers 4 -> 8." in answer(
        records=[record(rule="workers-up", summary="numWorkers 4 -> 8")]
    )


def test_what_is_being_changed_needs_no_further_reason() -> None:
    assert len(answer(held={"change": CHANGE, "cooldownUntil": LATE})) == 2


def test_answer_is_never_longer_than_a_screen() -> None:
    blocked = [{"knob": "numWorkers", "value": str(n), "until": LATE} for n in range(16, 32)]
    holds = [{"reason": f"R{n}", "message": "m", "since": LATE} for n in range(5)]
    lines = answer(held={"blockedValues": blocked, "holds": holds})
    assert len(lines) == MAX_LINES
    assert lines[-1].startswith("There are ")


def test_unknown_knob_names_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="there is no knob workers; there are: numWorkers, "):
        answer("workers")
