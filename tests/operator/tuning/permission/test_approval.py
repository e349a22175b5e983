"""Mode Approve: what waits for an approval, and what an approval does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.operator.tuning.observations import BAD, GOOD, NOW, observe, replica, three
from tests.operator.tuning.policies import policy_of

from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.decision import Decision, Push, Scale
from kvpilot_operator.tuning.observation import Approval, Boost, Observation
from kvpilot_operator.tuning.policy import KnobBounds, Scaling
from kvpilot_operator.tuning.state import KnobChange, Phase, TuningState

SMALL = {"numWorkers": 2, "batchSize": 2}
WIDE = {"numWorkers": 16, "batchSize": 16}
QUEUED = {"admission_wait": 0.71, "prefill": 0.04, "decode": 0.25}
KNOWN = TuningState(last_generation=1)
COOLDOWN, LONG = 30.0, 60.0
YES = Approval("yes", "d-0001", "ada@example.org")


def breached(**changes: Any) -> Observation:
    return observe(*three(attained=BAD, stages=QUEUED), config=SMALL, name="chat", **changes)


def saturated(desired: int = 3, **changes: Any) -> Observation:
    busy = (replica(f"chat-{i}", attained=BAD, stages=QUEUED, busy=0.95, done=0.5) for i in range(3))
    pods = (replace(pod, sample=_marginal(pod.sample)) for pod in busy)
    return observe(*pods, config=WIDE, name="chat", desired_replicas=desired, **changes)


def _marginal(sample: Any) -> Any:
    return replace(sample, gauges=replace(sample.gauges, marginal_gain=0.02, running=16.0))


def approve(seen: Observation, state: TuningState = KNOWN, at: float = NOW, **policy: Any) -> Decision:
    return decide(replace(seen, at=at), state, policy_of(**{"mode": "Approve", **policy}), at)


def proposed() -> TuningState:
    """The state with workers-up pending as d-0001."""
    return approve(breached()).state


def outcomes(decision: Decision) -> list[tuple[str, str]]:
    return [(record.id, record.outcome) for record in decision.records]


def test_a_proposal_waits_and_says_how_it_is_approved() -> None:
    decision = approve(breached())
    (pending,) = decision.state.pending
    assert (pending.id, pending.rule, pending.expires) == ("d-0001", "workers-up", NOW + 10 * COOLDOWN)
    assert pending.values[0].knob == "numWorkers"
    assert (decision.state.change, decision.actions) == (None, ())
    (record,) = decision.records
    assert record.outcome == "Proposed"
    assert " should gain 71%. Approve it with `kvpilot approve chat d-0001` before " in record.summary


def test_a_proposal_that_waits_changes_nothing_while_it_stands() -> None:
    state = proposed()
    decision = approve(breached(), state, NOW + 60)
    assert (decision.state, decision.records, decision.actions) == (state, (), ())


def test_an_approval_carries_it_out_as_auto_would_and_the_record_says_by_whom() -> None:
    auto = decide(breached(), KNOWN, policy_of(), NOW)
    decision = approve(breached(approvals=(YES,)), proposed())
    assert decision.state.change is not None and auto.state.change is not None
    assert decision.state.change == replace(auto.state.change, approved_by="ada@example.org")
    assert (
        [type(action) for action in decision.actions] == [type(action) for action in auto.actions] == [Push]
    )
    assert outcomes(decision) == [("d-0001", "Started")]
    assert decision.records[0].summary.endswith("Approved by ada@example.org.")
    assert (decision.state.pending, decision.state.handled) == ((), ("yes",))


def test_what_was_approved_is_what_is_done_when_the_figures_moved() -> None:
    state = proposed()
    (pending,) = state.pending
    state = replace(
        state,
        pending=(replace(pending, values=(KnobChange("numWorkers", 2, 3), *pending.values[1:]), ratio=1.5),),
    )
    change = approve(breached(approvals=(YES,)), state).state.change
    assert change is not None
    assert (change.values[0], change.ratio) == (KnobChange("numWorkers", 2, 3), 1.5)


def test_an_approval_of_a_value_beyond_new_bounds_does_nothing() -> None:
    bounds = {**policy_of().bounds, "numWorkers": KnobBounds("numWorkers", 1, 3)}
    decision = approve(breached(approvals=(YES,)), proposed(), bounds=bounds)
    assert decision.state.change is None


def test_a_remedy_whose_cause_is_gone_is_withdrawn_after_a_long_window() -> None:
    met = observe(*three(attained=GOOD), config=SMALL)
    lapsing = approve(met, proposed())
    assert (lapsing.state.pending[0].lapsing_since, lapsing.records) == (NOW, ())
    again = approve(breached(), lapsing.state, NOW + 10)
    assert again.state == proposed(), "it stands again"
    gone = approve(met, lapsing.state, NOW + LONG)
    assert outcomes(gone) == [("d-0001", "Withdrawn")]
    assert "no longer waits for an approval: its cause is gone" in gone.records[0].summary
    assert gone.state.pending == ()


def test_missing_data_withdraws_nothing() -> None:
    blind = replace(breached(), replicas=tuple(replace(pod, sample=None) for pod in breached().replicas))
    decision = approve(blind, proposed(), NOW + LONG)
    assert decision.state.pending == proposed().pending


def test_a_remedy_expires_and_is_proposed_again_under_a_new_number() -> None:
    later = NOW + 10 * COOLDOWN
    expired = approve(breached(), proposed(), later)
    assert outcomes(expired)[0] == ("d-0001", "Withdrawn")
    assert "nobody approved it in time" in expired.records[0].summary
    again = approve(breached(), expired.state, later + 2)
    assert outcomes(again) == [("d-0002", "Proposed")]


@pytest.mark.parametrize("state", [KNOWN, replace(proposed(), next_decision=9)], ids=["none", "another"])
def test_an_approval_of_what_is_not_pending_is_refused_once(state: TuningState) -> None:
    seen = breached(approvals=(Approval("late", "d-0007", "bob"),))
    decision = approve(seen, state)
    assert decision.records[0].outcome == "Refused"
    assert decision.records[0].summary.startswith(
        "Override late by bob has no effect: d-0007 is not pending: it is unknown, was withdrawn or has"
    )
    again = approve(seen, decision.state)
    assert "Refused" not in [record.outcome for record in again.records]
    ended = approve(breached(), again.state)
    assert ended.state.handled == ()


def test_another_mode_withdraws_what_is_pending() -> None:
    decision = approve(breached(), proposed(), mode="Recommend")
    assert outcomes(decision)[0] == ("d-0001", "Withdrawn")
    assert "the mode is Recommend" in decision.records[0].summary


def test_more_replicas_wait_for_an_approval_and_are_asked_for_until_they_are_seen() -> None:
    scaling = Scaling(1, 10)
    waiting = approve(saturated(), scaling=scaling)
    (pending,) = waiting.state.pending
    assert (pending.rule, pending.of_replicas, waiting.actions) == ("replicas-up", True, ())
    seen = saturated(approvals=(YES,))
    approved = approve(seen, waiting.state, scaling=scaling)
    asked = [action.replicas for action in approved.actions if isinstance(action, Scale)]
    assert asked == [pending.replicas]
    assert outcomes(approved) == [("d-0001", "ScaledOut")]
    lost = approve(seen, approved.state, NOW + 2, scaling=scaling)
    assert (lost.actions, lost.records) == (approved.actions, ())
    observed = approve(saturated(pending.replicas, approvals=(YES,)), lost.state, NOW + 4, scaling=scaling)
    assert observed.state.pending == ()


def test_boosts_and_bounds_need_no_approval() -> None:
    boosted = approve(breached(boosts=(Boost("alert", 5, NOW + 60),)))
    assert Scale(5, "boost") in boosted.actions
    assert Scale(4, "replicas-bounds") in approve(breached(), scaling=Scaling(4, 6)).actions


def test_a_memory_emergency_needs_no_approval() -> None:
    def full(pod: Any) -> Any:
        return replace(pod, sample=replace(pod.sample, gauges=replace(pod.sample.gauges, memory_ratio=0.97)))

    seen = breached()
    decision = approve(replace(seen, replicas=tuple(map(full, seen.replicas))))
    assert decision.records[0].outcome == "Emergency"
    assert decision.state.phase is Phase.EMERGENCY
