"""The last promoted configurations are kept, and an override goes back to one of them once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.operator.tuning.experiments import CANDIDATE, canary, controls, in_phase, seen
from tests.operator.tuning.observations import NOW, observe, three
from tests.operator.tuning.policies import policy_of

from kvpilot_operator.tuning.assess.guards import DAY
from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.decision import Decision, WriteConfig
from kvpilot_operator.tuning.observation import FleetLimits, Observation, Pin, Promoted, Rollback
from kvpilot_operator.tuning.permission.generations import generation_before
from kvpilot_operator.tuning.policy import KnobBounds
from kvpilot_operator.tuning.state import BlockedValue, Generation, OverlayEntry, Phase, TuningState

SMALL = {"numWorkers": 2, "batchSize": 2}
BACK = Rollback("undo", 2, "ada")
GENERATIONS = (
    Generation(1, NOW - 900, "", "Found", "{}"),
    Generation(2, NOW - 800, "d-0001", "Promoted", '{"numWorkers":8}'),
    Generation(3, NOW - 700, "d-0002", "Promoted", '{"numWorkers":16,"batchSize":16}'),
)
TUNED = TuningState(
    last_generation=3,
    next_decision=3,
    overlay=(OverlayEntry("numWorkers", 2, 16, "d-0002"), OverlayEntry("batchSize", 2, 16, "d-0002")),
    generations=GENERATIONS,
)


def running(**changes: Any) -> Observation:
    """Generation 3 in force, everything met."""
    promoted = Promoted(3, {"numWorkers": 16, "batchSize": 16})
    return replace(observe(*three(), config=SMALL), promoted=promoted, **changes)


def act(found: Observation, state: TuningState = TUNED, **policy: Any) -> Decision:
    return decide(found, state, policy_of(**policy), NOW)


def written(decision: Decision) -> list[WriteConfig]:
    return [action for action in decision.actions if isinstance(action, WriteConfig)]


def test_each_promoted_configuration_is_kept_with_its_decision() -> None:
    first = act(observe(*three(), config=SMALL), TuningState(last_generation=1))
    assert first.state.generations == (Generation(1, NOW, "", "Found", "{}"),)
    state = replace(in_phase(Phase.PROMOTE, verdict="Promoted"), generations=first.state.generations)
    everywhere = (canary(), *(replace(pod, engine=canary().engine) for pod in controls()))
    found = replace(seen(*everywhere), promoted=Promoted(2, CANDIDATE))
    kept = act(found, state).state.generations
    assert kept[1:] == (Generation(2, NOW, "d-0001", "Promoted", '{"numWorkers":4}'),)
    assert act(found, replace(state, generations=kept)).state.generations == kept


def test_the_way_back_is_open_while_tuning_is_off() -> None:
    off = FleetLimits(off="the operator runs with --tuning=off")
    decision = act(running(rollback=BACK, fleet=off))
    assert [item.values["numWorkers"] for item in written(decision)] == [8]
    assert [record.outcome for record in decision.records] == ["RolledBack"]


def made(*history: tuple[str, str]) -> tuple[Generation, ...]:
    """Generations from 1, by verdict and tuned workers ("" for none)."""
    return tuple(
        Generation(number, NOW, "", verdict, f'{{"numWorkers":{workers}}}' if workers else "{}")
        for number, (verdict, workers) in enumerate(history, 1)
    )


FOUND, EIGHT, SIXTEEN = ("Found", ""), ("Promoted", "8"), ("Promoted", "16")


@pytest.mark.parametrize(
    ("history", "back"),
    [
        ((FOUND, EIGHT, SIXTEEN), 2),
        ((FOUND, EIGHT, ("Pinned", "8"), ("Found", "8")), 1),
        ((FOUND, EIGHT, SIXTEEN, ("TakenBack", "8")), 1),
        ((FOUND, EIGHT, SIXTEEN, ("Pinned", "16"), ("TakenBack", "8"), ("Found", "8")), 1),
        ((FOUND, EIGHT, SIXTEEN, ("RolledBack", "8")), 1),
        ((FOUND, EIGHT, SIXTEEN, ("Promoted", "32"), ("RolledBack", "8")), 1),
        ((FOUND, SIXTEEN, ("TakenBack", ""), EIGHT, ("Promoted", "16"), ("Promoted", "32")), 5),
        ((EIGHT, SIXTEEN, ("RolledBack", "4")), 1),
        ((SIXTEEN, ("TakenBack", "8")), None),
        ((FOUND, ("Found", "")), None),
        ((FOUND, ("Promoted", "500"), ("Found", "")), None),
        ((EIGHT,), None),
        ((), None),
    ],
)
def test_the_way_back_is_the_last_that_differs_and_was_not_left(
    history: tuple[tuple[str, str], ...], back: int | None
) -> None:
    workers = history[-1][1] if history else ""
    overlay = (
        *((OverlayEntry("numWorkers", 2, int(workers), "d-0001"),) if workers else ()),
        OverlayEntry("numWorkers", 2, 64, "pin:mine"),
    )
    state = TuningState(overlay=overlay, generations=made(*history))
    assert generation_before(state, len(history), SMALL, policy_of().bounds) == back


def test_ten_are_kept() -> None:
    many = tuple(Generation(number, NOW, "", "Promoted", "{}") for number in range(11, 21))
    kept = act(
        replace(running(), promoted=Promoted(21, SMALL)), TuningState(last_generation=21, generations=many)
    )
    assert [item.number for item in kept.state.generations] == list(range(12, 22))


def test_an_override_restores_the_tuned_knobs_of_a_generation() -> None:
    decision = act(running(rollback=BACK))
    assert written(decision) == [WriteConfig(4, {"numWorkers": 8, "batchSize": 2})]
    assert decision.state.overlay == (OverlayEntry("numWorkers", 2, 8, "d-0003"),)
    assert [(record.outcome, record.summary) for record in decision.records] == [
        (
            "RolledBack",
            "Back to the tuned knobs of generation 2, numWorkers 16 -> 8, batchSize 16 -> 2, by override "
            "undo of ada; generation 4.",
        )
    ]
    assert decision.state.blocked_values == (
        BlockedValue("numWorkers", 16, NOW + DAY),
        BlockedValue("batchSize", 16, NOW + DAY),
    )
    assert decision.state.generations[-1] == Generation(4, NOW, "d-0003", "RolledBack", '{"numWorkers":8}')


def test_it_is_carried_out_once() -> None:
    first = act(running(rollback=BACK))
    again = act(running(rollback=BACK), first.state)
    assert (written(again), again.records) == (written(first), ()), "not observed yet"
    there = replace(running(rollback=BACK), promoted=Promoted(4, {"numWorkers": 8, "batchSize": 2}))
    assert act(there, again.state).records == ()
    tuned_on = replace(again.state, overlay=TUNED.overlay)
    later = replace(running(rollback=BACK), promoted=Promoted(5, {"numWorkers": 16, "batchSize": 16}))
    assert written(act(later, tuned_on)) == []


def test_a_generation_that_is_not_kept_is_refused() -> None:
    decision = act(running(rollback=Rollback("undo", 7)))
    assert [(record.outcome, record.summary) for record in decision.records] == [
        ("Refused", "Override undo has no effect: generation 7 is not kept; these are: 1, 2, 3.")
    ]
    assert written(decision) == []


def test_the_present_generation_is_refused() -> None:
    decision = act(running(rollback=Rollback("undo", 3)))
    assert "the tuned knobs are those of generation 3 already" in decision.records[0].summary


def test_what_the_bounds_exclude_stays_out_and_a_pin_stays() -> None:
    bounds = {**policy_of().bounds, "numWorkers": KnobBounds("numWorkers", 1, 4)}
    decision = act(running(rollback=BACK), bounds=bounds)
    assert decision.state.overlay == ()
    pin = OverlayEntry("batchSize", 2, 16, "pin:mine")
    pinned = replace(TUNED, overlay=(TUNED.overlay[0], pin))
    found = running(rollback=BACK, pins=(Pin("mine", "batchSize", 16, NOW + 60),))
    decision = act(found, pinned)
    assert written(decision) == [WriteConfig(4, {"numWorkers": 8, "batchSize": 16})]
    assert decision.state.generations[-1].knobs == '{"numWorkers":8}'


def test_it_waits_for_a_pin_that_is_written_first() -> None:
    asked = running(rollback=BACK, pins=(Pin("hold", "maxTokens", 2048, NOW + 60),))
    first = act(asked)
    assert [action.generation for action in written(first)] == [4]
    assert [record.outcome for record in first.records] == ["Pinned"]
    assert first.state.handled == ()
    there = Promoted(4, written(first)[0].values)
    second = act(replace(asked, promoted=there), first.state)
    assert written(second) == [WriteConfig(5, {"numWorkers": 8, "batchSize": 2, "maxTokens": 2048})]
    assert [record.outcome for record in second.records] == ["RolledBack"]


def test_an_experiment_is_aborted() -> None:
    state = replace(in_phase(Phase.VERIFY, since=20.0), generations=GENERATIONS[:1])
    decision = act(replace(seen(canary(), *controls()), rollback=Rollback("undo", 1)), state)
    assert [record.outcome for record in decision.records] == ["Aborted", "RolledBack"]
    assert decision.state.phase is Phase.REVERT
