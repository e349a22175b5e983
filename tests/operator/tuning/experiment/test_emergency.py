"""The memory emergency: on all replicas at once, without a canary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.operator.tuning.experiments import CONFIG, canary, controls, in_phase, seen
from tests.operator.tuning.observations import GOOD, NOW, gauges, replica
from tests.operator.tuning.policies import policy_of

from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.decision import Decision, Push, WriteConfig
from kvpilot_operator.tuning.observation import Observation, Pin, Promoted
from kvpilot_operator.tuning.state import Phase, Reported, TuningState

FULL = gauges(memory_ratio=0.97)


def full(**changes: Any) -> Observation:
    return seen(
        *(replica(f"chat-{index}", gauges=FULL, attained=GOOD, config=CONFIG) for index in range(3)),
        **changes,
    )


def act(observation: Observation, state: TuningState | None = None, **policy: Any) -> Decision:
    return decide(observation, state or TuningState(last_generation=1), policy_of(**policy), NOW)


def test_batch_is_halved_on_all_replicas_at_once() -> None:
    decision = act(full())
    assert decision.state.phase is Phase.EMERGENCY
    pushes = [action for action in decision.actions if isinstance(action, Push)]
    assert [(push.uid, push.values["batchSize"]) for push in pushes] == [
        ("uid-chat-0", 4),
        ("uid-chat-1", 4),
        ("uid-chat-2", 4),
    ]
    assert decision.state.reported == (Reported("memory-emergency", NOW),)
    assert decision.records[0].summary == (
        "Memory was at 97% of its limit; batchSize 8 -> 4 on all replicas at once, generation 2."
    )


def test_experiment_is_aborted_for_it() -> None:
    figures = {"gauges": FULL}
    decision = act(seen(canary(**figures), *controls(**figures)), in_phase(Phase.VERIFY, since=20.0))
    assert [record.outcome for record in decision.records] == ["Aborted", "Emergency"]
    assert "(Emergency: memory is nearly exhausted)" in decision.records[0].summary
    assert decision.state.change is not None
    assert (decision.state.change.rule, decision.state.change.canary) == ("memory-emergency", None)


def test_it_is_not_repeated_for_ten_cooldowns() -> None:
    recent = TuningState(last_generation=1, reported=(Reported("memory-emergency", NOW - 299.0),))
    assert act(full(), recent).state.phase is not Phase.EMERGENCY
    old = TuningState(last_generation=1, reported=(Reported("memory-emergency", NOW - 301.0),))
    assert act(full(), old).state.phase is Phase.EMERGENCY


def test_it_waits_until_the_user_s_edit_is_seen() -> None:
    edited = full(base={**CONFIG, "maxQueue": 10})
    first = act(edited)
    assert [record.outcome for record in first.records] == ["Reset"]
    lost = act(edited, first.state)
    assert lost.actions == (WriteConfig(2, {**CONFIG, "maxQueue": 10}),)
    there = full(base={**CONFIG, "maxQueue": 10}, promoted=Promoted(2, {**CONFIG, "maxQueue": 10}))
    assert act(there, lost.state).state.phase is Phase.EMERGENCY


def in_emergency(**changes: Any) -> tuple[Observation, TuningState]:
    """Two of three engines run the emergency's cut, so that the ConfigMap does not hold it yet."""
    cut = {**CONFIG, "batchSize": 4}
    pods = [replica(f"chat-{i}", gauges=FULL, config=cut, generation=2, epoch=1) for i in range(2)]
    return seen(*pods, replica("chat-2", gauges=FULL, config=CONFIG), **changes), act(full()).state


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({"base": {**CONFIG, "maxQueue": 10}}, {**CONFIG, "maxQueue": 10, "batchSize": 4}),
        ({"pins": (Pin("hold", "numWorkers", 3, NOW + 60),)}, {**CONFIG, "numWorkers": 3, "batchSize": 4}),
        ({"base": {**CONFIG, "batchSize": 6}}, {**CONFIG, "batchSize": 6}),
        ({"pins": (Pin("hold", "batchSize", 6, NOW + 60),)}, {**CONFIG, "batchSize": 6}),
    ],
    ids=["edit", "pin", "edit of the same knob", "pin of the same knob"],
)
def test_an_edit_or_a_pin_meanwhile_keeps_it(changes: dict[str, Any], config: dict[str, Any]) -> None:
    observation, state = in_emergency(**changes)
    decision = act(observation, state)
    assert [a for a in decision.actions if isinstance(a, WriteConfig)] == [WriteConfig(3, config)]
    assert not [a for a in decision.actions if isinstance(a, Push)], "memory must not fill up meanwhile"
    assert decision.records[0].evidence["verdict"] in {"SpecChanged", "Pinned"}
    written = replace(observation, promoted=Promoted(3, config))
    again = act(written, decision.state)
    pushed = [a for a in again.actions if isinstance(a, Push)]
    assert {(a.generation, a.values["batchSize"]) for a in pushed} == {(3, config["batchSize"])}


def test_watch_over_it_stays_when_an_edit_interrupts_it() -> None:
    """It is taken back if it frees no memory, unless the user chose the value."""
    watch = act(*in_emergency(base={**CONFIG, "maxQueue": 10})).state.watch
    assert watch is not None
    assert (watch.rule, watch.memory_before) == ("memory-emergency", 0.97)
    own = act(*in_emergency(base={**CONFIG, "batchSize": 6})).state.watch
    assert own is not None and own.rule == "user-edit"


def test_pause_and_disabled_rule_prevent_it() -> None:
    assert act(full(paused_by="stop")).state.phase is Phase.HOLD
    disabled = act(full(), disabled_rules=frozenset({"memory-emergency"}))
    assert disabled.state.phase is not Phase.EMERGENCY


def test_mode_recommend_only_recommends_it() -> None:
    decision = act(full(), mode="Recommend")
    assert [action for action in decision.actions if isinstance(action, Push)] == []
    assert decision.records[0].outcome == "Recommended"
    assert "batchSize 8 -> 4 should help, which kvpilot leaves to you" in decision.records[0].summary
