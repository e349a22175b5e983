"""Whatever the tuner remembers survives the status, JSON included."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from kvpilot_operator.spec.memory import overlay_status, state_from_status, tuning_status
from kvpilot_operator.tuning.state import (
    Barred,
    Change,
    Hold,
    KnobChange,
    Measure,
    OverlayEntry,
    Phase,
    ReplicaMark,
    Reversal,
    Told,
    TuningState,
)

TIMES = st.integers(min_value=1, max_value=4_000_000_000_000).map(lambda ms: ms / 1000)
NAMES = st.text(alphabet="abcdefghij0123456789-", min_size=1, max_size=20)
VALUES = {
    "numWorkers": st.integers(1, 128),
    "maxMemoryMb": st.none() | st.integers(100, 10_000),
    "compressionRatio": st.integers(1, 100).map(lambda n: n / 100),
    "useCompression": st.booleans(),
    "cacheStrategy": st.sampled_from(["lru", "lfu", "fifo", "adaptive"]),
    "quantizationBits": st.sampled_from([4, 8, 16]),
}


@st.composite
def knob_changes(draw: st.DrawFn) -> KnobChange:
    knob = draw(st.sampled_from(sorted(VALUES)))
    return KnobChange(knob, draw(VALUES[knob]), draw(VALUES[knob]))


CHANGES = st.builds(
    Change,
    id=NAMES,
    rule=NAMES,
    values=st.lists(knob_changes(), min_size=1, max_size=3).map(tuple),
    epoch=st.integers(0, 10_000),
    generation=st.integers(0, 10_000),
    started_at=TIMES,
    phase_since=TIMES,
    canary_uid=st.just("") | NAMES,
    control_uids=st.lists(NAMES, max_size=4).map(tuple),
    restarts=st.integers(0, 9),
    objective=NAMES,
    predicted_gain=st.floats(0, 10),
    verdict=st.sampled_from(["", "Promoted", "Aborted(PodRestarted)"]),
    before=st.lists(st.builds(Measure, NAMES, st.floats(0, 1e6), st.floats(0, 1e6)), max_size=3).map(tuple),
)
STATES = st.builds(
    TuningState,
    phase=st.sampled_from(Phase),
    epoch=st.integers(0, 10_000),
    last_generation=st.integers(0, 10_000),
    next_decision=st.integers(1, 10_000),
    overlay=st.lists(
        knob_changes().flatmap(
            lambda c: NAMES.map(lambda name: OverlayEntry(c.knob, c.before, c.after, name))
        ),
        max_size=4,
    ).map(tuple),
    change=st.none() | CHANGES,
    cooldown_until=st.just(0.0) | TIMES,
    holds=st.lists(st.builds(Hold, NAMES, NAMES, TIMES), max_size=5).map(tuple),
    barred=st.lists(
        knob_changes().flatmap(lambda c: TIMES.map(lambda until: Barred(c.knob, c.after, until))), max_size=16
    ).map(tuple),
    reversals=st.lists(st.builds(Reversal, st.sampled_from(sorted(VALUES)), TIMES), max_size=16).map(tuple),
    scale_down=st.lists(st.builds(ReplicaMark, TIMES, st.integers(0, 99)), max_size=10).map(tuple),
    met_ticks=st.integers(0, 9),
    told=st.lists(st.builds(Told, NAMES, TIMES), max_size=16).map(tuple),
    boosted=st.integers(0, 99),
)


def stored(state: TuningState) -> dict[str, object]:
    tuning = tuning_status(state).model_dump(by_alias=True, exclude_none=True, mode="json")
    overlay = [
        item.model_dump(by_alias=True, exclude_none=True, mode="json")
        for item in overlay_status(state.overlay)
    ]
    return dict(json.loads(json.dumps({"tuning": tuning, "config": {"overlay": overlay}})))


@settings(max_examples=150, deadline=None)
@given(STATES)
def test_a_state_comes_back_from_the_status_as_it_was(state: TuningState) -> None:
    back = state_from_status(stored(state))
    assert back == state
    types = [type(value.after) for value in state.change.values] if state.change else []
    assert [type(value.after) for value in back.change.values] == types if back.change else types == []


def test_lists_beyond_their_limits_keep_the_newest() -> None:
    state = TuningState(
        holds=tuple(Hold(f"r{i}", "", float(i)) for i in range(9)),
        barred=tuple(Barred("numWorkers", i, float(i)) for i in range(20)),
        reversals=tuple(Reversal("numWorkers", float(i)) for i in range(20)),
        scale_down=tuple(ReplicaMark(float(i), i) for i in range(20)),
    )
    back = state_from_status(stored(state))
    assert [len(back.holds), len(back.barred), len(back.reversals), len(back.scale_down)] == [5, 16, 16, 10]
    assert (back.barred[-1].value, back.reversals[-1].at, back.scale_down[-1].replicas) == (19, 19.0, 19)


def test_an_unreadable_status_is_a_lost_one() -> None:
    assert state_from_status({}) == TuningState()
    assert state_from_status({"tuning": {"state": "Dancing"}}) == TuningState()
    assert state_from_status({"tuning": {"cooldownUntil": "soon"}}) == TuningState()


def test_fields_of_a_newer_operator_are_passed_over() -> None:
    assert state_from_status({"tuning": {"epoch": 3, "fromTheFuture": 1}}) == TuningState(epoch=3)
