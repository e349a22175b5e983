"""The watch over what runs on all replicas: harm takes a change back, and is reported of the user's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.operator.tuning.experiments import CANDIDATE, CONFIG, context
from tests.operator.tuning.observations import DOWN, NOW, gauges, many, observe, replica
from tests.operator.tuning.policies import policy_of

from kvpilot_operator.tuning.context import Draft
from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.decision import Push, WriteConfig
from kvpilot_operator.tuning.experiment.watch import watch, watch_of_edit
from kvpilot_operator.tuning.observation import Observation, Pin, Promoted, Sample
from kvpilot_operator.tuning.state import (
    BlockedValue,
    Expected,
    KnobChange,
    OverlayEntry,
    Phase,
    Prediction,
    Reversal,
    StepRate,
    TuningState,
    Watch,
)

DAY_S, VERIFY_S = 86_400.0, 45.0
MADE = (KnobChange("numWorkers", 2, 4),)


def watching(*, since: float = 20.0, **fields: Any) -> TuningState:
    """numWorkers 2 -> 4 runs everywhere for ``since`` s; the rate before was 100 row-steps/s."""
    started = NOW - since
    given = {
        "rate_before": StepRate(100.0, 3000.0),
        "errors_before": 0.0,
        "judged_before": 3000.0,
        **fields,
    }
    seen = Watch("d-0001", "workers-up", MADE, started, started + VERIFY_S, **given)
    return TuningState(
        phase=Phase.WATCH,
        epoch=1,
        last_generation=2,
        next_decision=2,
        overlay=(OverlayEntry("numWorkers", 2, 4, "d-0001"),),
        watch=seen,
    )


def fleet(seconds: float = 20.0, **figures: Any) -> Observation:
    """Three replicas that run the change, with their figures since then."""
    pods = many(3, config=CANDIDATE, generation=2, epoch=1, verify=figures, seconds=seconds)
    shown = []
    for item in pods:
        assert item.sample is not None
        windows = {"watch" if name == "verify" else name: w for name, w in item.sample.windows.items()}
        shown.append(replace(item, sample=replace(item.sample, windows=windows)))
    seen = observe(*shown, config=CANDIDATE)
    return replace(seen, base=CONFIG, promoted=Promoted(2, CANDIDATE))


def watched(observation: Observation, state: TuningState) -> Draft:
    return watch(context(observation), Draft(state))


def test_what_is_taken_back_has_no_effect_to_measure() -> None:
    used = Prediction("memory", 0.9, 0.85, 0.95)
    cut, other = (
        Expected(name, "memory-emergency", "the cut", used, NOW - 9) for name in ("d-0001", "d-0000")
    )
    state = replace(watching(), expected=(other, cut))
    measured, reverted = watched(fleet(row_rate=50.0), state).records
    assert (measured.id, measured.outcome, reverted.outcome) == ("d-0001", "Measured", "Reverted")
    assert measured.summary == (
        "the cut: it was taken back before its effect showed; 90% (85% to 95%) was predicted."
    )
    assert watched(fleet(row_rate=50.0), state).state.expected == (other,)
    assert watched(fleet(row_rate=100.0), state).state.expected == (other, cut)


@pytest.mark.parametrize(
    ("figures", "why"),
    [
        ({"row_rate": 50.0}, "the engines do less work per second than before"),
        ({"row_rate": 100.0, "errors": 0.1}, "more requests fail than before"),
    ],
)
def test_harm_takes_the_change_back_on_all_replicas(figures: dict[str, float], why: str) -> None:
    draft = watched(fleet(**figures), watching())
    record = draft.records[0]
    assert (record.id, record.outcome, record.generation) == ("d-0001", "Reverted", 3)
    assert record.summary == f"numWorkers 2 -> 4 was reverted (Harmful): {why}."
    assert record.evidence["verdict"] == "Harmful"
    assert record.evidence["harmEValue"] >= 50
    state, change = draft.state, draft.state.change
    assert change is not None
    assert (state.phase, state.watch, change.verdict) == (Phase.PROMOTE, None, "TakenBack")
    assert change.values == (KnobChange("numWorkers", 4, 2),)
    assert (state.epoch, state.last_generation) == (2, 3)
    assert state.reversals == (Reversal("numWorkers", NOW),)
    assert state.blocked_values == (BlockedValue("numWorkers", 4, NOW + DAY_S),)


@pytest.mark.parametrize(("rate", "harmful"), [(66.7, True), (85.0, False)])
def test_engines_are_compared_with_their_own_past(rate: float, harmful: bool) -> None:
    """What machines differ by is not in it: steps that take 1.5 times as long are seen."""
    draft = watched(fleet(row_rate=rate), watching())
    assert [record.outcome for record in draft.records] == (["Reverted"] if harmful else [])


def test_what_is_taken_back_is_pushed_everywhere_and_then_written() -> None:
    decision = decide(fleet(row_rate=50.0), watching(), policy_of(), NOW)
    pushes = [action for action in decision.actions if isinstance(action, Push)]
    assert {action.uid for action in pushes} == {f"uid-chat-{index}" for index in range(3)}
    assert {(action.generation, action.epoch, action.values["numWorkers"]) for action in pushes} == {
        (3, 2, 2)
    }
    assert not any(isinstance(action, WriteConfig) for action in decision.actions)
    back = many(3, config=CONFIG, generation=3, epoch=2)
    seen = replace(observe(*back, config=CONFIG), promoted=Promoted(2, CANDIDATE))
    written = decide(seen, decision.state, policy_of(), NOW + 2)
    assert written.actions == (WriteConfig(3, CONFIG),)
    ended = decide(replace(seen, promoted=Promoted(3, CONFIG)), written.state, policy_of(), NOW + 4)
    assert (ended.state.change, ended.state.watch, ended.state.overlay) == (None, None, ())
    assert ended.state.reversals == (Reversal("numWorkers", NOW),), "counted once"


def test_harm_of_the_users_edit_is_reported_and_nothing_is_changed() -> None:
    before = watching(own=False)
    draft = watched(fleet(row_rate=50.0), before)
    assert [(record.outcome, record.summary) for record in draft.records] == [
        (
            "Harmful",
            "numWorkers 2 -> 4, the user's change, does harm: "
            "the engines do less work per second than before.",
        )
    ]
    assert draft.actions == ()
    assert (draft.state.change, draft.state.watch) == (None, None), "reported once"
    assert (draft.state.reversals, draft.state.blocked_values, draft.state.overlay) == (
        (),
        (),
        before.overlay,
    )


def test_fewer_rows_after_the_load_fell_are_no_harm() -> None:
    """A step with one row advances half of the rows that one with eight does, per second."""
    before = {"rate_before": StepRate(100.0, 3000.0, 8.0)}
    calm = watched(fleet(row_rate=50.0, rows=4), watching(**before))
    assert (calm.records, calm.state.watch is None) == ((), False)
    busy = watched(fleet(row_rate=50.0, rows=8), watching(**before))
    assert [record.outcome for record in busy.records] == ["Reverted"]


@pytest.mark.parametrize("rate", [90.0, 100.0, 300.0])
def test_no_harm_goes_on_until_its_end(rate: float) -> None:
    state = watching()
    assert watched(fleet(row_rate=rate), state).state == state
    done = watched(fleet(row_rate=rate, seconds=VERIFY_S), watching(since=VERIFY_S))
    assert (done.state.watch, done.state.change, done.records) == (None, None, ())


@pytest.mark.parametrize(("rate", "harmful"), [(50.0, False), (40.0, False), (20.0, True)])
def test_capacity_that_is_given_up_on_purpose_is_no_harm(rate: float, harmful: bool) -> None:
    """The change was to leave half of the step rate; much less than that is harm all the same."""
    draft = watched(fleet(row_rate=rate), watching(ratio=0.5))
    assert [record.outcome for record in draft.records] == (["Reverted"] if harmful else [])
    if harmful:
        assert (draft.records[0].evidence["ratio"], draft.records[0].evidence["predictedRatio"]) == (0.2, 0.5)


def test_a_gain_that_was_promised_allows_no_less_than_before() -> None:
    assert watched(fleet(row_rate=50.0), watching(ratio=1.8)).records[0].outcome == "Reverted"


def test_errors_are_harm_in_a_runtime_without_buckets_of_rows_as_well() -> None:
    blind = {"rate_before": StepRate(), "errors_before": 0.0}
    assert watched(fleet(errors=0.1), watching(**blind)).records[0].outcome == "Reverted"
    before = {**blind, "errors_before": 0.1}
    assert watched(fleet(errors=0.1), watching(**before)).records == (), "as many as before"
    unknown = {**blind, "judged_before": 0.0}
    assert watched(fleet(errors=0.1), watching(**unknown)).records == (), "nothing to compare with"


def test_an_edit_is_watched_by_its_errors_where_no_step_rate_is_known() -> None:
    seen = watch_of_edit(context(observe(*many(3), config=CONFIG)), "d-0001", MADE)
    assert seen is not None
    assert (seen.own, seen.rate_before, seen.judged_before) == (False, StepRate(), 3600.0)
    assert watch_of_edit(context(observe(*many(3, rate=0.0), config=CONFIG)), "d-0001", MADE) is None


def test_errors_as_before_are_no_harm() -> None:
    state = watching(errors_before=0.1)
    assert watched(fleet(row_rate=100.0, errors=0.1), state).state == state


def without_samples(observation: Observation) -> Observation:
    return replace(
        observation,
        metrics_problem=DOWN,
        replicas=tuple(replace(r, sample=_blind(r.sample)) for r in observation.replicas),
    )


def _blind(sample: Sample | None) -> Sample | None:
    return None


def test_no_data_takes_nothing_back() -> None:
    state = watching()
    assert watched(without_samples(fleet(row_rate=50.0)), state).state == state


def test_a_watch_does_not_end_while_nothing_is_seen_but_not_for_ever() -> None:
    blind = without_samples(fleet())
    waiting = watching(since=5 * VERIFY_S - 1)
    assert watched(blind, waiting).state == waiting
    assert watched(fleet(row_rate=50.0, seconds=5 * VERIFY_S), waiting).records[0].outcome == "Reverted"
    assert watched(blind, watching(since=5 * VERIFY_S)).state.watch is None


def test_a_guard_waits_for_the_engines_that_take_another_configuration() -> None:
    """The pin of another knob raised the generation a moment before the end: no engine runs it yet."""
    full = many(3, config=CANDIDATE, generation=2, epoch=1, gauges=gauges(memory_ratio=0.97))
    state = watching(since=VERIFY_S, memory_before=0.97)
    pinned = Promoted(3, {**CANDIDATE, "prefetchSize": 16})
    seen = replace(observe(*full, config=CANDIDATE), base=CONFIG, promoted=pinned)
    assert watched(seen, state).state.watch == state.watch
    late = watching(since=5 * VERIFY_S, memory_before=0.97)
    assert watched(seen, late).state.watch is None


def test_memory_of_an_engine_that_did_not_take_the_emergency_says_nothing_of_it() -> None:
    relieved = many(2, config=CANDIDATE, generation=2, epoch=1, gauges=gauges(memory_ratio=0.7))
    stuck = replica("chat-9", config=CONFIG, gauges=gauges(memory_ratio=0.97))
    state = watching(since=VERIFY_S, memory_before=0.97)
    seen = replace(observe(*relieved, stuck, config=CANDIDATE), base=CONFIG, promoted=Promoted(2, CANDIDATE))
    assert watched(seen, state).records == ()
    everywhere = replace(fleet(), replicas=observe(stuck, config=CANDIDATE).replicas)
    assert watched(replace(everywhere, promoted=Promoted(1, CONFIG)), state).records[0].outcome == "Reverted"


def test_nothing_else_begins_while_it_lasts() -> None:
    late = {
        "attained": {"p50": 0.0, "p95": 0.1, "p99": 0.2},
        "stages": {"admission_wait": 1.0, "decode": 0.1},
    }
    seen = fleet(row_rate=100.0)
    breached = many(3, config=CANDIDATE, generation=2, epoch=1, **late)
    seen = replace(seen, replicas=observe(*breached, config=CANDIDATE).replicas)
    decision = decide(seen, watching(), policy_of(scaling=None), NOW)
    assert (decision.state.change, decision.state.phase) == (None, Phase.WATCH)
    free = replace(watching(), watch=None)
    assert decide(seen, free, policy_of(scaling=None), NOW).state.change is not None


def taking_back() -> TuningState:
    """The state right after harm was found: the change is being taken back everywhere."""
    return decide(fleet(row_rate=50.0), watching(), policy_of(), NOW).state


def test_an_edit_of_another_field_does_not_save_what_did_harm() -> None:
    edited = replace(fleet(row_rate=50.0), base={**CONFIG, "gcThreshold": 0.7})
    decision = decide(edited, taking_back(), policy_of(), NOW + 2)
    assert [action for action in decision.actions if isinstance(action, WriteConfig)] == [
        WriteConfig(4, {**CONFIG, "gcThreshold": 0.7})
    ]
    assert decision.state.overlay == ()


def test_a_pin_of_another_knob_does_not_save_it_either() -> None:
    pinned = replace(fleet(row_rate=50.0), pins=(Pin("pin", "prefetchSize", 16, NOW + 600),))
    decision = decide(pinned, taking_back(), policy_of(), NOW + 2)
    written = [action for action in decision.actions if isinstance(action, WriteConfig)]
    assert written == [WriteConfig(4, {**CONFIG, "prefetchSize": 16})]


def test_an_engine_that_takes_nothing_does_not_keep_it_on_the_others() -> None:
    stubborn, *others = many(3, config=CONFIG, generation=3, epoch=2)
    behind = many(1, config=CANDIDATE, generation=2, epoch=1)[0]
    assert stubborn.name == behind.name
    seen = replace(observe(behind, *others, config=CONFIG), base=CONFIG, promoted=Promoted(2, CANDIDATE))
    soon = decide(seen, taking_back(), policy_of(), NOW + 60)
    assert not any(isinstance(action, WriteConfig) for action in soon.actions)
    late = decide(seen, taking_back(), policy_of(), NOW + 61)
    assert WriteConfig(3, CONFIG) in late.actions
    assert late.records == ()


def test_what_an_emergency_does_is_not_blamed_on_the_change_before_it() -> None:
    full = many(3, config=CANDIDATE, generation=2, epoch=1, gauges=gauges(memory_ratio=0.97))
    seen = replace(fleet(row_rate=100.0), replicas=observe(*full, config=CANDIDATE).replicas)
    decision = decide(seen, watching(), policy_of(), NOW)
    assert (decision.state.phase, decision.state.watch) == (Phase.EMERGENCY, None)
