"""What a decision does about the kill switch, the limits of the fleet and blocked rules."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.operator.tuning.experiments import CANDIDATE, canary, controls, in_phase, seen
from tests.operator.tuning.observations import BAD, NOW, observe, replica, three
from tests.operator.tuning.policies import policy_of

from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.decision import Decision, Push, Scale
from kvpilot_operator.tuning.observation import Approval, Boost, FleetLimits, Observation
from kvpilot_operator.tuning.policy import Scaling
from kvpilot_operator.tuning.state import Phase, TuningState

SMALL = {"numWorkers": 2, "batchSize": 2}
QUEUED = {"admission_wait": 0.71, "prefill": 0.04, "decode": 0.25}
KNOWN = TuningState(last_generation=1)
FREE = FleetLimits()
OFF = FleetLimits(off="the operator runs with --tuning=off")
FULL = FleetLimits(waits=("FleetLimit", "others are in a change"))
BLOCKED = FleetLimits(recommend_only=frozenset({"workers-up"}))


def breached(fleet: FleetLimits = FREE, **changes: object) -> Observation:
    return observe(*three(attained=BAD, stages=QUEUED), config=SMALL, fleet=fleet, **changes)


def act(found: Observation, state: TuningState = KNOWN, **policy: object) -> Decision:
    return decide(found, state, policy_of(**policy), NOW)


def holds(decision: Decision) -> dict[str, str]:
    return {hold.reason: hold.message for hold in decision.state.holds}


def test_nothing_begins_while_tuning_is_off() -> None:
    decision = act(breached(OFF))
    assert (decision.state.change, decision.actions, decision.records) == (None, (), ())
    assert next(iter(holds(decision).items())) == ("KillSwitch", OFF.off)


def test_bounds_and_boosts_go_on_while_tuning_is_off() -> None:
    assert Scale(4, "replicas-bounds") in act(breached(OFF), scaling=Scaling(4, 6)).actions
    assert Scale(5, "boost") in act(breached(OFF, boosts=(Boost("alert", 5, NOW + 60),))).actions


@pytest.mark.parametrize("phase", [Phase.CANARY, Phase.SETTLE, Phase.VERIFY, Phase.PROMOTE, Phase.EMERGENCY])
def test_every_candidate_is_taken_back_while_tuning_is_off(phase: Phase) -> None:
    everywhere = phase in {Phase.PROMOTE, Phase.EMERGENCY}
    pods = (replica(f"chat-{i}", config=CANDIDATE, generation=2, epoch=1) for i in range(3))
    found = seen(*pods) if everywhere else seen(canary(), *controls())
    decision = act(replace(found, fleet=OFF), in_phase(phase, since=1.0))
    assert decision.state.phase is Phase.REVERT
    assert f"(KillSwitch: {OFF.off}); back to generation 1." in decision.records[0].summary
    back = [action.uid for action in decision.actions if isinstance(action, Push) and action.generation == 1]
    assert back == [f"uid-chat-{i}" for i in range(3)] if everywhere else ["uid-chat-0"]


def test_restoring_what_was_before_harm_is_finished_while_tuning_is_off() -> None:
    state = in_phase(Phase.PROMOTE, since=1.0, verdict="TakenBack")
    decision = act(replace(seen(canary(), *controls()), fleet=OFF), state)
    assert decision.state.phase is Phase.PROMOTE


@pytest.mark.parametrize("mode", ["Auto", "Approve"])
def test_an_experiment_waits_for_its_turn_in_the_fleet(mode: str) -> None:
    state = KNOWN
    if mode == "Approve":
        state = act(breached(FULL), mode=mode).state
        assert [item.rule for item in state.pending] == ["workers-up"], "it may be proposed meanwhile"
    approvals = (Approval("yes", "d-0001", "ada"),) if mode == "Approve" else ()
    decision = act(breached(FULL, approvals=approvals), state, mode=mode)
    assert (decision.state.change, decision.records) == (None, ())
    assert holds(decision)["FleetLimit"] == "others are in a change"
    assert decision.state.pending == state.pending
    free = act(breached(approvals=approvals), decision.state, mode=mode)
    assert free.state.change is not None


def test_a_blocked_rule_is_only_recommended() -> None:
    decision = act(breached(BLOCKED))
    assert [(record.rule, record.outcome) for record in decision.records] == [("workers-up", "Recommended")]
    assert "workers-up did harm" in holds(decision)["RuleOnlyRecommended"]


def test_the_state_remembers_the_rules_that_acted() -> None:
    assert act(breached(FleetLimits(rules_hash="abc"))).state.rules_hash == "abc"
    kept = replace(KNOWN, rules_hash="old")
    assert act(breached(), kept).state.rules_hash == "old"
