"""Which overrides are in force, which are not, and why."""

from __future__ import annotations

from typing import Any

import pytest

from kvpilot_operator.status.overrides import Overrides, end_of, overrides_of, with_verdict
from kvpilot_operator.tuning.observation import Approval, Boost, Pin, Rollback

NOW = 1_795_399_200.0  # 2026-11-23T02:00:00Z
CHAT: dict[str, Any] = {
    "spec": {"scaling": {"min": 1, "max": 4}, "tuning": {"mode": "Auto"}},
    "status": {"config": {"generation": 7}, "tuning": {"generations": [{"number": 5}, {"number": 7}]}},
}


def override(
    name: str,
    expires: str = "2026-11-23T02:10:00Z",
    target: str = "chat",
    created: str = "2026-11-23T01:00:00Z",
    **what: Any,
) -> dict[str, Any]:
    return {
        "apiVersion": "kvpilot.io/v1alpha1",
        "kind": "KVCacheOverride",
        "metadata": {"name": name, "creationTimestamp": created},
        "spec": {"target": target, "expiresAt": expires, **what},
    }


def asked(*items: dict[str, Any], manifest: dict[str, Any] | None = CHAT) -> Overrides:
    return overrides_of(items, "chat", manifest, NOW)


def test_only_overrides_in_force_of_the_resource_count() -> None:
    going = override("d", boost={"minReplicas": 4})
    going["metadata"]["deletionTimestamp"] = "now"
    found = asked(
        override("c", boost={"minReplicas": 3}),
        override("b", pause={}),
        override("a", "2026-11-23T02:00:00Z", pause={}),
        override("x", target="code", pause={}),
        going,
    )
    assert (found.paused_by, found.scaling_paused, found.names) == ("b", False, ("b", "c"))
    assert found.boosts == (Boost("c", 3, NOW + 600),)
    assert found.refused == (), "expiry is no fault"


def approving(tuning: dict[str, Any], decisions: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    status = {"config": {"generation": 7}, "tuning": tuning, "decisions": [*decisions]}
    return {"spec": {"scaling": {"min": 1, "max": 4}, "tuning": {"mode": "Approve"}}, "status": status}


WITHDRAWN = {"id": "d-0042", "outcome": "Withdrawn", "at": "2026-11-23T01:50:00Z"}


@pytest.mark.parametrize(
    ("manifest", "in_force", "reason", "message"),
    [
        (approving({"pending": [{"id": "d-0042"}]}), True, "InForce", "in force until 2026-11-23T02:10:00Z"),
        (approving({"change": {"id": "d-0042"}}), True, "InForce", "in force until 2026-11-23T02:10:00Z"),
        (
            approving({"handled": ["a"]}),
            True,
            "CarriedOut",
            "the approve is carried out; kvpilot history shows it",
        ),
        (
            approving({"pending": [{"id": "d-0043"}]}),
            False,
            "DecisionNotPending",
            "d-0042 is not pending; pending now: d-0043",
        ),
        (
            approving({}, (WITHDRAWN,)),
            False,
            "DecisionExpired",
            "d-0042 was withdrawn at 2026-11-23T01:50:00Z; pending now: none",
        ),
    ],
)
def test_approval_is_judged_by_what_waits_for_one(
    manifest: dict[str, Any], in_force: bool, reason: str, message: str
) -> None:
    found = asked(override("a", approve={"decision": "d-0042"}), manifest=manifest)
    [verdict] = found.verdicts
    assert (verdict.in_force, verdict.reason, verdict.message) == (in_force, reason, message)
    assert bool(found.approvals) == in_force
    assert bool(found.refused) != in_force
    assert verdict.over == (reason == "CarriedOut")


def test_each_kind_reaches_the_tuner() -> None:
    found = asked(
        override("a", pause={"scaling": True}),
        override("b", approve={"decision": "d-0042"}, by="ana"),
        override("c", pin={"knob": "numWorkers", "value": 16}),
        override("d", rollback={"to": 5}, by="ana"),
        manifest=approving({"pending": [{"id": "d-0042"}], "generations": [{"number": 5}]}),
    )
    assert (found.paused_by, found.scaling_paused) == ("a", True)
    assert found.approvals == (Approval("b", "d-0042", "ana"),)
    assert found.pins == (Pin("c", "numWorkers", 16, NOW + 600),)
    assert found.rollback == Rollback("d", 5, "ana")
    assert [item.reason for item in found.verdicts] == ["InForce"] * 4


@pytest.mark.parametrize(("created", "in_force"), [("01:30:01", True), ("01:30:00", False)])
def test_override_with_a_ttl_is_in_force_that_long_from_its_creation(created: str, in_force: bool) -> None:
    boost = override("a", created=f"2026-11-23T{created}Z", boost={"minReplicas": 3}, ttl="30m")
    del boost["spec"]["expiresAt"]
    assert [boost.expires_at for boost in asked(boost).boosts] == ([NOW + 1] if in_force else [])


@pytest.mark.parametrize(
    "expires", ["0000-01-01T00:00:00Z", "2027-01-01T12:00:00x5Z", "2027-01-01T12:00:00+99:00"]
)
def test_a_time_that_only_the_api_server_reads_has_expired(expires: str) -> None:
    found = asked(override("a", expires, pause={}), override("b", pause={}))
    assert found.names == ("b",)


EARLIER = {"created": "2026-11-23T00:59:00Z"}
PIN_8 = override("old", pin={"knob": "numWorkers", "value": 8}, **EARLIER)


@pytest.mark.parametrize(
    ("items", "reason", "message"),
    [
        (
            [PIN_8, override("new", pin={"knob": "numWorkers", "value": 16})],
            "Contradicts",
            "new is newer and pins numWorkers to 16, not to 8",
        ),
        (
            [override("old", rollback={"to": 8})],
            "NoSuchGeneration",
            "generation 8 is not kept; these are: 5, 7",
        ),
        (
            [override("old", approve={"decision": "d-0042"})],
            "DecisionNotPending",
            "spec.tuning.mode is Auto; only mode Approve waits for an approval",
        ),
        (
            [override("old", pin={"knob": "numWorkers", "value": 500})],
            "Invalid",
            "spec.pin.value: numWorkers must be a whole number from 1 to 128, got 500",
        ),
    ],
)
def test_override_that_is_not_obeyed_says_why_in_one_line(
    items: list[dict[str, Any]], reason: str, message: str
) -> None:
    found = asked(*items)
    assert [(item.name, item.in_force, item.reason, item.message) for item in found.refused] == [
        ("old", False, reason, message)
    ]
    assert "old" not in found.names


def test_way_back_that_was_answered_stays_so_when_its_generation_is_no_longer_kept() -> None:
    answered = {**CHAT, "status": {"tuning": {"handled": ["a"], "generations": [{"number": 12}]}}}
    found = asked(override("a", rollback={"to": 2}), manifest=answered)
    assert (found.rollback, found.refused) == (Rollback("a", 2), ())
    assert found.verdicts[0].reason == "CarriedOut"


def test_pins_to_one_value_do_not_contradict_each_other_and_the_longest_counts() -> None:
    longer = override("new", "2026-11-23T02:20:00Z", pin={"knob": "numWorkers", "value": 8})
    found = asked(PIN_8, longer)
    assert found.pins == (Pin("new", "numWorkers", 8, NOW + 1200),)
    assert (found.names, found.refused) == (("new", "old"), ())


def test_boost_above_the_maximum_is_in_force_up_to_it() -> None:
    found = asked(override("a", boost={"minReplicas": 9}))
    (verdict,) = found.refused
    assert (verdict.in_force, verdict.reason) == (True, "AboveMaximum")
    assert verdict.message == "asks for 9 replicas; spec.scaling.max allows 4, so it gets 4"
    assert found.names == ("a",)


def test_boost_needs_scaling_and_an_override_needs_its_target() -> None:
    boost = override("a", boost={"minReplicas": 2})
    (verdict,) = asked(boost, manifest={"spec": {"replicas": 2}}).refused
    assert (verdict.in_force, verdict.reason) == (False, "ReplicasFixed")
    (verdict,) = asked(boost, manifest=None).refused
    assert verdict.message == "there is no KVCacheDeployment chat in this namespace"


def test_newer_way_back_makes_the_older_one_void_for_ever() -> None:
    items = (
        override("old", rollback={"to": 7}, **EARLIER),
        override("new", rollback={"to": 5}),
    )
    found = asked(*items)
    old, new = found.verdicts
    assert (found.rollback, old.over, new.over) == (Rollback("new", 5), True, False)
    assert end_of(items[0], old) == (
        "Warning",
        "OverrideSuperseded",
        "rollback of chat is void: new is newer and goes back to generation 5",
    )


REFUSAL = "Override a by ana has no effect: the tuned knobs are those of generation 5 already."


@pytest.mark.parametrize(
    ("what", "over"), [({"rollback": {"to": 5}}, True), ({"pin": {"knob": "numWorkers", "value": 8}}, False)]
)
def test_what_the_tuner_refused_is_shown_and_seen_by_it_until_it_ends(
    what: dict[str, Any], over: bool
) -> None:
    decisions = [{"id": "d-0009", "outcome": "Refused", "at": "2026-11-23T01:55:00Z", "summary": REFUSAL}]
    tuning = {"handled": ["a"], "generations": [{"number": 5}]}
    manifest = {**CHAT, "status": {"tuning": tuning, "decisions": decisions}}
    found = asked(override("a", **what), manifest=manifest)
    [verdict] = found.verdicts
    assert (verdict.in_force, verdict.reason, verdict.over) == (False, "Refused", over)
    assert verdict.message == REFUSAL.rstrip(".")
    assert found.pins or found.rollback, "the tuner must not forget that it has answered"
    assert bool(found.refused) != over


def test_end_of_an_override_is_shown_and_one_that_never_began_warns() -> None:
    def end(item: dict[str, Any]) -> tuple[str, str, str]:
        [verdict] = overrides_of([item], "chat", CHAT, NOW + 6000).verdicts
        assert verdict.over
        return end_of(item, verdict)

    assert end(override("a", pause={}, by="ana")) == (
        "Normal",
        "OverrideExpired",
        "pause of chat by ana ended at 2026-11-23T02:10:00Z",
    )
    kind, _, message = end(override("a", "2026-11-23T00:59:59Z", pause={}))
    assert (kind, "had no effect: it was created after its end" in message) == ("Warning", True)
    done = override("a", approve={"decision": "d-0042"})
    [verdict] = asked(done, manifest=approving({"handled": ["a"]})).verdicts
    assert end_of(done, verdict) == ("Normal", "OverrideCarriedOut", "approve of chat was carried out")


def test_status_keeps_the_time_since_when_it_is_in_force() -> None:
    item = override("a", pause={})
    (verdict,) = asked(item).verdicts
    first = with_verdict(item, verdict, NOW)
    assert first["status"] == {
        "kind": "pause",
        "expiresAt": "2026-11-23T02:10:00Z",
        "conditions": [
            {
                "type": "InForce",
                "status": "True",
                "reason": "InForce",
                "message": "in force until 2026-11-23T02:10:00Z",
                "lastTransitionTime": "2026-11-23T02:00:00Z",
                "observedGeneration": 0,
            }
        ],
    }
    assert with_verdict(first, verdict, NOW + 60) == first
    (verdict,) = asked(first, manifest=None).verdicts
    assert with_verdict(first, verdict, NOW + 60)["status"]["conditions"][0]["lastTransitionTime"] == (
        "2026-11-23T02:01:00Z"
    )
