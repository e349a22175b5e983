"""The number of replicas: bounds, conflicts, need, and what is only advised."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.tuning.observations import BAD, NOW, gauges, look_at, observe, pod, three
from tests.tuning.simulation import policy_of

from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.decision import Decision, Scale
from kvpilot_operator.tuning.observation import Boost, Observation
from kvpilot_operator.tuning.policy import Scaling
from kvpilot_operator.tuning.scaling import needed_replicas
from kvpilot_operator.tuning.state import ReplicaMark, TuningState

KNOWN = TuningState(last_generation=1)
IDLE_LONG = replace(KNOWN, scale_down=(ReplicaMark(NOW - 130, 1), ReplicaMark(NOW - 15, 1)))
WIDE = {"numWorkers": 16, "batchSize": 16}
SATURATED: dict[str, Any] = {
    "attained": BAD,
    "busy": 0.97,
    "gauges": gauges(marginal_gain=0.05, waiting=9.0),
    "stages": {"admission_wait": 1.0, "decode": 0.4},
}


def scaled(decision: Decision) -> list[tuple[int, str]]:
    return [(action.replicas, action.reason) for action in decision.actions if isinstance(action, Scale)]


def look(observation: Observation, state: TuningState = KNOWN, **policy: Any) -> Decision:
    return decide(observation, state, policy_of(**policy), NOW)


def test_saturation_asks_for_what_the_arrivals_need() -> None:
    decision = look(observe(*three(done=0.5, **SATURATED), config=WIDE), scaling=Scaling(1, 20))
    # Twice as much arrives as is completed: 3 x 2 / 0.8 = 7.5, and at most max(2 x 3, 3 + 4) at once.
    assert scaled(decision) == [(7, "replicas-up")]
    assert decision.records[0].summary == (
        "The device is saturated (97% of the time in steps, more rows gain little); replicas 3 -> 7."
    )
    assert decision.state.cooldown_until == NOW + 30


def test_saturation_without_a_breach_is_no_reason() -> None:
    calm = {**SATURATED, "attained": {"p50": 0.9, "p95": 0.99, "p99": 1.0}}
    assert scaled(look(observe(*three(**calm), config=WIDE))) == []


def test_a_backlog_that_goes_by_itself_asks_for_nothing_more() -> None:
    """As after a scale-out: the device is full, requests were late, and the queue is getting shorter."""
    drains = {**SATURATED, "done": 1.25, "gauges": gauges(marginal_gain=0.05, waiting=90.0)}
    decision = look(observe(*three(**drains), config=WIDE))
    assert scaled(decision) == []
    assert [(h.reason, h.message) for h in decision.state.holds] == [
        ("Draining", "the backlog is being worked off, and goes by itself")
    ]
    assert decision.state.cooldown_until == NOW + 10
    endless = {**drains, "gauges": gauges(marginal_gain=0.05, waiting=900.0)}
    assert scaled(look(observe(*three(**endless), config=WIDE))) == [(4, "replicas-up")]


@pytest.mark.parametrize(
    ("scaling", "told"),
    [
        (Scaling(1, 3), "replicas-up: AtBound, the maximum is 3"),
        (Scaling(1, 6, direction="InOnly"), "replicas-up: the direction is InOnly"),
        (None, "replicas are chosen by somebody else"),
    ],
)
def test_why_no_capacity_is_added(scaling: Scaling | None, told: str) -> None:
    decision = look(observe(*three(**SATURATED), config=WIDE), scaling=scaling)
    assert scaled(decision) == []
    holds = {hold.reason: hold.message for hold in decision.state.holds}
    assert holds["NoRemedy"] == (
        f"no rule promises relief for admission_wait (workers-up: DeviceSaturated; {told})"
    )


def test_pending_pods_count_as_capacity() -> None:
    waiting = replace(pod("chat-9"), ready=False, sample=None, engine=None, pending_reason="Unschedulable")
    asked = observe(*three(**SATURATED), waiting, config=WIDE, replicas=4)
    assert scaled(look(asked)) == [], "3 / 0.8 = 4, and 4 are asked for already"


def test_another_manager_of_replicas_stops_scaling_but_not_tuning() -> None:
    breach = observe(
        *three(attained=BAD, stages={"admission_wait": 0.7, "decode": 0.3}),
        config={"numWorkers": 2, "batchSize": 2},
        replicas_managed_by="horizontal-pod-autoscaler",
    )
    decision = look(breach, scaling=Scaling(5, 9))
    assert scaled(decision) == []
    assert [(hold.reason, hold.message) for hold in decision.state.holds] == [
        (
            "ActuatorConflict",
            "horizontal-pod-autoscaler writes the replicas as well; kvpilot does not scale",
        )
    ]
    assert [record.outcome for record in decision.records] == ["Started"]


@pytest.mark.parametrize(("scaling", "to"), [(Scaling(5, 9), 5), (Scaling(1, 2), 2)])
def test_bounds_are_kept_even_without_data(scaling: Scaling, to: int) -> None:
    blind = observe(*three(), metrics_problem="prometheus default: timed out")
    assert scaled(look(blind, scaling=scaling)) == [(to, "replicas-bounds")]


@pytest.mark.parametrize("mode", ["Off", "Recommend", "Auto"])
@pytest.mark.parametrize(("scaling", "to"), [(Scaling(5, 9), 5), (Scaling(1, 2), 2)])
def test_bounds_are_kept_in_every_mode(mode: str, scaling: Scaling, to: int) -> None:
    boosts = (Boost("alert", 7, NOW + 60),)
    decision = look(observe(*three(), boosts=boosts), scaling=scaling, mode=mode)
    assert scaled(decision) == [(to, "replicas-bounds")]
    assert [record.replicas for record in decision.records] == [(3, to)]


@pytest.mark.parametrize("held", [{"paused_by": "stop"}, {"replicas_managed_by": "kubectl"}])
def test_bounds_wait_for_the_end_of_a_pause_or_of_a_conflict(held: dict[str, str]) -> None:
    assert scaled(look(observe(*three(), **held), scaling=Scaling(5, 9), mode="Off")) == []


def test_a_handover_keeps_the_replicas_it_finds() -> None:
    busy = observe(*(pod(f"chat-{i}", busy=0.9) for i in range(5)), config=WIDE)
    assert scaled(look(busy, scaling=Scaling(2, 10))) == []


@pytest.mark.parametrize(
    ("busy", "held", "needed"),
    [(0.3, 0.08, 2), (0.9, 0.08, 4), (0.1, 0.6, 4), (0.0, 0.0, 0)],
)
def test_need_is_the_larger_one_of_stepping_and_slots(busy: float, held: float, needed: int) -> None:
    # ceil(3 x load x 1.15 / 0.8); 20 requests/s x ``held`` s over 16 slots.
    seen = look_at(observe(*three(busy=busy, stages={"decode": held}), config=WIDE))
    assert needed_replicas(seen) == needed


def test_idle_for_long_takes_one_pod() -> None:
    decision = look(observe(*three(busy=0.1), config=WIDE), IDLE_LONG)
    assert scaled(decision) == [(2, "replicas-down")]
    assert decision.records[0].summary == (
        "1 would have done for 1.15 times the load during the last 120 s; replicas 3 -> 2."
    )


@pytest.mark.parametrize(
    "state",
    [
        replace(
            IDLE_LONG, scale_down=(ReplicaMark(NOW - 100, 1), ReplicaMark(NOW - 15, 1))
        ),  # not long enough
        replace(IDLE_LONG, scale_down=(ReplicaMark(NOW - 130, 1), ReplicaMark(NOW - 60, 1))),  # nobody looked
        replace(IDLE_LONG, scale_down=(ReplicaMark(NOW - 110, 3), ReplicaMark(NOW - 15, 1))),  # a peak
        replace(IDLE_LONG, cooldown_until=NOW + 1),
    ],
    ids=["short", "gap", "peak", "cooldown"],
)
def test_what_keeps_a_pod(state: TuningState) -> None:
    assert scaled(look(observe(*three(busy=0.1), config=WIDE), state)) == []


def test_no_scale_in_while_a_pod_is_not_ready() -> None:
    starting = replace(pod("chat-9"), ready=False)
    seen = observe(*three(busy=0.1), starting, config=WIDE, replicas=4)
    assert scaled(look(seen, IDLE_LONG)) == []


def test_a_paused_resource_is_not_boosted() -> None:
    seen = observe(*three(), paused_by="stop", boosts=(Boost("alert", 5, NOW + 60),))
    decision = look(seen)
    assert scaled(decision) == []
    assert [hold.reason for hold in decision.state.holds] == ["Paused"]


def test_a_boost_stays_within_the_maximum_and_ends_with_its_time() -> None:
    boosted = observe(*three(), boosts=(Boost("alert", 50, NOW + 60),))
    expired = observe(*three(), boosts=(Boost("alert", 50, NOW - 1),))
    assert scaled(look(boosted)) == [(6, "boost")]
    assert scaled(look(expired)) == []


def test_recommend_advises_replicas_once() -> None:
    seen = observe(*three(done=0.5, **SATURATED), config=WIDE)
    first = look(seen, mode="Recommend")
    again = look(seen, first.state, mode="Recommend")
    assert [(r.outcome, r.replicas) for r in first.records] == [("Recommended", (3, 6))]
    assert first.records[0].summary.endswith("replicas 3 -> 6 is recommended.")
    assert (first.actions, again.actions, again.records) == ((), (), ())
