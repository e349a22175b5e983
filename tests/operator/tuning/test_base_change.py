"""The user's edits, and what a lost status is restored from."""

from __future__ import annotations

from dataclasses import replace

from tests.operator.tuning.observations import NOW, observe, replica, three
from tests.operator.tuning.policies import policy_of

from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.decision import WriteConfig
from kvpilot_operator.tuning.observation import Promoted
from kvpilot_operator.tuning.state import OverlayEntry, TuningState

BASE = {"numWorkers": 2, "batchSize": 2}
TUNED = OverlayEntry("numWorkers", 2, 4, "d-0001")
STATE = TuningState(last_generation=2, epoch=1, overlay=(TUNED,))
SEEN = replace(
    observe(*three(generation=2, epoch=1), config={**BASE, "numWorkers": 4}),
    base=BASE,
    promoted=Promoted(2, {**BASE, "numWorkers": 4}),
)


def test_edit_of_a_tuned_knob_drops_its_overlay_entry() -> None:
    decision = decide(replace(SEEN, base={**BASE, "numWorkers": 6}), STATE, policy_of(), NOW)
    assert [(r.rule, r.outcome, r.summary) for r in decision.records] == [
        (
            "user-edit",
            "Reset",
            "The user's configuration changed in numWorkers; back to the user's value: numWorkers "
            "(tuned to 4); generation 3.",
        )
    ]
    assert WriteConfig(3, {**BASE, "numWorkers": 6}) in decision.actions
    assert decision.state.overlay == ()


def test_edit_to_the_tuned_value_writes_nothing() -> None:
    decision = decide(replace(SEEN, base={**BASE, "numWorkers": 4}), STATE, policy_of(), NOW)
    assert (decision.records, decision.actions, decision.state.overlay) == ((), (), ())


def test_edit_of_another_field_keeps_the_overlay() -> None:
    decision = decide(replace(SEEN, base={**BASE, "maxQueue": 10}), STATE, policy_of(), NOW)
    assert [r.summary for r in decision.records] == [
        "The user's configuration changed in maxQueue; generation 3."
    ]
    assert decision.state.overlay == (TUNED,)


def test_edit_is_recorded_once_until_the_config_map_shows_it() -> None:
    edited = replace(SEEN, base={**BASE, "maxQueue": 10})
    first = decide(edited, STATE, policy_of(), NOW)
    again = decide(edited, first.state, policy_of(), NOW + 2)
    assert again.records == ()
    assert [a for a in again.actions if isinstance(a, WriteConfig)] == [
        WriteConfig(3, {**BASE, "numWorkers": 4, "maxQueue": 10})
    ]


def test_a_generation_that_was_reverted_is_not_used_again_after_a_lost_status() -> None:
    """Generation 3 was tried and reverted: the engines run 2 again, and remember the epoch of the revert."""
    state = decide(SEEN, TuningState(), policy_of(), NOW).state
    assert state.last_generation >= 3


def test_old_records_keep_their_numbers_after_a_lost_status() -> None:
    """The engines restarted, so that no epoch tells of what was tried before."""
    fresh = replace(SEEN, replicas=three(generation=2, config={**BASE, "numWorkers": 4}))
    numbered = replace(fresh, recorded_decision=41, recorded_generation=17)
    state = decide(numbered, TuningState(), policy_of(), NOW).state
    assert (state.last_generation, state.next_decision) == (17, 42)
    known = decide(numbered, replace(STATE, next_decision=3), policy_of(), NOW).state
    assert (known.last_generation, known.next_decision) == (2, 3), "a status that is there knows best"


def test_an_engine_that_is_ahead_of_a_restored_status_is_believed() -> None:
    ahead = replica("chat-9", config={**BASE, "numWorkers": 4}, generation=5, epoch=7)
    seen = replace(SEEN, replicas=(*SEEN.replicas, ahead), desired_replicas=4)
    state = decide(seen, STATE, policy_of(), NOW).state
    assert (state.epoch, state.last_generation) == (7, 5)


def test_lost_status_restores_epoch_generation_and_overlay() -> None:
    ahead = replica("chat-9", config={**BASE, "numWorkers": 4}, generation=5, epoch=7)
    seen = replace(SEEN, replicas=(*SEEN.replicas, ahead), desired_replicas=4)
    state = decide(seen, TuningState(), policy_of(), NOW).state
    assert (state.epoch, state.last_generation, state.cooldown_until) == (7, 2 + 7, NOW + 30)
    assert [(entry.knob, entry.based_on, entry.value) for entry in state.overlay] == [("numWorkers", 2, 4)]
