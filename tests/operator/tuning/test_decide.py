"""``decide`` while the spec is invalid: the last valid policy stays in force, no change begins."""

from __future__ import annotations

from dataclasses import replace

from tests.operator.tuning.observations import BAD, NOW, observe, three
from tests.operator.tuning.policies import policy_of

from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.decision import Push, Scale
from kvpilot_operator.tuning.observation import ObservedReplica
from kvpilot_operator.tuning.policy import Scaling
from kvpilot_operator.tuning.state import Phase, TuningState

ERROR = "spec.objectives.latency: p50Ms <= p95Ms <= p99Ms is required"
SMALL = {"numWorkers": 2, "batchSize": 2}
QUEUED = {"admission_wait": 0.71, "prefill": 0.04, "decode": 0.25}
BREACHED = observe(*three(attained=BAD, stages=QUEUED), config=SMALL)
KNOWN = TuningState(last_generation=1)


def test_invalid_spec_holds_new_changes() -> None:
    assert decide(BREACHED, KNOWN, policy_of(), NOW).state.phase is Phase.CANARY
    decision = decide(replace(BREACHED, spec_error=ERROR), KNOWN, policy_of(), NOW)
    assert [(hold.reason, hold.message) for hold in decision.state.holds] == [("SpecInvalid", ERROR)]
    assert (decision.state.phase, decision.state.change, decision.actions) == (Phase.HOLD, None, ())


def with_candidate(item: ObservedReplica, canary: str) -> ObservedReplica:
    """The replica, which runs the candidate if it is the canary."""
    assert item.engine is not None
    engine = replace(item.engine, generation=2, config={"numWorkers": 8, "batchSize": 8})
    return replace(item, engine=engine) if item.uid == canary else item


def test_invalid_spec_aborts_the_experiment_and_the_canary_converges() -> None:
    trying = decide(BREACHED, KNOWN, policy_of(), NOW)
    assert trying.state.change is not None
    drawn = trying.state.change.canary_uid
    seen = replace(
        BREACHED, replicas=tuple(with_candidate(r, drawn) for r in BREACHED.replicas), spec_error=ERROR
    )
    decision = decide(seen, trying.state, policy_of(), NOW)
    record = decision.records[0]
    assert (record.outcome, record.evidence["verdict"]) == ("Aborted", "SpecInvalid")
    assert f"(SpecInvalid: {ERROR}); back to generation 1." in record.summary
    assert {f"uid-{record.canary}"} == {drawn}
    assert {record.canary, *record.controls} == {"chat-0", "chat-1", "chat-2"}
    assert decision.state.phase is Phase.REVERT
    assert decision.state.blocked_values == ()
    assert [(item.uid, item.values) for item in decision.actions if isinstance(item, Push)] == [
        (drawn, SMALL)
    ]


def test_invalid_spec_keeps_replicas_within_the_last_valid_bounds() -> None:
    seen = replace(BREACHED, spec_error=ERROR)
    assert Scale(5, "replicas-bounds") in decide(seen, KNOWN, policy_of(scaling=Scaling(5, 9)), NOW).actions
    (action,) = decide(seen, KNOWN, policy_of(scaling=Scaling(1, 2)), NOW).actions
    assert isinstance(action, Scale)
    assert (action.replicas, action.reason, len(action.first)) == (2, "replicas-bounds", 1)
