"""The number of replicas: bounds, conflicts, need, and what is only advised."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.operator.tuning.observations import (
    BAD,
    DOWN,
    GOOD,
    NOW,
    context_of,
    curve,
    gauges,
    observe,
    replica,
    three,
)
from tests.operator.tuning.policies import policy_of

from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.decision import Decision, Scale
from kvpilot_operator.tuning.observation import Boost, Observation, ObservedReplica
from kvpilot_operator.tuning.policy import Scaling
from kvpilot_operator.tuning.sizing import needed_replicas
from kvpilot_operator.tuning.state import ReplicaMark, Strain, TuningState

KNOWN = TuningState(last_generation=1)
IDLE_LONG = replace(KNOWN, scale_down=(ReplicaMark(NOW - 70, 1), ReplicaMark(NOW - 15, 1)))
WIDE = {"numWorkers": 16, "batchSize": 16}
SATURATED: dict[str, Any] = {
    "attained": BAD,
    "busy": 0.97,
    "gauges": gauges(marginal_gain=0.05, waiting=9.0),
    "stages": {"admission_wait": 1.0, "decode": 0.4},
}


def scaled(decision: Decision) -> list[tuple[int, str]]:
    return [(action.replicas, action.reason) for action in decision.actions if isinstance(action, Scale)]


def context(observation: Observation, state: TuningState = KNOWN, **policy: Any) -> Decision:
    return decide(observation, state, policy_of(**policy), NOW)


def test_saturation_asks_for_what_the_arrivals_need() -> None:
    decision = context(observe(*three(done=0.5, **SATURATED), config=WIDE), scaling=Scaling(1, 20))
    # Twice as much arrives as is completed: 3 x 2 / 0.8 = 7.5, and at most max(2 x 3, 3 + 4) at once.
    assert scaled(decision) == [(7, "replicas-up")]
    assert decision.records[0].summary == (
        "The device is saturated (97% of the time in steps, more rows gain little); replicas 3 -> 7."
    )
    assert decision.state.cooldown_until == NOW + 10, "one short window: then the windows show it"


def test_saturation_without_a_breach_is_no_reason() -> None:
    calm = {**SATURATED, "attained": {"p50": 0.9, "p95": 0.99, "p99": 1.0}}
    assert scaled(context(observe(*three(**calm), config=WIDE))) == []


def test_a_backlog_that_goes_by_itself_asks_for_nothing_more() -> None:
    """As after a scale-out: the device is full, requests were late, and the queue is getting shorter."""
    drains = {**SATURATED, "done": 1.25, "gauges": gauges(marginal_gain=0.05, waiting=90.0)}
    decision = context(observe(*three(**drains), config=WIDE))
    assert scaled(decision) == []
    assert [(h.reason, h.message) for h in decision.state.holds] == [
        ("Draining", "the backlog is draining; no change until it is empty")
    ]
    assert decision.state.cooldown_until == NOW + 10
    endless = {**drains, "gauges": gauges(marginal_gain=0.05, waiting=900.0)}
    assert scaled(context(observe(*three(**endless), config=WIDE))) == [(4, "replicas-up")]


@pytest.mark.parametrize(
    ("scaling", "reported"),
    [
        (Scaling(1, 3), "replicas-up: AtBound, the maximum is 3"),
        (Scaling(1, 6, direction="InOnly"), "replicas-up: NotTunable, spec.scaling.direction is InOnly"),
        (None, "replicas-up: ReplicasFixed, spec.replicas fixes the number of replicas"),
    ],
)
def test_why_no_capacity_is_added(scaling: Scaling | None, reported: str) -> None:
    decision = context(observe(*three(**SATURATED), config=WIDE), scaling=scaling)
    assert scaled(decision) == []
    holds = {hold.reason: hold.message for hold in decision.state.holds}
    assert holds["NoRemedy"] == (
        "kvpilot knows no change that would help with admission wait "
        f"(workers-up: DeviceSaturated; {reported})"
    )


def test_pending_pods_count_as_capacity() -> None:
    waiting = replace(
        replica("chat-9"), ready=False, sample=None, engine=None, pending_reason="Unschedulable"
    )
    asked = observe(*three(**SATURATED), waiting, config=WIDE, desired_replicas=4)
    assert scaled(context(asked)) == [], "3 / 0.8 = 4, and 4 are asked for already"


WAITING: dict[str, Any] = {
    "attained": BAD,
    "rows": 8,
    "row_rate": 8 / curve()[8],
    "busy": 1.0,
    "rate": 80.0,
    "gauges": gauges(curve=curve(), waiting=9.0),
    "stages": {"admission_wait": 1.0, "decode": 0.4},
}
"""Requests wait for admission although the curve shows room, and no knob may be changed for it."""
FIXED: dict[str, Any] = {"disabled_rules": frozenset({"workers-up"})}


def new(seconds: float, item: ObservedReplica) -> ObservedReplica:
    """The replica as it is so many seconds after it began to serve."""
    assert item.sample is not None
    return replace(item, sample=replace(item.sample, coverage_s=seconds))


@pytest.mark.parametrize(("seconds", "asked"), [(9.0, []), (10.0, [(5, "replicas-up")])])
def test_a_replica_that_the_short_window_does_not_show_is_credited(
    seconds: float, asked: list[tuple[int, str]]
) -> None:
    many = (*three(**WAITING), new(seconds, replica("chat-3", **WAITING)))
    decision = context(observe(*many, config=WIDE), scaling=Scaling(1, 9), **FIXED)
    assert scaled(decision) == asked, "3 / 0.8 = 4 serve already"


def test_requests_that_wait_in_spite_of_room_are_remembered() -> None:
    first = context(observe(*three(**WAITING), config=WIDE), **FIXED)
    used = 80.0 / 124.4  # requests/s of each replica, over what one completes with 16 rows
    assert scaled(first) == [(5, "replicas-up")], "3 / 0.64"
    strain = first.state.strain
    assert strain is not None
    assert strain == Strain(pytest.approx(0.64 * used, abs=0.01), NOW + 12 * 60)
    calm = observe(*three(**{**WAITING, "attained": GOOD, "gauges": gauges(curve=curve())}), config=WIDE)
    assert scaled(context(calm)) == [], "the curve shows room"
    strained = replace(KNOWN, strain=Strain(0.5, NOW + 1))
    again = context(calm, strained)
    assert scaled(again) == [(4, "replicas-up")]
    assert again.records[0].summary == (
        "240.0 requests/s are expected within 64 s, and 3 replicas complete 373.3, "
        "53% of it without a queue; replicas 3 -> 4."
    )
    assert context(calm, replace(KNOWN, strain=Strain(0.5, NOW))).state.strain is None, "it expires"


def test_a_load_that_rises_teaches_no_strain() -> None:
    """The mean of a window is below what arrives now."""
    late = {**WAITING, "done": 0.9}
    decision = context(observe(*three(**late), config=WIDE), **FIXED)
    assert (scaled(decision), decision.state.strain) == ([(5, "replicas-up")], None)


@pytest.mark.parametrize(("seconds", "asked", "learned"), [(19.0, 5, False), (20.0, 7, True)])
def test_a_backlog_that_a_new_replica_has_worked_off_teaches_no_strain(
    seconds: float, asked: int, learned: bool
) -> None:
    pods = (*three(**WAITING), new(seconds, replica("chat-3", **WAITING)))
    decision = context(observe(*pods, config=WIDE), scaling=Scaling(1, 9), **FIXED)
    assert scaled(decision) == [(asked, "replicas-up")]
    assert (decision.state.strain is not None) is learned


@pytest.mark.parametrize(("later", "asked", "learned"), [(4.0, 7, True), (5.0, 5, False)])
def test_a_deployment_that_began_at_once_shows_its_strain_in_its_first_window(
    later: float, asked: int, learned: bool
) -> None:
    pods = (*(new(15.0, item) for item in three(**WAITING)), new(15.0 - later, replica("chat-3", **WAITING)))
    decision = context(observe(*pods, config=WIDE), scaling=Scaling(1, 9), **FIXED)
    assert scaled(decision) == [(asked, "replicas-up")]
    assert (decision.state.strain is not None) is learned


def test_replicas_are_never_planned_for_less_than_two_fifths() -> None:
    few = {**WAITING, "rows": 4, "row_rate": 4 / curve()[4]}
    strain = context(observe(*three(**few), config=WIDE), **FIXED).state.strain
    assert strain == Strain(0.4, NOW + 12 * 60)


@pytest.mark.parametrize(("waiting", "asked"), [(1.0, []), (9.0, [(5, "replicas-up")])])
def test_first_requests_in_flight_are_no_overflow_without_a_queue(
    waiting: float, asked: list[tuple[int, str]]
) -> None:
    figures = {**WAITING, "rate": 20.0, "done": 0.85, "attained": GOOD, "stages": {"decode": 0.4}}
    pods = (new(10.0, item) for item in three(**{**figures, "gauges": gauges(waiting=waiting)}))
    assert scaled(context(observe(*pods, config=WIDE), **FIXED)) == asked


def test_another_manager_of_replicas_stops_scaling_but_not_tuning() -> None:
    breach = observe(
        *three(attained=BAD, stages={"admission_wait": 0.7, "decode": 0.3}),
        config={"numWorkers": 2, "batchSize": 2},
        replicas_managed_by="horizontal-pod-autoscaler",
    )
    decision = context(breach, scaling=Scaling(5, 9))
    assert scaled(decision) == []
    assert [(hold.reason, hold.message) for hold in decision.state.holds] == [
        (
            "FieldManagerConflict",
            "horizontal-pod-autoscaler writes the replicas as well; kvpilot does not scale",
        )
    ]
    assert [record.outcome for record in decision.records] == ["Started"]


@pytest.mark.parametrize(("scaling", "to"), [(Scaling(5, 9), 5), (Scaling(1, 2), 2)])
def test_bounds_are_kept_even_without_data(scaling: Scaling, to: int) -> None:
    blind = observe(*three(), metrics_problem=DOWN)
    assert scaled(context(blind, scaling=scaling)) == [(to, "replicas-bounds")]


@pytest.mark.parametrize("mode", ["Off", "Recommend", "Auto"])
@pytest.mark.parametrize(("scaling", "to"), [(Scaling(5, 9), 5), (Scaling(1, 2), 2)])
def test_bounds_are_kept_in_every_mode(mode: str, scaling: Scaling, to: int) -> None:
    boosts = (Boost("alert", 7, NOW + 60),)
    decision = context(observe(*three(), boosts=boosts), scaling=scaling, mode=mode)
    assert scaled(decision) == [(to, "replicas-bounds")]
    assert [record.replicas for record in decision.records] == [(3, to)]


@pytest.mark.parametrize(
    "held", [{"paused_by": "stop", "scaling_paused": True}, {"replicas_managed_by": "kubectl"}]
)
def test_bounds_wait_for_the_end_of_a_pause_of_scaling_or_of_a_conflict(held: dict[str, Any]) -> None:
    assert scaled(context(observe(*three(), **held), scaling=Scaling(5, 9), mode="Off")) == []


def test_a_handover_keeps_the_replicas_it_finds() -> None:
    busy = observe(*(replica(f"chat-{i}", busy=0.9) for i in range(5)), config=WIDE)
    assert scaled(context(busy, scaling=Scaling(2, 10))) == []


@pytest.mark.parametrize(
    ("busy", "held", "needed"),
    [(0.3, 0.08, 2), (0.9, 0.08, 4), (0.1, 0.6, 4), (0.0, 0.0, 0)],
)
def test_need_is_the_larger_one_of_stepping_and_slots(busy: float, held: float, needed: int) -> None:
    # ceil(3 x load x 1.15 / 0.8); 20 requests/s x ``held`` s over 16 slots.
    seen = context_of(observe(*three(busy=busy, stages={"decode": held}), config=WIDE))
    assert needed_replicas(seen, KNOWN) == needed


def test_idle_for_long_takes_one_pod() -> None:
    decision = context(observe(*three(busy=0.1), config=WIDE), IDLE_LONG)
    assert scaled(decision) == [(2, "replicas-down")]
    assert decision.records[0].summary == (
        "1 would have done for 1.15 times the load during the last 60 s; replicas 3 -> 2."
    )


@pytest.mark.parametrize(
    "state",
    [
        replace(IDLE_LONG, scale_down=(ReplicaMark(NOW - 50, 1), ReplicaMark(NOW - 15, 1))),  # too short
        replace(IDLE_LONG, scale_down=(ReplicaMark(NOW - 70, 1), ReplicaMark(NOW - 30, 1))),  # nobody looked
        replace(IDLE_LONG, scale_down=(ReplicaMark(NOW - 70, 3), ReplicaMark(NOW - 15, 1))),  # a peak
        replace(IDLE_LONG, cooldown_until=NOW + 1),
    ],
    ids=["short", "gap", "peak", "cooldown"],
)
def test_what_keeps_a_pod(state: TuningState) -> None:
    assert scaled(context(observe(*three(busy=0.1), config=WIDE), state)) == []


def test_no_scale_in_while_a_pod_is_not_ready() -> None:
    starting = replace(replica("chat-9"), ready=False)
    seen = observe(*three(busy=0.1), starting, config=WIDE, desired_replicas=4)
    assert scaled(context(seen, IDLE_LONG)) == []


def test_a_pause_of_tuning_leaves_bounds_in_force() -> None:
    seen = observe(*three(), paused_by="stop")
    assert scaled(context(seen, scaling=Scaling(5, 9))) == [(5, "replicas-bounds")]


@pytest.mark.parametrize(("scaling_paused", "boosted"), [(False, [(5, "boost")]), (True, [])])
def test_a_pause_stops_boosts_only_if_it_is_asked_to(
    scaling_paused: bool, boosted: list[tuple[int, str]]
) -> None:
    boosts = (Boost("alert", 5, NOW + 60),)
    seen = observe(*three(), paused_by="stop", scaling_paused=scaling_paused, boosts=boosts)
    decision = context(seen)
    assert scaled(decision) == boosted
    assert [hold.reason for hold in decision.state.holds] == ["Paused"]


def test_a_boost_stays_within_the_maximum_and_ends_with_its_time() -> None:
    boosted = observe(*three(), boosts=(Boost("alert", 50, NOW + 60),))
    expired = observe(*three(), boosts=(Boost("alert", 50, NOW - 1),))
    assert scaled(context(boosted)) == [(6, "boost")]
    assert scaled(context(expired)) == []


def test_recommend_advises_replicas_once() -> None:
    seen = observe(*three(done=0.5, **SATURATED), config=WIDE)
    first = context(seen, mode="Recommend")
    again = context(seen, first.state, mode="Recommend")
    assert [(r.outcome, r.replicas) for r in first.records] == [("Recommended", (3, 6))]
    assert first.records[0].summary.endswith("replicas 3 -> 6 should help, which kvpilot leaves to you.")
    assert (first.actions, again.actions, again.records) == ((), (), ())


def test_a_scale_in_lets_the_coldest_go_first_and_before_it_what_cannot_be_measured() -> None:
    cold, warm, warmer = (
        replica(f"chat-{index}", rate=0.5, gauges=gauges(cached_bytes=held))
        for index, held in enumerate((100.0, 500.0, 900.0))
    )
    seen = observe(warm, warmer, cold, config=WIDE)
    (action,) = (a for a in context(seen, IDLE_LONG).actions if isinstance(a, Scale))
    assert action.first == ("uid-chat-0",)
    many = [replica(f"more-{index}", rate=0.1) for index in range(20)]
    unknown = replace(warmer, sample=None)
    seen = observe(cold, unknown, *many, config=WIDE)
    marks = replace(KNOWN, scale_down=(ReplicaMark(NOW - 70, 20), ReplicaMark(NOW - 15, 20)))
    (action,) = (a for a in context(seen, marks, scaling=Scaling(1, 30)).actions if isinstance(a, Scale))
    assert (action.replicas, action.first) == (21, ("uid-chat-2",))
