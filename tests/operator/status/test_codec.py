"""The tuner's state survives the status, JSON included."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from itertools import count
from typing import Any, get_args, get_origin, get_type_hints

from hypothesis import given, settings
from hypothesis import strategies as st

from kvpilot_operator.status.codec import (
    decode_status,
    encode_status,
    overlay_status,
    state_of,
    tuning_status,
)
from kvpilot_operator.status.model import ConfigStatus, Status
from kvpilot_operator.tuning.state import (
    BlockedValue,
    Change,
    Effect,
    Hold,
    KnobChange,
    LongestRequest,
    Measure,
    OverlayEntry,
    Pending,
    Phase,
    ReplicaMark,
    ReplicaRef,
    Reported,
    Reversal,
    StepRate,
    Tally,
    TuningState,
    Watch,
)

TIMES = st.integers(min_value=1, max_value=4_000_000_000_000).map(lambda ms: ms / 1000)
RATE, REQUESTS, ROWS, COMPUTED, PREFILL_S = (st.floats(0, limit) for limit in (1e6, 1e6, 256, 1e6, 1e3))
RATES = st.builds(StepRate, RATE, REQUESTS, ROWS, st.none() | COMPUTED, PREFILL_S)
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


REPLICAS = st.builds(ReplicaRef, NAMES, NAMES)
EFFECTS = st.builds(Effect, st.floats(-9, 9), st.floats(0, 9))
TALLIES = st.builds(
    Tally, st.integers(0, 99), st.floats(-9, 9), st.floats(0, 99), st.floats(0, 1e6), st.just(0.0) | TIMES
)
CHANGES = st.builds(
    Change,
    id=NAMES,
    rule=NAMES,
    values=st.lists(knob_changes(), min_size=1, max_size=3).map(tuple),
    epoch=st.integers(0, 10_000),
    generation=st.integers(0, 10_000),
    started_at=TIMES,
    phase_since=TIMES,
    canary=st.none() | REPLICAS,
    controls=st.lists(REPLICAS, max_size=4).map(tuple),
    restarts=st.integers(0, 9),
    objective=NAMES,
    predicted_gain=st.floats(0, 10),
    verdict=st.sampled_from(["", "Promoted", "Aborted(ReplicaRestarted)"]),
    before=st.lists(st.builds(Measure, NAMES, st.floats(0, 1e6), st.floats(0, 1e6)), max_size=3).map(tuple),
    measure=st.sampled_from(["", "capacity", "tierLoad"]),
    ratio=st.floats(0, 100),
    seed=st.integers(0, 2**32 - 1),
    measured_from=st.just(0.0) | TIMES,
    widened=st.lists(REPLICAS, max_size=4).map(tuple),
    drained=st.booleans(),
    rate_before=RATES,
    errors_before=st.floats(0, 1),
    judged_before=st.floats(0, 1e6),
    difference_before=st.none() | EFFECTS,
    tally=TALLIES,
    work=TALLIES,
    work_before=st.none() | EFFECTS,
    crossed_at=st.just(0.0) | TIMES,
    deadline=st.just(0.0) | TIMES,
    unseen_since=st.just(0.0) | TIMES,
)
WATCHES = st.builds(
    Watch,
    id=NAMES,
    rule=NAMES,
    values=st.lists(knob_changes(), min_size=1, max_size=3).map(tuple),
    since=TIMES,
    until=TIMES,
    rate_before=RATES,
    errors_before=st.floats(0, 1),
    judged_before=st.floats(0, 1e6),
    own=st.booleans(),
    ratio=st.floats(0, 100),
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
    blocked_values=st.lists(
        knob_changes().flatmap(lambda c: TIMES.map(lambda until: BlockedValue(c.knob, c.after, until))),
        max_size=16,
    ).map(tuple),
    reversals=st.lists(st.builds(Reversal, st.sampled_from(sorted(VALUES)), TIMES), max_size=16).map(tuple),
    scale_down=st.lists(st.builds(ReplicaMark, TIMES, st.integers(0, 99)), max_size=10).map(tuple),
    reported=st.lists(st.builds(Reported, NAMES, TIMES), max_size=12).map(tuple),
    boosted=st.integers(0, 99),
    pending=st.lists(
        st.builds(
            Pending,
            id=NAMES,
            rule=NAMES,
            values=st.lists(knob_changes(), max_size=3).map(tuple),
            replicas=st.integers(0, 99),
            objective=NAMES,
            predicted_gain=st.floats(0, 1),
            why=NAMES,
            since=TIMES,
            expires=TIMES,
            lapsing_since=st.just(0.0) | TIMES,
        ),
        max_size=2,
    ).map(tuple),
    handled=st.lists(NAMES, max_size=8).map(tuple),
    watch=st.none() | WATCHES,
    longest=st.lists(
        st.builds(LongestRequest, st.integers(128, 10**6), st.just(0.0) | TIMES), max_size=4
    ).map(tuple),
)


def stored(state: TuningState) -> dict[str, object]:
    config = ConfigStatus(overlay=overlay_status(state))
    status = encode_status(Status(tuning=tuning_status(state), config=config))
    return dict(json.loads(json.dumps(status)))


def read(status: dict[str, object]) -> TuningState:
    return state_of(decode_status(status))


def example(kind: Any, number: Iterator[int]) -> Any:
    """A value of a type that is not the default of any field: every field of a dataclass gets its own."""
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(
            **{
                item.name: not item.default if hints[item.name] is bool else example(hints[item.name], number)
                for item in fields(kind)
            }
        )
    if get_origin(kind) is tuple:
        return (example(get_args(kind)[0], number),)
    if arms := [arm for arm in get_args(kind) if arm is not type(None)]:
        return example(arms[0], number)
    if isinstance(kind, type) and issubclass(kind, Phase):
        return Phase.VERIFY
    return kind(next(number)) if kind in {int, float, str} else next(number)


def test_every_field_of_the_state_survives_the_status() -> None:
    state = example(TuningState, count(100))
    for item in fields(TuningState):
        assert getattr(read(stored(state)), item.name) == getattr(state, item.name), item.name
        assert getattr(state, item.name) != getattr(TuningState(), item.name), f"{item.name} proves nothing"


@settings(max_examples=150, deadline=None)
@given(STATES)
def test_state_survives_the_status_with_its_types(state: TuningState) -> None:
    back = read(stored(state))
    assert back == state
    types = [type(value.after) for value in state.change.values] if state.change else []
    assert [type(value.after) for value in back.change.values] == types if back.change else types == []


def test_unreadable_status_gives_a_fresh_state() -> None:
    assert read({}) == TuningState()
    assert read({"tuning": {"state": "Dancing"}}) == TuningState()
    assert read({"tuning": {"cooldownUntil": "soon"}}) == TuningState()


def test_fields_of_a_newer_operator_are_ignored() -> None:
    assert read({"tuning": {"epoch": 3, "fromTheFuture": 1}}) == TuningState(epoch=3)
