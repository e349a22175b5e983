"""Limits over all resources of one operator."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.operator.tuning.experiments import change

from kvpilot_operator.reconcile.fleet import HOUR_S, Fleet, running_rules
from kvpilot_operator.status.codec import tuning_status
from kvpilot_operator.status.model import DecisionStatus, Status
from kvpilot_operator.status.snapshot import Key
from kvpilot_operator.tuning.decision import Decision, DecisionOutcome, Record
from kvpilot_operator.tuning.observation import FleetLimits
from kvpilot_operator.tuning.state import Phase, TuningState

IDLE = TuningState()
BUSY = TuningState(phase=Phase.VERIFY, change=change())


class Clock:
    """A clock that stands still until it is moved."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def keys(count: int) -> list[Key]:
    return [Key("default", f"chat-{index}") for index in range(count)]


def fleet_of(clock: Clock, count: int, busy: int = 0, rules: str = "new") -> Fleet:
    fleet = Fleet(clock, rules=rules)
    states = [BUSY] * busy + [IDLE] * (count - busy)
    fleet.rebuild({key: Status(tuning=tuning_status(s)) for key, s in zip(keys(count), states, strict=True)})
    return fleet


def waits(limits: FleetLimits) -> str:
    return "" if limits.waits is None else limits.waits[0]


def reverted(
    number: int, at: float, verdict: str = "Harmful", outcome: DecisionOutcome = "Reverted"
) -> Decision:
    record = Record(f"d-{number:04d}", at, "workers-up", outcome, "", None, (), evidence={"verdict": verdict})
    return Decision(IDLE, records=(record,))


@pytest.mark.parametrize(
    ("count", "busy", "reason"),
    [(1, 0, ""), (3, 0, ""), (3, 1, "FleetLimit"), (39, 1, "FleetLimit"), (40, 1, ""), (40, 2, "FleetLimit")],
)
def test_one_resource_or_5_percent_of_them_change_at_a_time(
    clock: Clock, count: int, busy: int, reason: str
) -> None:
    fleet = fleet_of(clock, count, busy)
    assert waits(fleet.limits(keys(count)[-1], IDLE)) == reason
    if busy:
        assert waits(fleet.limits(keys(count)[0], BUSY)) == "", "its own change takes no second slot"


def test_a_slot_is_taken_by_the_decision_and_freed_by_the_end_of_the_change(clock: Clock) -> None:
    fleet = fleet_of(clock, 3)
    first, second, _ = keys(3)
    fleet.note(first, Decision(BUSY))
    assert waits(fleet.limits(second, IDLE)) == "FleetLimit"
    fleet.note(first, Decision(IDLE))
    assert waits(fleet.limits(second, IDLE)) == ""
    fleet.note(first, Decision(BUSY))
    fleet.forget(first)
    assert waits(fleet.limits(second, IDLE)) == ""


def test_a_resource_that_is_gone_frees_its_slot_at_the_next_rebuild(clock: Clock) -> None:
    fleet = fleet_of(clock, 3, busy=1)
    fleet.rebuild({key: Status() for key in keys(3)[1:]})
    assert waits(fleet.limits(keys(3)[1], IDLE)) == ""


def test_three_harmful_changes_within_an_hour_send_a_rule_to_recommend_for_an_hour(clock: Clock) -> None:
    fleet = fleet_of(clock, 3)
    first, second, third = keys(3)
    assert fleet.note(first, reverted(1, clock.now)) == ()
    assert fleet.note(first, reverted(1, clock.now)) == (), "the same one after a conflict"
    assert fleet.note(second, reverted(1, clock.now, "NoGain")) == ()
    assert fleet.note(second, reverted(2, clock.now, outcome="Promoted")) == ()
    clock.now += 1800
    assert fleet.note(second, reverted(3, clock.now)) == ()
    clock.now += 1700
    assert fleet.note(third, reverted(1, clock.now)) == ("workers-up",)
    assert fleet.note(third, reverted(1, clock.now)) == ()
    assert fleet.limits(first, IDLE).recommend_only == {"workers-up"}
    clock.now += HOUR_S - 1
    assert fleet.recommend_only() == {"workers-up"}
    clock.now += 2
    assert fleet.recommend_only() == frozenset()


def test_harm_spread_over_more_than_an_hour_bars_no_rule(clock: Clock) -> None:
    fleet = fleet_of(clock, 3)
    for number in range(5):
        fleet.note(keys(3)[0], reverted(number, clock.now))
        clock.now += 0.6 * HOUR_S
    assert fleet.recommend_only() == frozenset()


def test_a_restart_forgets_no_harm(clock: Clock) -> None:
    def harmed(at: float) -> Status:
        done = DecisionStatus(
            id="d-0001", at=at, rule="workers-up", outcome="Reverted", summary="", verdict="Harmful"
        )
        return Status(decisions=(done,))

    fleet = Fleet(clock, rules="new")
    fleet.rebuild({key: harmed(clock.now - 60) for key in keys(3)})
    assert fleet.recommend_only() == {"workers-up"}


def test_after_an_upgrade_new_rules_act_on_5_percent_for_an_hour(clock: Clock) -> None:
    fleet = fleet_of(clock, 40)
    old = TuningState(rules_hash="old")
    limits = {key: fleet.limits(key, old) for key in keys(40)}
    acting = [key for key, found in limits.items() if found.waits is None]
    assert len(acting) == 2
    assert {found.rules_hash for key, found in limits.items() if key in acting} == {"new"}
    others = [found for key, found in limits.items() if key not in acting]
    assert {(waits(found), found.rules_hash) for found in others} == {("UpgradeTrial", "")}
    clock.now += HOUR_S
    assert all(fleet.limits(key, old).waits is None for key in keys(40))
    assert fleet.limits(keys(40)[0], old).rules_hash == "new"


@pytest.mark.parametrize("rules_hash", ["", "new"])
def test_a_new_resource_or_the_same_rules_are_no_upgrade(clock: Clock, rules_hash: str) -> None:
    fleet = fleet_of(clock, 40)
    limits = [fleet.limits(key, replace(IDLE, rules_hash=rules_hash)) for key in keys(40)]
    assert {(found.waits, found.rules_hash) for found in limits} == {(None, "new")}


def test_the_running_rules_have_a_digest() -> None:
    assert len(running_rules()) == 8
    assert int(running_rules(), 16) >= 0


def test_the_kill_switch_reaches_every_resource(clock: Clock) -> None:
    fleet = fleet_of(clock, 2)
    fleet.off = "the operator runs with --tuning=off"
    assert {fleet.limits(key, IDLE).off for key in keys(2)} == {fleet.off}
