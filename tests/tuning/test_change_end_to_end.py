"""``decide`` driven from end to end against simulated engines: breach -> diagnosis -> change -> verdict."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from tests.tuning.simulation import PRODUCTION, Model, Simulation, policy_of

from kvpilot_operator.tuning.configuration import value
from kvpilot_operator.tuning.decision import Push
from kvpilot_operator.tuning.observation import Boost
from kvpilot_operator.tuning.policy import Scaling
from kvpilot_operator.tuning.state import Phase, TuningState

SMALL = {"numWorkers": 2, "batchSize": 2}
WIDE = {"numWorkers": 16, "batchSize": 16}
KNOBS_ONLY = policy_of(scaling=None)


def overload(seconds: float) -> float:
    """20 requests/s, and after 60 s what two workers per engine cannot hold but the device can."""
    return 20.0 if seconds < 60 else 120.0


def settled(sim: Simulation) -> None:
    """What must hold whenever no change is in flight: everybody runs what the ConfigMap says."""
    assert sim.state.change is None
    assert {engine.generation for engine in sim.engines} == {sim.promoted.generation}
    for engine in sim.engines:
        assert {name: engine.config[name] for name in sim.promoted.config} == sim.promoted.config


def test_breach_by_too_few_workers_is_cured_on_a_canary_and_promoted() -> None:
    sim = Simulation(SMALL, policy_of(), load=overload)
    sim.run(260, until=lambda s: "Promoted" in s.outcomes() and s.state.met_ticks == 3)

    assert sim.outcomes() == ["Started", "Promoted"], sim.told()
    started, promoted = sim.records
    assert (started.rule, started.id) == ("workers-up", "d-0001")
    assert started.diagnosis is not None
    assert (started.diagnosis.reason, started.diagnosis.stage) == ("QueueAtAdmission", "admission_wait")
    assert "trying numWorkers 2 -> 4, batchSize 2 -> 4 on chat-0 against chat-1, chat-2" in started.summary
    assert promoted.id == "d-0001"
    assert promoted.evidence["verdict"] == "Promoted"
    assert promoted.evidence["gain"] >= promoted.evidence["predictedGain"] / 2
    assert "p95 within 500 ms rose from 0% to 100%" in promoted.summary
    assert promoted.summary.endswith("promoted as generation 2.")
    assert (sim.promoted.generation, sim.promoted.config) == (2, {"numWorkers": 4, "batchSize": 4})
    assert [(o.knob, o.based_on, o.value, o.decision) for o in sim.state.overlay] == [
        ("numWorkers", 2, 4, "d-0001"),
        ("batchSize", 2, 4, "d-0001"),
    ]
    assert sim.replicas == 3, "a knob cured it, so no replica was added"
    settled(sim)


def test_the_phases_of_a_change_follow_each_other() -> None:
    sim = Simulation(SMALL, KNOBS_ONLY, load=overload).run(240)
    phases = [decision.state.phase for _, decision in sim.decisions]
    order = [phase for phase, before in zip(phases, [None, *phases], strict=False) if phase is not before]
    assert order == [
        Phase.HOLD,  # too young to be judged
        Phase.OBSERVE,
        Phase.CANARY,
        Phase.SETTLE,
        Phase.VERIFY,
        Phase.PROMOTE,
        Phase.COOLDOWN,
        Phase.OBSERVE,
    ]
    pushed = [(at, action.uid) for at, d in sim.decisions for action in d.actions if isinstance(action, Push)]
    assert pushed[0][1] == "u0", "the canary alone gets the candidate first"
    assert sorted(uid for _, uid in pushed[1:]) == ["u1", "u2"]
    assert pushed[1][0] - pushed[0][0] >= 15 + 45, "not before settle and verify are over"


def test_no_second_change_begins_while_the_first_one_works_the_backlog_off() -> None:
    def surge(seconds: float) -> float:
        return 20.0 if seconds < 60 else 80.0 if seconds < 150 else 70.0

    patient = Model(queue=10_000, timeout=600.0)
    sim = Simulation({"numWorkers": 1, "batchSize": 1}, KNOBS_ONLY, load=surge, model=patient)
    sim.run(600, until=lambda s: "Promoted" in s.outcomes())
    assert sum(len(engine.waiting) for engine in sim.engines) > 1000
    sim.run(300, until=lambda s: s.state.met_ticks == 3)
    assert sim.outcomes() == ["Started", "Promoted"], sim.told()
    held = [at for at, decision in sim.decisions if "Draining" in {h.reason for h in decision.state.holds}]
    assert held, "the cooldown was over before the backlog was gone"


def test_without_tuning_the_breach_stays() -> None:
    sim = Simulation(SMALL, policy_of(mode="Off"), load=overload).run(200)
    assert sim.records == []
    assert [action for _, decision in sim.decisions for action in decision.actions] == []
    assert "Breached" in {item.state for item in sim.decisions[-1][1].objectives}


def test_recommend_advises_once_and_changes_nothing() -> None:
    sim = Simulation(SMALL, policy_of(mode="Recommend"), load=overload).run(200)
    keys = [(r.rule, r.changes, r.replicas) for r in sim.records]
    assert set(sim.outcomes()) == {"Recommended"}
    assert len(keys) == len(set(keys)), "nothing is advised twice"
    assert sim.records[0].summary.endswith(
        "numWorkers 2 -> 4, batchSize 2 -> 4 is recommended, predicted gain 43%."
    )
    assert (sim.promoted.config, sim.replicas) == (SMALL, 3)


def test_a_harmful_change_is_taken_back_and_barred() -> None:
    harmful = Model(tax=lambda config: 0.08 if value(config, "numWorkers") > 2 else 0.0)
    sim = Simulation(SMALL, KNOBS_ONLY, load=overload, model=harmful)
    sim.run(200, until=lambda s: s.state.phase is Phase.COOLDOWN)

    assert sim.outcomes() == ["Started", "Reverted"], sim.told()
    reverted = sim.records[-1]
    assert "numWorkers 2 -> 4, batchSize 2 -> 4 was taken back (Harmful)" in reverted.summary
    assert reverted.summary.endswith("back to generation 1.")
    assert reverted.evidence["harmEValue"] >= 50
    assert [(b.knob, b.value, b.until) for b in sim.state.barred] == [("numWorkers", 4, reverted.at + 86_400)]
    assert [r.knob for r in sim.state.reversals] == ["numWorkers"]
    assert sim.promoted.config == SMALL
    settled(sim)


def test_a_change_without_effect_is_taken_back_until_the_flap_budget_is_spent() -> None:
    no_effect = Model(step_s=lambda rows: 0.016 * rows)
    sim = Simulation(SMALL, KNOBS_ONLY, load=overload, model=no_effect).run(400)
    assert sim.outcomes() == ["Started", "Reverted"] * 2, sim.told()
    assert all("(NoGain)" in record.summary for record in sim.records[1::2])
    assert ("FlapBudgetSpent", "numWorkers was taken back 2 times in 6 hours") in [
        (hold.reason, hold.message) for hold in sim.state.holds
    ]
    settled(sim)


CURES: list[tuple[str, Mapping[str, Any], Model, str, Mapping[str, Any], str]] = [
    (
        "memory",
        WIDE,
        Model(memory=lambda c: 0.5 + 0.4 * min(1.0, (value(c, "maxMemoryMb") or 200) / 200)),
        "memory-relief",
        {"maxMemoryMb": 100},
        "memory fell from 90% to 70%",
    ),
    (
        "hit rate",
        WIDE,
        Model(hits=lambda c: min(0.8, value(c, "maxTokens") / 8192)),
        "cache-quota-up",
        {"maxTokens": 6144},
        "the hit rate rose from 50% to 75%",
    ),
    (
        "tier load, prefetch",
        WIDE,
        Model(tier_s=lambda c: 4.0 / (4 + value(c, "prefetchSize")), prefetched=lambda c: (2.0, 0.1)),
        "prefetch-up",
        {"prefetchSize": 8},
        "mean time fell from 0.5",
    ),
    (
        "wasted prefetch",
        WIDE,
        Model(prefetched=lambda c: (0.3, float(value(c, "prefetchSize")))),
        "prefetch-down",
        {"prefetchSize": 2},
        "wasted blocks per request fell from 4.00 to 2.00",
    ),
    (
        "tier load, codec",
        {**WIDE, "prefetchSize": 64},
        Model(tier_s=lambda c: {0.3: 1.2, 0.52: 0.4, 1.0: 0.01}[value(c, "compressionRatio")], decoding=0.9),
        "compression-looser",
        {"compressionRatio": 0.52, "hostMemoryMb": 416},
        "rose from 0% to 100%",
    ),
]


@pytest.mark.parametrize(
    ("base", "model", "rule", "after", "told"), [c[1:] for c in CURES], ids=[c[0] for c in CURES]
)
def test_each_rule_cures_its_breach(
    base: Mapping[str, Any], model: Model, rule: str, after: Mapping[str, Any], told: str
) -> None:
    policy = policy_of(scaling=None, objectives=PRODUCTION)
    if rule != "cache-quota-up":
        policy = KNOBS_ONLY
    sim = Simulation(base, policy, load=lambda _: 30.0, model=model)
    sim.run(150, until=lambda s: s.state.phase is Phase.COOLDOWN)
    assert [(r.rule, r.outcome) for r in sim.records] == [(rule, "Started"), (rule, "Promoted")], sim.told()
    assert told in sim.records[-1].summary
    assert sim.promoted.config == {**base, **after}
    settled(sim)


def test_memory_nearly_exhausted_halves_the_batch_at_once_everywhere() -> None:
    model = Model(memory=lambda c: 0.6 + 0.4 * value(c, "batchSize") / 16)
    sim = Simulation(WIDE, KNOBS_ONLY, load=lambda _: 30.0, model=model).run(120)
    assert [(r.rule, r.outcome, r.summary) for r in sim.records] == [
        (
            "memory-emergency",
            "Promoted",
            "Memory was at 100% of its limit; batchSize 16 -> 8 on all engines at once, generation 2.",
        )
    ]
    assert sim.promoted.config == {"numWorkers": 16, "batchSize": 8}
    settled(sim)


def test_a_control_too_slow_to_end_many_requests_does_not_deny_the_cure() -> None:
    # One row takes 1.7 s: 0.6 requests/s an engine, 1.1 are sent. Four rows complete 2 a second.
    slow = Model(step_s=lambda rows: 0.4 + 0.02 * rows)
    wanted = replace(PRODUCTION, latency={"p50": (3.0, 0.5), "p95": (5.0, 0.95)}, hit_rate=0.0)
    policy = policy_of(scaling=None, objectives=wanted)
    sim = Simulation(
        {"numWorkers": 1, "batchSize": 1},
        policy,
        replicas=2,
        load=lambda t: 0.8 if t < 60 else 2.2,
        model=slow,
    )
    sim.run(420, until=lambda s: s.state.phase is Phase.COOLDOWN)
    assert sim.outcomes() == ["Started", "Promoted"], sim.told()
    told = sim.records[-1].evidence
    assert told["control"]["judged"] < 100 <= told["control"]["offered"]
    assert told["control"]["p95"] > 0.9
    assert told["canary"]["p95"] < 0.1


def test_memory_that_the_batch_does_not_cure_is_left_to_the_cache() -> None:
    sim = Simulation(WIDE, KNOBS_ONLY, load=lambda _: 30.0, model=Model(memory=lambda c: 0.97)).run(250)
    assert [(r.rule, r.outcome) for r in sim.records] == [
        ("memory-emergency", "Promoted"),
        ("memory-relief", "Started"),
        ("memory-relief", "Reverted"),
    ], sim.told()
    settled(sim)


# One replica


def test_one_replica_is_advised_only() -> None:
    sim = Simulation(SMALL, KNOBS_ONLY, replicas=1, load=lambda t: 10.0 if t < 60 else 35.0).run(120)
    assert set(sim.outcomes()) == {"Recommended"}
    assert [(hold.reason, hold.message) for hold in sim.state.holds] == [
        (
            "SingleReplica",
            "one replica has nothing to be compared with; spec.tuning.singleReplica: BeforeAfter allows it",
        )
    ]


def test_one_replica_before_and_after_is_labelled_unproven() -> None:
    policy = policy_of(scaling=None, single_replica="BeforeAfter")
    sim = Simulation(SMALL, policy, replicas=1, load=lambda t: 10.0 if t < 60 else 40.0)
    sim.run(200, until=lambda s: s.state.phase is Phase.COOLDOWN)
    assert sim.outcomes() == ["Started", "Promoted"], sim.told()
    assert "against its own past (one replica, unproven)" in sim.records[0].summary
    assert sim.records[1].summary.endswith("generation 2 (before/after on one replica, unproven).")
    assert sim.records[1].evidence["unproven"] is True
    settled(sim)


def test_the_past_of_one_replica_is_as_long_as_a_verdict_needs() -> None:
    slow = {"p50": (1.0, 0.5), "p95": (2.0, 0.95), "p99": (3.0, 0.99)}
    wanted = replace(PRODUCTION, hit_rate=0.0, latency=slow)
    policy = policy_of(scaling=None, single_replica="BeforeAfter", objectives=wanted)
    long_answers = Model(tokens=24, timeout=600.0)
    sim = Simulation(SMALL, policy, replicas=1, load=lambda t: 3 if t < 60 else 6, model=long_answers)
    sim.run(400, until=lambda s: s.state.phase is Phase.COOLDOWN)
    assert sim.outcomes() == ["Started", "Promoted"], sim.told()
    assert sim.records[1].evidence["control"]["judged"] >= 100, "ten seconds hold 50 requests"


# What calls an experiment off


def in_verify(policy: Any = None) -> Simulation:
    sim = Simulation(SMALL, policy or KNOBS_ONLY, load=overload)
    sim.run(200, until=lambda s: s.state.phase is Phase.VERIFY)
    assert sim.state.phase is Phase.VERIFY
    return sim


def lose(sim: Simulation, index: int) -> None:
    sim.engines.pop(index)
    sim.replicas -= 1


ABORTS: list[tuple[str, Callable[[Simulation], Any], str]] = [
    ("CanaryLost", lambda s: lose(s, 0), "the canary went away"),
    ("ControlLost", lambda s: lose(s, 1), "a control went away"),
    ("PodRestarted", lambda s: s.restart(s.engines[2]), "a pod of the experiment restarted"),
    ("Paused", lambda s: setattr(s, "paused_by", "stop"), "override stop is in force"),
    ("ModeChanged", lambda s: setattr(s, "policy", policy_of(mode="Off", scaling=None)), "the mode is Off"),
    ("SpecChanged", lambda s: setattr(s, "base", {**s.base, "maxTokens": 8192}), "the user changed the"),
]


@pytest.mark.parametrize(("reason", "happen", "message"), ABORTS, ids=[item[0] for item in ABORTS])
def test_what_spoils_an_experiment_aborts_it_without_barring(
    reason: str, happen: Callable[[Simulation], Any], message: str
) -> None:
    sim = in_verify()
    happen(sim)
    sim.run(10)
    aborted = next(record for record in sim.records if record.outcome == "Aborted")
    assert f"was called off ({reason}: {message}" in aborted.summary
    assert aborted.evidence["verdict"] == reason
    assert sim.state.barred == sim.state.reversals == ()
    assert sim.promoted.config["numWorkers"] == 2
    settled(sim)


def test_an_experiment_without_requests_ends() -> None:
    sim = in_verify()
    sim.load = lambda _: 0.5
    sim.run(240, until=lambda s: "Aborted" in s.outcomes())
    aborted = sim.records[-1]
    assert "(TooFewRequests:" in aborted.summary
    assert sim.state.barred == ()


def test_a_breach_that_ends_by_itself_proves_nothing() -> None:
    sim = Simulation(SMALL, KNOBS_ONLY, load=lambda t: 120.0 if 60 <= t < 66 else 20.0)
    sim.run(200, until=lambda s: s.state.phase is Phase.COOLDOWN)
    assert sim.outcomes() == ["Started", "Aborted"], sim.told()
    assert "(BreachGone:" in sim.records[-1].summary
    settled(sim)


def test_metrics_that_vanish_during_an_experiment_end_it_at_last_known_good() -> None:
    sim = in_verify()
    sim.metrics_problem = "prometheus default: timed out"
    sim.run(240, until=lambda s: s.state.change is None)
    assert "(TooFewRequests: the arms could not be measured in time)" in sim.records[-1].summary
    assert sim.state.phase is Phase.HOLD
    settled(sim)


# Crashes, users, lost status


def test_a_crash_before_any_effect_ends_promoted() -> None:
    """The operator dies before its n-th write, for every n: the next one goes on from what is there."""
    at_breach = Simulation(SMALL, KNOBS_ONLY, load=overload).run(58)
    effects = 0

    def count() -> bool:
        nonlocal effects
        effects += 1
        return False

    free = copy.deepcopy(at_breach)
    free.crash = count
    free.run(100)
    assert free.promoted.generation == 2, free.told()
    assert effects >= 10
    for fatal in range(1, effects + 1):
        left = fatal

        def dies() -> bool:
            nonlocal left
            left -= 1
            return left == 0

        sim = copy.deepcopy(at_breach)
        sim.crash = dies
        sim.run(110)
        assert sim.promoted.config == {"numWorkers": 4, "batchSize": 4}, (fatal, sim.told())
        settled(sim)


def test_a_lost_status_goes_on_from_the_config_map_with_one_cooldown() -> None:
    sim = in_verify()
    sim.state = TuningState()
    sim.run(4)
    assert sim.state.cooldown_until > sim.now
    assert sim.state.last_generation == 2, "the canary's generation is not used again"
    assert (sim.promoted.config, sim.promoted.generation) == (SMALL, 1)
    assert sim.outcomes() == ["Started"], "nothing is recorded as the user's edit"
    settled(sim)


def test_a_lost_status_keeps_what_was_promoted() -> None:
    sim = Simulation(SMALL, KNOBS_ONLY, load=overload)
    sim.run(240, until=lambda s: s.promoted.generation == 2 and s.state.change is None)
    sim.state = TuningState()
    sim.run(4)
    assert sim.promoted.config == {"numWorkers": 4, "batchSize": 4}
    assert {(o.knob, o.based_on, o.value) for o in sim.state.overlay} == {
        ("numWorkers", 2, 4),
        ("batchSize", 2, 4),
    }
    assert [hold.reason for hold in sim.state.holds] == ["Cooldown"]
    settled(sim)


def promoted() -> Simulation:
    sim = Simulation(SMALL, KNOBS_ONLY, load=overload)
    sim.run(240, until=lambda s: s.promoted.generation == 2 and s.state.change is None)
    return sim


def test_the_users_new_base_value_wins_over_the_tuned_one() -> None:
    sim = promoted()
    sim.base = {"numWorkers": 6, "batchSize": 2}
    sim.run(6)
    assert sim.promoted.config == {"numWorkers": 6, "batchSize": 4}, "the overlay of the other knob stays"
    assert (sim.records[-1].outcome, sim.records[-1].rule) == ("Reset", "user-edit")
    assert sim.records[-1].summary == (
        "The user's configuration changed in numWorkers; back to the user's value: numWorkers (tuned to 4); "
        "generation 3."
    )
    settled(sim)


def test_a_field_that_the_user_removes_falls_back_to_its_default() -> None:
    sim = Simulation({**WIDE, "maxQueue": 10}, KNOBS_ONLY, load=lambda _: 20.0).run(10)
    sim.base = dict(WIDE)
    sim.run(6)
    assert sim.promoted.config == WIDE
    assert {value(engine.config, "maxQueue") for engine in sim.engines} == {256}
    settled_generations = {engine.generation for engine in sim.engines}
    assert settled_generations == {2}


def test_bounds_that_exclude_a_tuned_value_send_it_back() -> None:
    sim = promoted()
    bounds = {**sim.policy.bounds, "numWorkers": replace(sim.policy.bounds["numWorkers"], maximum=3)}
    sim.policy = replace(sim.policy, bounds=bounds)
    sim.run(6)
    assert sim.promoted.config == {"numWorkers": 2, "batchSize": 4}


def test_a_restarted_pod_is_told_the_promoted_configuration_again() -> None:
    sim = promoted()
    sim.engines[1].config, sim.engines[1].generation = dict(SMALL), 1
    sim.run(2)
    settled(sim)


def test_the_steady_state_writes_nothing() -> None:
    sim = promoted()
    sim.run(80)
    before = len(sim.decisions)
    state = sim.state
    sim.run(60)
    later = [decision for _, decision in sim.decisions[before:]]
    assert all(decision.actions == () and decision.records == () for decision in later)
    assert {replace(decision.state, met_ticks=0) for decision in later} == {replace(state, met_ticks=0)}


# Replicas


def test_a_saturated_device_gets_replicas_at_once_and_the_experiment_gives_way() -> None:
    slow = Model(step_s=lambda rows: 0.016 + 0.008 * rows)
    sim = Simulation(WIDE, policy_of(), replicas=2, load=lambda t: 20.0 if t < 60 else 240.0, model=slow).run(
        130
    )
    assert "ScaledOut" in sim.outcomes(), sim.told()
    out = next(record for record in sim.records if record.outcome == "ScaledOut")
    assert out.rule == "replicas-up"
    assert out.summary.startswith("The device is saturated (")
    assert out.replicas == (2, 6)
    for record in sim.records:
        if record.outcome == "Aborted":
            assert "(ScalingOut: capacity is added first)" in record.summary
    assert sim.state.barred == ()


def test_pending_pods_are_credited_and_do_not_cascade() -> None:
    slow = Model(step_s=lambda rows: 0.016 + 0.008 * rows)
    sim = Simulation(
        WIDE,
        policy_of(scaling=Scaling(1, 50)),
        load=lambda t: 20.0 if t < 60 else 100.0,
        model=slow,
        replicas=1,
    )
    sim.schedulable = 1
    sim.run(180)
    asked = [record.replicas for record in sim.records if record.outcome == "ScaledOut"]
    assert asked, sim.told()
    assert sim.replicas <= 5, "100 requests/s need 4.5 of these engines at 80% use"
    sim.run(300)
    assert [record.replicas for record in sim.records if record.outcome == "ScaledOut"] == asked


def test_overflow_that_no_knob_cures_gets_replicas() -> None:
    pinned = {n: replace(b, tune=False) for n, b in KNOBS_ONLY.bounds.items()}
    sim = Simulation(SMALL, policy_of(bounds=pinned), load=overload)
    sim.run(150, until=lambda s: bool(s.records))
    assert [(r.outcome, r.rule) for r in sim.records] == [("ScaledOut", "replicas-up")]
    assert "no knob promises relief" in sim.records[0].summary


def test_idle_pods_go_one_by_one_and_never_below_the_minimum() -> None:
    sim = Simulation(
        WIDE, policy_of(scaling=Scaling(2, 6)), replicas=4, load=lambda t: 30.0 if t < 60 else 0.0
    )
    sim.run(400)
    assert [r.replicas for r in sim.records] == [(4, 3), (3, 2)], sim.told()
    assert {r.outcome for r in sim.records} == {"ScaledIn"}
    assert sim.records[0].at - sim.origin >= 120, "not before it was idle for long"
    assert sim.records[1].at - sim.records[0].at >= 30, "and no two within a cooldown"


def test_a_metrics_outage_starts_the_look_back_again() -> None:
    sim = Simulation(WIDE, policy_of(), replicas=3, load=lambda _: 0.0).run(110)
    sim.metrics_problem = "prometheus default: timed out"
    sim.run(200)
    assert sim.records == [], "no scale-in without data"
    sim.metrics_problem = ""
    back = sim.now
    sim.run(200, until=lambda s: bool(s.records))
    assert sim.records[0].outcome == "ScaledIn"
    assert sim.records[0].at - back >= 120


def test_direction_out_only_never_scales_in() -> None:
    policy = policy_of(scaling=Scaling(1, 6, direction="OutOnly"))
    sim = Simulation(WIDE, policy, replicas=3, load=lambda _: 0.0).run(300)
    assert (sim.records, sim.replicas) == ([], 3)


def test_a_boost_raises_the_minimum_and_decays_one_by_one_after_it() -> None:
    sim = Simulation(WIDE, policy_of(), replicas=1, load=lambda _: 20.0).run(60)
    sim.boosts = (Boost("alert-x", 4, sim.now + 100),)
    sim.run(20)
    assert (sim.replicas, sim.records[0].rule) == (4, "boost")
    assert sim.records[0].summary == "Override alert-x asks for at least 4; replicas 1 -> 4."
    sim.run(76)
    assert sim.replicas == 4
    expired = sim.now
    sim.run(200)
    down = [r for r in sim.records if r.outcome == "ScaledIn"]
    assert [r.rule for r in down][:2] == ["boost-decay", "boost-decay"]
    assert down[0].at - expired < 60, "what a boost added does not wait for the idle time"
    assert all(b.at - a.at >= 30 for a, b in pairwise(down))
    assert sim.replicas < 4
