"""An engine that answers and does not take the promoted configuration."""

from __future__ import annotations

from dataclasses import replace

from tests.operator.tuning.observations import BAD, NOW, gauges, many, observe, replica
from tests.operator.tuning.policies import policy_of

from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.decision import Push
from kvpilot_operator.tuning.observation import Gauges, Observation, Promoted
from kvpilot_operator.tuning.state import Generation, Phase, TuningState

SMALL = {"numWorkers": 2, "batchSize": 2}
QUEUED = {"admission_wait": 0.71, "prefill": 0.04, "decode": 0.25}
KNOWN = TuningState(last_generation=2)
LATE_S = 60.0


def behind(old: Gauges | None = None) -> Observation:
    """A breach; one replica runs generation 1, two run the promoted second one."""
    figures = {"attained": BAD, "stages": QUEUED}
    pods = (replica("chat-9", gauges=old, **figures), *many(2, generation=2, **figures))
    return replace(observe(*pods, config=SMALL), promoted=Promoted(2, SMALL))


def test_nothing_is_tried_meanwhile_and_it_is_pushed_again() -> None:
    decision = decide(behind(), KNOWN, policy_of(scaling=None), NOW)
    assert [(hold.reason, hold.message) for hold in decision.state.holds] == [
        ("ReplicaBehind", "chat-9: runs an older generation; the promoted one is pushed at every reconcile")
    ]
    assert [action.uid for action in decision.actions if isinstance(action, Push)] == ["uid-chat-9"]
    assert decision.state.change is None


def test_it_is_named_first_once_it_had_time_enough() -> None:
    def holds(age: float) -> list[str]:
        noted = Generation(2, NOW - age, "d-0001", "Promoted", "{}")
        state = replace(KNOWN, cooldown_until=NOW + 9, generations=(noted,))
        return [hold.reason for hold in decide(behind(), state, policy_of(scaling=None), NOW).state.holds]

    assert holds(LATE_S) == ["Cooldown"]
    assert holds(LATE_S + 1) == ["ReplicaBehind", "Cooldown"]


def test_its_memory_cuts_the_batch_of_no_other() -> None:
    full = gauges(memory_ratio=0.97)
    assert decide(behind(full), KNOWN, policy_of(), NOW).state.phase is not Phase.EMERGENCY
    pods = many(3, generation=2, gauges=full)
    current = replace(observe(*pods, config=SMALL), promoted=Promoted(2, SMALL))
    assert decide(current, KNOWN, policy_of(), NOW).state.phase is Phase.EMERGENCY
