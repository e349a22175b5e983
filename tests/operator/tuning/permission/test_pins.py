"""Pins hold a knob while they are in force, whatever the tuner would do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.operator.tuning.experiments import CANDIDATE, NAMES, canary, controls, in_phase, seen
from tests.operator.tuning.observations import BAD, NOW, context_of, observe, replica, three
from tests.operator.tuning.plans import why_not
from tests.operator.tuning.policies import CATALOGUE_BOUNDS, policy_of

from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.decision import Decision, Push, WriteConfig
from kvpilot_operator.tuning.observation import FleetLimits, Observation, Pin, Promoted
from kvpilot_operator.tuning.policy import KnobBounds
from kvpilot_operator.tuning.rules.order import consider
from kvpilot_operator.tuning.state import OverlayEntry, Phase, TuningState

SMALL = {"numWorkers": 2, "batchSize": 2}
QUEUED = {"admission_wait": 0.71, "prefill": 0.04, "decode": 0.25}
TUNED = OverlayEntry("numWorkers", 2, 8, "d-0003")
KNOWN = TuningState(last_generation=1, next_decision=4)
STOP_GAP = Pin("stop-gap", "numWorkers", 4, NOW + 3600)


def quiet(*pins: Pin, config: dict[str, Any] | None = None, generation: int = 1) -> Observation:
    promoted = Promoted(generation, {**SMALL, **(config or {})})
    return replace(observe(*three(), config=SMALL), pins=pins, promoted=promoted)


def pinned(found: Observation, state: TuningState = KNOWN, **policy: Any) -> Decision:
    return decide(found, state, policy_of(**policy), NOW)


def written(decision: Decision) -> list[tuple[int, Any]]:
    return [
        (action.generation, action.values["numWorkers"])
        for action in decision.actions
        if isinstance(action, WriteConfig)
    ]


def outcomes(decision: Decision) -> list[str]:
    return [record.outcome for record in decision.records]


def test_a_pin_is_obeyed_while_tuning_is_off() -> None:
    off = FleetLimits(off="the operator runs with --tuning=off")
    assert written(pinned(replace(quiet(STOP_GAP), fleet=off))) == [(2, 4)]


@pytest.mark.parametrize("mode", ["Off", "Auto"])
def test_a_pin_is_promoted_as_a_generation_of_its_own(mode: str) -> None:
    decision = pinned(quiet(STOP_GAP), mode=mode)
    assert written(decision) == [(2, 4)]
    assert decision.state.overlay == (OverlayEntry("numWorkers", 2, 4, "pin:stop-gap"),)
    assert outcomes(decision) == ["Pinned"]
    assert decision.records[0].summary == (
        "numWorkers is pinned at 4 until 1970-01-01 03:46 UTC by override stop-gap; generation 2."
    )


def test_a_pin_is_written_until_it_is_seen_and_then_nothing_happens() -> None:
    first = pinned(quiet(STOP_GAP))
    lost = pinned(quiet(STOP_GAP), first.state)
    assert (written(lost), lost.records) == ([(2, 4)], ())
    there = pinned(quiet(STOP_GAP, config={"numWorkers": 4}, generation=2), lost.state)
    assert (written(there), there.records) == ([], ())
    assert [action.generation for action in there.actions if isinstance(action, Push)] == [2, 2, 2]


def test_the_tuned_value_returns_when_the_pin_ends() -> None:
    tuned = replace(KNOWN, overlay=(TUNED,))
    first = pinned(quiet(STOP_GAP, config={"numWorkers": 8}), tuned)
    assert written(first) == [(2, 4)]
    ended = pinned(quiet(config={"numWorkers": 4}, generation=2), first.state)
    assert written(ended) == [(3, 8)]
    assert ended.state.overlay == (TUNED,)
    assert "the pin of numWorkers by override stop-gap has ended, so it is 8 again" in (
        ended.records[0].summary[:1].lower() + ended.records[0].summary[1:]
    )


def test_a_pinned_knob_is_left_alone_by_the_tuner() -> None:
    breached = observe(*three(attained=BAD, stages=QUEUED), config=SMALL)
    free = consider(context_of(breached), KNOWN)
    assert free.canary is not None and free.canary.rule == "workers-up"
    held = consider(context_of(replace(breached, pins=(STOP_GAP,))), KNOWN)
    assert held.canary is None
    assert why_not(held, "workers-up") == ("Pinned", "override stop-gap pins numWorkers at 4")


@pytest.mark.parametrize(("knob", "value"), [("numWorkers", 2), ("maxTokens", 2048)])
def test_a_pin_aborts_an_experiment_on_its_knob_or_with_a_new_configuration(knob: str, value: int) -> None:
    running = replace(seen(canary(), *controls()), pins=(Pin("mine", knob, value, NOW + 60),))
    decision = pinned(running, in_phase(Phase.VERIFY, since=20.0))
    assert outcomes(decision) == ["Aborted", "Pinned"]
    assert f"(Pinned: {knob} is pinned)" in decision.records[0].summary
    assert decision.state.phase is Phase.REVERT


def test_a_pin_is_written_in_place_of_the_promotion_that_it_interrupts() -> None:
    promoting = replace(
        seen(canary(), *(replica(name, config=CANDIDATE, generation=2, epoch=1) for name in NAMES[1:])),
        pins=(Pin("mine", "maxTokens", 2048, NOW + 60),),
    )
    assert written(pinned(replace(promoting, pins=()), in_phase(Phase.PROMOTE))) == [(2, 4)]
    assert written(pinned(promoting, in_phase(Phase.PROMOTE))) == [(3, 2)]


def test_an_edit_of_the_base_leaves_the_pin_in_force() -> None:
    state = replace(KNOWN, overlay=(OverlayEntry("numWorkers", 2, 4, "pin:stop-gap"),))
    found = quiet(STOP_GAP, config={"numWorkers": 4})
    decision = pinned(replace(found, base={**SMALL, "numWorkers": 3, "batchSize": 4}), state)
    assert written(decision) == [(2, 4)]
    assert outcomes(decision) == ["Reset"]


def test_a_tuned_value_that_new_bounds_exclude_does_not_return_when_the_pin_ends() -> None:
    first = pinned(quiet(STOP_GAP, config={"numWorkers": 8}), replace(KNOWN, overlay=(TUNED,)))
    bounds = {**CATALOGUE_BOUNDS, "numWorkers": KnobBounds("numWorkers", 1, 4)}
    held = quiet(STOP_GAP, config={"numWorkers": 4}, generation=2)
    narrowed = pinned(held, first.state, bounds=bounds)
    assert written(narrowed) == [], "the configuration is as it was"
    assert [entry.value for entry in narrowed.state.overlay] == [4]
    ended = pinned(replace(held, pins=()), narrowed.state, bounds=bounds)
    assert written(ended) == [(3, 2)]


@pytest.mark.parametrize(
    ("pin", "why"),
    [
        (Pin("b", "numWorkers", 9, NOW + 60), "override a pins numWorkers to 4, which is obeyed"),
        (Pin("b", "useQuantization", True, NOW + 60), "useQuantization is no knob; set it in"),
        (Pin("b", "batchSize", -1, NOW + 60), "batchSize cannot be -1"),
    ],
)
def test_a_pin_that_cannot_be_obeyed_is_refused_once(pin: Pin, why: str) -> None:
    first = Pin("a", "numWorkers", 4, NOW + 60)
    decision = pinned(quiet(first, pin))
    assert outcomes(decision) == ["Refused", "Pinned"]
    assert decision.records[0].summary.startswith(f"Override b has no effect: {why}")
    assert written(decision) == [(2, 4)]
    assert pinned(quiet(first, pin), decision.state).records == ()


def test_a_lost_status_does_not_take_a_pin_for_a_tuned_value() -> None:
    found = quiet(STOP_GAP, config={"numWorkers": 4}, generation=2)
    decision = pinned(found, TuningState())
    assert decision.state.overlay == (OverlayEntry("numWorkers", 2, 4, "pin:stop-gap"),)
