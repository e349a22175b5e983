"""How many replicas the load needs, now and once a new one serves."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.operator.tuning.observations import NOW, context_of, curve, gauges, many, observe
from tests.operator.tuning.policies import CATALOGUE_BOUNDS, policy_of

from kvpilot_operator.tuning.assess.capacity import USE, Capacity, measured
from kvpilot_operator.tuning.context import Context, Plan, Proposal
from kvpilot_operator.tuning.policy import KnobBounds, Policy
from kvpilot_operator.tuning.replicas import replicas_up
from kvpilot_operator.tuning.sizing import foreseen_replicas, needed_replicas, per_replica
from kvpilot_operator.tuning.state import BlockedValue, KnobChange, Reported, Reversal, TuningState

WIDE = {"numWorkers": 16, "batchSize": 16}
NARROW = {"numWorkers": 2, "batchSize": 2}
KNOWN = TuningState(last_generation=1)


def loaded(
    rate: float,
    *,
    replicas: int = 3,
    rising: float = 1.0,
    waiting: float = 0.0,
    config: dict[str, int] | None = None,
    policy: Policy | None = None,
    **changes: Any,
) -> Context:
    """Engines with so many requests/s each, of 5 row-steps; ``rising``: short over long window.

    With 16 rows in a step of 28.8 ms one of them completes 16 / (5 x 0.0288) = 111 requests/s.
    """
    gauge = gauges(curve=curve(), waiting=waiting, running=1.0)
    row_rate = 8 / gauge.curve[8]
    pods = []
    for item in many(replicas, rate=rate, rows=8, row_rate=row_rate, busy=5 * rate / row_rate, gauges=gauge):
        assert item.sample is not None
        windows = dict(item.sample.windows)
        windows["short"] = replace(windows["short"], arrivals=windows["short"].arrivals * rising)
        pods.append(replace(item, sample=replace(item.sample, windows=windows)))
    return context_of(observe(*pods, config=config or WIDE, **changes), policy)


def one(context: Context, slots: int = 16, most: float = 16) -> float:
    """Requests/s that one replica is planned for."""
    capacity = measured(context.measured)
    assert capacity is not None
    return USE * per_replica(context, capacity, slots, most)


@pytest.mark.parametrize("rate", [1.0, 10.0, 40.0])
def test_need_is_the_load_over_what_one_replica_completes(rate: float) -> None:
    context = loaded(rate)
    assert one(context) == pytest.approx(0.8 * 111.1, abs=0.1)
    assert needed_replicas(context, KNOWN) == math.ceil(3 * rate * 1.15 / one(context))


def test_need_follows_the_short_window() -> None:
    """The look-back remembers the peaks; a long window before it would only make the scale-in later."""
    for change in (2.0, 0.25):
        context = loaded(40.0, rising=change)
        assert needed_replicas(context, KNOWN) == math.ceil(3 * 40 * change * 1.15 / one(context))


def test_no_traffic_needs_nothing() -> None:
    pods = many(3, rate=0.0, gauges=gauges(curve=curve()))
    assert needed_replicas(context_of(observe(*pods, config=WIDE)), KNOWN) == 0


def test_a_replica_is_rated_with_the_slots_that_it_has_or_may_get() -> None:
    context = loaded(10.0)
    engine = Capacity(5.0, 8.0, 0.0, curve())
    narrow, wide = per_replica(context, engine, 2, 2), per_replica(context, engine, 2, math.inf)
    assert narrow == pytest.approx(engine.rate(2))
    assert wide == pytest.approx(engine.rate(engine.knee(0.1, math.inf)))
    assert wide > narrow


@given(st.floats(0.1, 50), st.floats(0.1, 50))
def test_more_load_never_needs_fewer(a: float, b: float) -> None:
    low, high = sorted((a, b))
    capacity = gauges(curve=curve())
    engines = [
        context_of(observe(*many(3, rate=rate, rows=8, row_rate=400.0, gauges=capacity), config=WIDE))
        for rate in (low, high)
    ]
    needs = [needed_replicas(context, KNOWN) for context in engines]
    assert all(need >= 0 for need in needs)
    assert foreseen_replicas(engines[0], KNOWN, knob_first=False) is None or needs[0] > 0


def foreseen(context: Context, state: TuningState = KNOWN, *, knob_first: bool = False) -> int | None:
    found = foreseen_replicas(context, state, knob_first=knob_first)
    return None if found is None else found[0]


def test_enough_replicas_are_left_alone() -> None:
    assert foreseen(loaded(10.0)) is None


def test_a_load_beyond_what_they_complete_asks_for_what_it_needs() -> None:
    context = loaded(110.0)
    assert foreseen(context) == math.ceil(330 / one(context)) == 4
    found = foreseen_replicas(context, KNOWN, knob_first=False)
    assert found is not None
    assert found[1] == ("330.0 requests/s are expected within 64 s, and 3 replicas complete 333.3")


def test_a_rise_is_met_before_it_is_there() -> None:
    steady, rising = loaded(75.0), loaded(75.0, rising=1.3)
    assert foreseen(steady) is None
    assert foreseen(rising) is not None


def test_a_backlog_counts_unless_a_knob_works_it_off_first() -> None:
    queued = loaded(92.0, waiting=5000.0)
    assert foreseen(loaded(92.0)) is None
    assert foreseen(queued) is not None
    assert foreseen(queued, knob_first=True) is None
    assert foreseen(loaded(92.0, waiting=1.0)) is None, "one request for each replica is no backlog"


@pytest.mark.parametrize(("ratio", "asked"), [(0.0, True), (0.5, True), (1.5, False)])
def test_only_a_knob_that_adds_capacity_goes_before_a_replica(ratio: float, asked: bool) -> None:
    knob = Proposal("any", (KnobChange("numWorkers", 8, 4),), "p95", 0.5, "", ratio=ratio)
    found = replicas_up(loaded(92.0, waiting=5000.0), KNOWN, Plan(canary=knob))
    assert isinstance(found, Proposal) is asked


def test_a_scale_in_is_no_rise_of_the_load() -> None:
    """What a replica that is gone took in is missing in the long window."""
    rising = loaded(75.0, rising=1.2)
    gone = replace(KNOWN, reported=(Reported("scale-in:4->3", NOW - 59),))
    assert foreseen(rising) is not None
    assert foreseen(rising, gone) is None
    assert foreseen(rising, replace(KNOWN, reported=(Reported("scale-in:4->3", NOW - 60),))) is not None


def test_a_new_replica_has_no_backlog_of_the_old_ones() -> None:
    queued = loaded(92.0, waiting=1700.0)
    assert foreseen(queued) is not None
    first, *others = queued.observation.replicas
    assert first.sample is not None
    sample = replace(first.sample, coverage_s=5.0, gauges=replace(first.sample.gauges, waiting=0.0))
    with_new = (replace(first, sample=sample), *others)
    assert foreseen(context_of(replace(queued.observation, replicas=with_new))) is None


def test_while_no_knob_may_be_changed_no_slots_are_expected() -> None:
    open_ = loaded(25.0, config=NARROW)
    young = context_of(
        replace(
            open_.observation,
            replicas=tuple(
                replace(item, sample=replace(item.sample, coverage_s=10.0))
                for item in open_.observation.replicas
                if item.sample is not None
            ),
        )
    )
    assert foreseen(open_) is None, "with more slots they complete it"
    assert foreseen(young) is not None


def test_replicas_that_are_asked_for_count_as_capacity() -> None:
    assert foreseen(loaded(110.0)) == 4
    assert foreseen(loaded(110.0, desired_replicas=4)) is None


def test_growth_is_bounded_at_once() -> None:
    # The engines are measured with a load a hundredfold of what they could complete.
    assert foreseen(loaded(4000.0)) == max(2 * 3, 3 + 4)


@pytest.mark.parametrize(
    ("state", "policy"),
    [
        (KNOWN, policy_of(bounds={**CATALOGUE_BOUNDS, "numWorkers": KnobBounds("numWorkers", 1, 2)})),
        (
            KNOWN,
            policy_of(bounds={**CATALOGUE_BOUNDS, "numWorkers": KnobBounds("numWorkers", 1, 64, tune=False)}),
        ),
        (KNOWN, policy_of(disabled_rules=frozenset({"workers-up"}))),
        (replace(KNOWN, blocked_values=(BlockedValue("numWorkers", 16, NOW + 9),)), policy_of()),
        (replace(KNOWN, reversals=(Reversal("numWorkers", NOW - 9),) * 2), policy_of()),
    ],
    ids=["bound", "excluded", "disabled", "blocked", "flap budget"],
)
def test_slots_that_may_not_be_given_are_not_counted(state: TuningState, policy: Policy) -> None:
    busy = loaded(25.0, config=NARROW, policy=policy)
    assert foreseen(loaded(25.0, config=NARROW)) is None, "with more slots they complete it"
    assert foreseen(busy, state) is not None


def test_without_a_curve_nothing_is_foreseen() -> None:
    seen = observe(*many(3, rate=500.0), config=WIDE)
    assert foreseen(context_of(seen)) is None
