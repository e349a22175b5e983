"""The phases of an experiment: what moves each one on, and what aborts it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.operator.tuning.experiments import (
    CANDIDATE,
    CONFIG,
    CURED,
    begun,
    canary,
    context,
    controls,
    in_phase,
    restarted,
    seen,
    verified,
)
from tests.operator.tuning.observations import BAD, DOWN, GOOD, NOW, gauges, replica

from kvpilot_operator.tuning.context import Draft
from kvpilot_operator.tuning.decide import converge
from kvpilot_operator.tuning.decision import Push, WriteConfig
from kvpilot_operator.tuning.experiment.canary import advance
from kvpilot_operator.tuning.experiment.ends import finish
from kvpilot_operator.tuning.observation import MemoryUse, Observation, ObservedReplica, Promoted
from kvpilot_operator.tuning.state import (
    BlockedValue,
    KnobChange,
    OverlayEntry,
    Phase,
    ReplicaRef,
    Reversal,
    StepRate,
    Tally,
    TuningState,
)

SETTLE_S, VERIFY_S, COOLDOWN_S, DAY_S = 15.0, 45.0, 30.0, 86_400.0
SCRAPE_S, SHORT_S, LONG_S = 1.0, 10.0, 60.0


def step(observation: Observation, state: TuningState, **policy: Any) -> Draft:
    return advance(context(observation, **policy), Draft(state))


def sent_back(item: ObservedReplica) -> ObservedReplica:
    """The replica with the promoted configuration again."""
    assert item.engine is not None
    return replace(item, engine=replace(item.engine, generation=1, config=CONFIG))


def everywhere() -> Observation:
    """All replicas run the candidate; the ConfigMap does not hold it yet."""
    fields = {"config": CANDIDATE, "generation": 2, "epoch": 1}
    return seen(*(replica(f"chat-{index}", **fields) for index in range(3)))


def pushed_to(observation: Observation, state: TuningState) -> dict[str, int]:
    """The generation that each replica is sent."""
    actions = converge(context(observation), Draft(state)).actions
    return {action.uid: action.generation for action in actions if isinstance(action, Push)}


def test_replica_that_is_no_control_gets_a_change_only_with_all_others() -> None:
    bystander = replica("chat-9", config=CONFIG, attained=BAD)
    fleet = seen(canary(), *controls(), bystander)
    both = tuple(ReplicaRef(item.uid, item.name) for item in controls())
    one = both[:1]
    everywhere = {"uid-chat-1": 2, "uid-chat-2": 2, "uid-chat-9": 2}
    assert pushed_to(fleet, in_phase(Phase.CANARY)) == {}
    assert pushed_to(fleet, in_phase(Phase.CANARY, widened=one)) == {"uid-chat-1": 2}
    assert pushed_to(fleet, in_phase(Phase.CANARY, widened=both)) == everywhere, "it spread"
    assert pushed_to(fleet, in_phase(Phase.PROMOTE, widened=one)) == everywhere
    back = pushed_to(fleet, in_phase(Phase.REVERT, widened=both))
    assert back == {"uid-chat-0": 1}


def test_loss_of_a_replica_that_is_no_control_aborts_nothing() -> None:
    bystander = restarted(replica("chat-9", config=CONFIG, attained=BAD))
    for fleet in (seen(canary(), *controls(), bystander), seen(canary(), *controls())):
        draft = step(fleet, in_phase(Phase.SETTLE, since=5.0))
        assert (draft.state.phase, draft.records) == (Phase.SETTLE, ())


def test_capacity_is_compared_as_soon_as_the_canary_runs_the_candidate() -> None:
    waiting = seen(sent_back(canary()), *controls())
    assert step(waiting, in_phase(Phase.CANARY)).state.phase is Phase.CANARY
    draft = step(seen(canary(), *controls()), in_phase(Phase.CANARY, since=2.0, measured_from=0.0))
    assert (draft.state.phase, begun(draft).measured_from) == (Phase.VERIFY, NOW - 2.0)


def test_capacity_is_compared_from_now_on_where_the_push_took_a_second_try() -> None:
    draft = step(seen(canary(), *controls()), in_phase(Phase.CANARY, since=4.0, measured_from=0.0))
    assert (draft.state.phase, begun(draft).measured_from) == (Phase.VERIFY, NOW)


def test_another_measure_settles_first() -> None:
    running = seen(canary(), *controls())
    draft = step(running, in_phase(Phase.CANARY, measure="tierLoad", measured_from=0.0))
    assert (draft.state.phase, begun(draft).measured_from) == (Phase.SETTLE, 0.0)


def test_push_that_is_not_taken_in_time_aborts() -> None:
    waiting = seen(sent_back(canary()), *controls())
    draft = step(waiting, in_phase(Phase.CANARY, since=4 * SETTLE_S + 1))
    assert draft.state.phase is Phase.REVERT
    assert draft.records[0].summary == (
        "numWorkers 2 -> 4 was aborted (PushFailed: chat-0 did not take the configuration); "
        "back to generation 1."
    )


def test_value_that_an_engine_does_not_take_waits_ten_cooldowns() -> None:
    """Also where it was proven: the rule would propose it again at once."""
    waiting = seen(sent_back(canary()), *controls())
    tried = step(waiting, in_phase(Phase.CANARY, since=4 * SETTLE_S + 1))
    proven = step(
        seen(canary(), *controls()), in_phase(Phase.PROMOTE, since=4 * SETTLE_S + 1, verdict="Promoted")
    )
    for draft in (tried, proven):
        assert draft.state.phase is Phase.REVERT
        assert draft.records[0].evidence["verdict"] == "PushFailed"
        assert draft.state.blocked_values == (BlockedValue("numWorkers", 4, NOW + 10 * COOLDOWN_S),)
        assert draft.state.reversals == (), "it spends no flap budget"


@pytest.mark.parametrize(
    ("since", "waiting", "phase"),
    [
        (SETTLE_S - 1, 0.0, Phase.SETTLE),
        (SETTLE_S, 0.0, Phase.VERIFY),
        (SETTLE_S, 50.0, Phase.SETTLE),  # the backlog from before the change
        (3 * SETTLE_S, 50.0, Phase.VERIFY),
    ],
)
def test_settling_lasts_until_the_backlog_is_gone_with_a_limit(
    since: float, waiting: float, phase: Phase
) -> None:
    observation = seen(canary(gauges=gauges(waiting=waiting)), *controls())
    draft = step(observation, in_phase(Phase.SETTLE, since=since, measure="tierLoad", measured_from=0.0))
    assert (draft.state.phase, begun(draft).measured_from) == (phase, NOW if phase is Phase.VERIFY else 0.0)


LARGER_POOL, LARGER_TIER = KnobChange("maxTokens", 4096, 6144), KnobChange("hostMemoryMb", 64, 128)
ON_A_DEVICE = {
    "cached_bytes": 40_080 * 2**20,
    "budget_bytes": 40_128 * 2**20,
    "host": MemoryUse(0.1, 2**40, 80 * 2**20, 128 * 2**20),
    "device": MemoryUse(0.6, 2**36, 40_000 * 2**20, 40_000 * 2**20),
}
HALF_FULL, FULL = ({"cached_bytes": part * 2**20, "budget_bytes": 128 * 2**20} for part in (80.0, 120.0))


@pytest.mark.parametrize(
    ("value", "evicted", "held", "since", "phase"),
    [
        (LARGER_POOL, 0.0, FULL, SETTLE_S, Phase.SETTLE),
        (LARGER_POOL, 0.0, FULL, 3 * SETTLE_S, Phase.VERIFY),
        (LARGER_POOL, 1.0, HALF_FULL, SETTLE_S, Phase.VERIFY),  # it evicts, so it is full
        (LARGER_TIER, 1.0, HALF_FULL, SETTLE_S, Phase.SETTLE),
        (LARGER_TIER, 1.0, ON_A_DEVICE, SETTLE_S, Phase.SETTLE),  # the pool is no part of it
        (LARGER_TIER, 1.0, HALF_FULL, 3 * SETTLE_S, Phase.VERIFY),
        (LARGER_TIER, 1.0, FULL, SETTLE_S, Phase.VERIFY),
        (KnobChange("maxTokens", 6144, 4096), 0.0, FULL, SETTLE_S, Phase.VERIFY),
        (KnobChange("prefetchSize", 4, 8), 0.0, HALF_FULL, SETTLE_S, Phase.VERIFY),
    ],
)
def test_a_larger_quota_is_filled_before_it_is_judged(
    value: KnobChange, evicted: float, held: dict[str, Any], since: float, phase: Phase
) -> None:
    observation = seen(canary(gauges=gauges(**held), evicted=evicted), *controls())
    state = in_phase(Phase.SETTLE, since=since, values=(value,), measure="hitRate", measured_from=0.0)
    assert step(observation, state).state.phase == phase


@pytest.mark.parametrize(
    ("observation", "policy", "reason", "message"),
    [
        (seen(canary(), *controls(), paused_by="stop"), {}, "Paused", "override stop is in force"),
        (seen(canary(), *controls(), rolling_out=True), {}, "RollingOut", "the workload replaces its pods"),
        (seen(canary(), *controls(), spec_error="spec.x: bad"), {}, "SpecInvalid", "spec.x: bad"),
        (seen(*controls()), {}, "CanaryLost", "the canary is gone"),
        (seen(canary(), controls()[0]), {}, "ControlLost", "a control is gone"),
        (
            seen(canary(), restarted(controls()[0]), controls()[1]),
            {},
            "ReplicaRestarted",
            "a replica of the experiment restarted",
        ),
        (
            seen(sent_back(canary()), *controls()),
            {},
            "ReplicaRestarted",
            "the canary runs its old configuration again",
        ),
    ],
)
def test_interruption_aborts_and_blocks_no_value(
    observation: Observation, policy: dict[str, Any], reason: str, message: str
) -> None:
    draft = step(observation, in_phase(Phase.VERIFY, since=20.0), **policy)
    assert draft.state.phase is Phase.REVERT
    assert draft.state.change is not None
    assert draft.state.change.verdict == f"Aborted({reason})"
    record = draft.records[0]
    assert (record.outcome, record.evidence["verdict"]) == ("Aborted", reason)
    assert f"was aborted ({reason}: {message})" in record.summary
    assert draft.state.blocked_values == draft.state.reversals == ()


FAST, SLOW = {"row_rate": 200.0, "attained": CURED}, {"row_rate": 100.0}


def test_proven_change_goes_to_half_of_the_replicas_before_the_last_ones() -> None:
    draft = step(verified(FAST, SLOW), in_phase(Phase.VERIFY, since=50.0))
    change = begun(draft)
    assert (draft.state.phase, draft.records) == (Phase.CANARY, ())
    assert change.widened == (ReplicaRef("uid-chat-1", "chat-1"),)
    assert (change.measured_from, change.others) == (0.0, {"uid-chat-2"})


@pytest.mark.parametrize("measure", ["capacity", "tierLoad"])
def test_half_of_the_replicas_is_measured_once_all_of_it_runs_the_candidate(measure: str) -> None:
    widening = {"widened": (ReplicaRef("uid-chat-1", "chat-1"),), "measured_from": 0.0, "measure": measure}
    waiting = step(seen(canary(), *controls()), in_phase(Phase.CANARY, **widening))
    assert (waiting.state.phase, begun(waiting).measured_from) == (Phase.CANARY, 0.0)
    taken, last = replica("chat-1", config=CANDIDATE, generation=2, epoch=1), controls()[1]
    draft = step(seen(canary(), taken, last), in_phase(Phase.CANARY, **widening))
    assert (draft.state.phase, begun(draft).measured_from) == (Phase.VERIFY, NOW)
    late = step(seen(canary(), *controls()), in_phase(Phase.CANARY, since=4 * SETTLE_S + 1, **widening))
    assert "(PushFailed: chat-1 did not take the configuration)" in late.records[0].summary


def test_swapped_arms_are_measured_once_the_old_canary_went_back() -> None:
    swapped = {"controls": ("chat-1",), "crossed_at": NOW, "measured_from": 0.0}
    old = replica("chat-1", config=CANDIDATE, generation=2, epoch=1)
    assert step(seen(canary(), old), in_phase(Phase.CANARY, **swapped)).state.phase is Phase.CANARY
    back = step(seen(canary(), controls()[0]), in_phase(Phase.CANARY, **swapped))
    assert back.state.phase is Phase.VERIFY


def test_promotion_is_recorded_with_its_effect() -> None:
    widened = (ReplicaRef("uid-chat-1", "chat-1"),)
    early = in_phase(Phase.VERIFY, since=50.0, widened=widened, measured_from=NOW - 11)
    assert step(verified(FAST, SLOW), early).state.phase is Phase.VERIFY, "three times four scrapes first"
    late = in_phase(
        Phase.VERIFY, since=50.0, widened=widened, measured_from=NOW - 12, why="workers were short"
    )
    draft = step(verified(FAST, SLOW), late)
    assert draft.state.phase is Phase.PROMOTE
    summary = draft.records[0].summary
    assert summary.startswith(
        "Workers were short; numWorkers 2 -> 4 on canary chat-0; p95 within 500 ms rose"
    )
    assert summary.endswith("promoted as generation 2.")


def test_last_two_replicas_follow_at_once_while_the_load_outruns_them() -> None:
    rising = {"done": 0.9}
    observation = seen(canary(verify=FAST, **rising), *controls(verify=SLOW, **rising))
    draft = step(observation, in_phase(Phase.VERIFY, since=50.0))
    assert (draft.state.phase, begun(draft).widened) == (Phase.PROMOTE, ())


def test_harm_on_half_of_the_replicas_reverts_all_of_them() -> None:
    widened = (ReplicaRef("uid-chat-1", "chat-1"),)
    state = in_phase(Phase.VERIFY, since=50.0, widened=widened, measured_from=NOW - 12)
    draft = step(verified({**FAST, "errors": 0.5}, SLOW), state)
    assert (draft.state.phase, draft.records[0].evidence["verdict"]) == (Phase.REVERT, "Harmful")


@pytest.mark.parametrize(
    ("figures", "ratio", "reason"),
    [
        ({"row_rate": 50.0}, 1.8, "Harmful"),
        ({"row_rate": 100.0, "errors": 0.3}, 1.8, "Harmful"),
        ({"row_rate": 100.0}, 4.0, "NoGain"),
    ],
)
def test_failed_change_is_reverted_and_its_value_blocked(
    figures: dict[str, float], ratio: float, reason: str
) -> None:
    queued = gauges(waiting=40.0)
    observation = seen(
        canary(verify=figures, gauges=queued), *controls(verify={"row_rate": 100.0}, gauges=queued)
    )
    draft = step(observation, in_phase(Phase.VERIFY, since=50.0, ratio=ratio))
    assert draft.state.phase is Phase.REVERT
    assert f"was reverted ({reason})" in draft.records[0].summary
    assert draft.state.reversals == (Reversal("numWorkers", NOW),)
    assert draft.state.blocked_values == (BlockedValue("numWorkers", 4, NOW + DAY_S),)


@pytest.mark.parametrize(
    ("entry", "after", "back"),
    [
        (OverlayEntry("enablePrefetch", None, False, "d-0000"), True, True),  # on, as by default
        (OverlayEntry("enablePrefetch", True, False, "d-0000"), True, True),
        (OverlayEntry("enablePrefetch", None, True, "d-0000"), False, False),
        (OverlayEntry("cacheStrategy", "lfu", "fifo", "d-0000"), "adaptive", True),
        (OverlayEntry("prefetchSize", None, 16, "d-0000"), 8, True),
        (OverlayEntry("prefetchSize", None, 16, "d-0000"), 32, False),
    ],
)
def test_promotion_towards_the_users_value_spends_flap_budget(
    entry: OverlayEntry, after: Any, back: bool
) -> None:
    changed = (KnobChange(entry.knob, entry.value, after),)
    state = replace(in_phase(Phase.PROMOTE, values=changed, verdict="Promoted"), overlay=(entry,))
    ended = finish(context(everywhere()), Draft(state), begun(Draft(state)), overlaid=True).state
    assert ended.reversals == ((Reversal(entry.knob, NOW),) if back else ())


def test_change_that_showed_nothing_makes_way_for_the_next_remedy() -> None:
    queued = gauges(waiting=40.0)
    rates = {"row_rate": 100.0}
    observation = seen(canary(verify=rates, gauges=queued), *controls(verify=rates, gauges=queued))
    late = in_phase(Phase.VERIFY, since=100 * VERIFY_S, ratio=1.1)
    draft = step(observation, late)
    assert "was reverted (Inconclusive)" in draft.records[0].summary
    assert draft.state.blocked_values == (BlockedValue("numWorkers", 4, NOW + 10 * COOLDOWN_S),)


WAITING_ELSEWHERE = {"since": VERIFY_S, "drained": True}
"""A canary that has had nothing waiting since the change, while requests wait on the controls."""


def calm_canary(row_rate: float, **figures: Any) -> Observation:
    alike = {"attained": GOOD, "gauges": gauges(waiting=0.0)}
    one = canary(verify={"row_rate": row_rate, "attained": GOOD}, **{**alike, **figures})
    return seen(one, *controls(verify={"row_rate": 100.0, "attained": BAD}, gauges=gauges(waiting=40.0)))


def test_change_spreads_to_where_requests_wait_if_the_canary_has_no_load_to_prove_it() -> None:
    spread = step(
        calm_canary(105.0), in_phase(Phase.VERIFY, **WAITING_ELSEWHERE, rate_before=StepRate(100, 900))
    )
    change = begun(spread)
    assert spread.state.phase is Phase.CANARY and not spread.records
    assert (change.widened, change.others, change.drained) == (change.controls, frozenset(), False)
    assert {item.name for item in change.before} >= {"errors", "p95"}

    def on_all(row_rate: float, since: float) -> Draft:
        figures = {"verify": {"row_rate": row_rate, "attained": GOOD}, "seconds": 60.0}
        replicas = (
            replica(name, config=CANDIDATE, generation=2, epoch=1, attained=GOOD, **figures)
            for name in ("chat-0", "chat-1", "chat-2")
        )
        late = replace(change, measured_from=NOW - since, started_at=NOW - since)
        return step(seen(*replicas), replace(spread.state, phase=Phase.VERIFY, change=late))

    proven = on_all(170.0, 60.0)
    assert (proven.state.phase, proven.records[0].outcome) == (Phase.PROMOTE, "Promoted")
    assert proven.records[0].evidence["unproven"] is False
    assert on_all(101.0, 60.0).state.phase is Phase.VERIFY, "as good as before is no proof"
    nothing = on_all(101.0, 10 * VERIFY_S)
    assert nothing.state.phase is Phase.REVERT
    assert "p95 within 500 ms rose from" in nothing.records[0].summary


@pytest.mark.parametrize(
    ("observation", "fields"),
    [
        (calm_canary(105.0), {**WAITING_ELSEWHERE, "since": VERIFY_S - 1}),
        (calm_canary(105.0, gauges=gauges(waiting=40.0)), {**WAITING_ELSEWHERE, "drained": False}),
        (calm_canary(105.0, attained=BAD), WAITING_ELSEWHERE),
        (calm_canary(95.0), WAITING_ELSEWHERE),
        (calm_canary(105.0, errors=0.3), WAITING_ELSEWHERE),
    ],
    ids=["too early", "not drained", "not cured", "slower", "failing"],
)
def test_change_does_not_spread(observation: Observation, fields: dict[str, Any]) -> None:
    draft = step(observation, in_phase(Phase.VERIFY, **fields, rate_before=StepRate(100, 900)))
    assert draft.state.change is None or not draft.state.change.widened


def test_two_replicas_swap_their_arms_once() -> None:
    tally = Tally(6, 0.0, 0.6, 600.0, NOW - 5)
    pair = {"controls": ("chat-1",), "measure": "tierLoad", "predicted_gain": 0.1, "tally": tally}
    state = in_phase(Phase.VERIFY, since=70.0, **pair)
    observation = seen(
        canary(verify={}, stages={"tier_load": 0.5}), controls(verify={}, stages={"tier_load": 0.5})[0]
    )
    draft = step(observation, state)
    change = begun(draft)
    assert (draft.state.phase, change.crossed_at) == (Phase.CANARY, NOW)
    assert change.canary == ReplicaRef("uid-chat-1", "chat-1")
    assert change.controls == (ReplicaRef("uid-chat-0", "chat-0"),)
    assert (change.tally.count, change.measured_from) == (6, 0.0)
    crossed = in_phase(Phase.VERIFY, since=70.0, **pair, crossed_at=NOW - 60)
    assert step(observation, crossed).state.phase is Phase.VERIFY


BLIND = {"metrics_problem": DOWN}


def test_settling_goes_on_for_as_long_as_nothing_is_seen_and_verification_starts_anew() -> None:
    settling = in_phase(Phase.SETTLE, since=3 * SETTLE_S + 1, measure="tierLoad", measured_from=0.0)
    blind = step(seen(canary(), *controls(), **BLIND), settling)
    assert (blind.state.phase, begun(blind).unseen_since, begun(blind).deadline) == (Phase.SETTLE, NOW, 0.0)
    waiting = replace(settling, change=replace(begun(blind), started_at=NOW - 5 * VERIFY_S))
    draft = step(seen(canary(), *controls()), waiting)
    assert (draft.state.phase, begun(draft).unseen_since) == (Phase.VERIFY, 0.0)
    assert (begun(draft).measured_from, begun(draft).deadline) == (NOW, NOW + 4 * VERIFY_S)


@pytest.mark.parametrize("gone", ["source", "canary", "controls"])
def test_time_in_which_the_arms_are_not_observed_is_no_verification(gone: str) -> None:
    one, *others = canary(), *controls()
    blind = {
        "source": seen(one, *others, **BLIND),
        "canary": seen(replace(one, sample=None), *others),
        "controls": seen(one, *(replace(other, sample=None) for other in others)),
    }[gone]
    state = in_phase(Phase.VERIFY, since=60.0, deadline=NOW - 1)
    draft = step(blind, state)
    assert (draft.records, begun(draft).unseen_since) == ((), NOW)
    again = replace(state, change=replace(begun(draft), unseen_since=NOW - 100))
    after = step(verified(SLOW, SLOW), again)
    assert (after.records, begun(after).deadline, begun(after).unseen_since) == ((), NOW + 99, 0.0)
    overdue = step(verified(SLOW, SLOW), replace(state, change=replace(begun(draft), unseen_since=0.0)))
    assert overdue.records[0].evidence["verdict"] == "Inconclusive"


def test_what_cannot_be_observed_for_long_is_aborted_and_says_why() -> None:
    blind = seen(canary(), *controls(), **BLIND)
    early = in_phase(Phase.VERIFY, since=8 * VERIFY_S - 1, unseen_since=NOW - 100)
    assert step(blind, early).records == ()
    late = step(blind, in_phase(Phase.VERIFY, since=8 * VERIFY_S, unseen_since=NOW - 100))
    assert late.records[0].summary == (
        "numWorkers 2 -> 4 was aborted (Unobserved: it could not be measured: prometheus default: timed out)"
        "; back to generation 1."
    )


def stalled(item: ObservedReplica, outcome: str = "") -> ObservedReplica:
    """The replica, at which requests arrive and none ends, or each ends so."""
    assert item.sample is not None
    windows = {
        name: replace(counts, outcomes={outcome: counts.arrivals} if outcome else {})
        for name, counts in item.sample.windows.items()
    }
    shown = replace(item.sample.gauges, waiting=9.0)
    return replace(item, sample=replace(item.sample, windows=windows, gauges=shown))


@pytest.mark.parametrize("outcome", ["", "timeout", "shed"])
def test_a_candidate_that_completes_nothing_for_a_long_window_is_reverted(outcome: str) -> None:
    given = {"verify": {}, "seconds": 60.0}
    hung = seen(stalled(canary(**given), outcome), *controls(**given))
    assert step(hung, in_phase(Phase.VERIFY, since=LONG_S - 1)).records == ()
    draft = step(hung, in_phase(Phase.VERIFY, since=LONG_S))
    assert draft.records[0].summary == (
        "numWorkers 2 -> 4 was reverted (CanaryStalled): requests arrive at the candidate and none is "
        "completed; back to generation 1."
    )
    assert draft.state.blocked_values == (BlockedValue("numWorkers", 4, NOW + 10 * COOLDOWN_S),)
    everyone = seen(stalled(canary(**given)), *(stalled(item) for item in controls(**given)))
    assert step(everyone, in_phase(Phase.VERIFY, since=LONG_S)).records == (), "it is not the candidate"


def test_arms_that_cannot_be_measured_wait_and_end_in_time() -> None:
    blind = seen(canary(), *controls())  # no sample reaches back to the change yet
    assert step(blind, in_phase(Phase.VERIFY, since=100.0)).state.phase is Phase.VERIFY
    draft = step(blind, in_phase(Phase.VERIFY, since=180.0))
    assert draft.records[0].summary == (
        "numWorkers 2 -> 4 was aborted (TooFewRequests: the arms could not be measured in time); "
        "back to generation 1."
    )


def test_config_map_is_written_only_after_all_replicas_run_the_candidate() -> None:
    behind = seen(canary(), *controls())
    assert step(behind, in_phase(Phase.PROMOTE)).actions == ()
    draft = step(everywhere(), in_phase(Phase.PROMOTE))
    assert draft.actions == (WriteConfig(2, CANDIDATE),)
    assert draft.state.phase is Phase.PROMOTE


def test_promotion_that_a_replica_does_not_take_is_aborted() -> None:
    draft = step(seen(canary(), *controls()), in_phase(Phase.PROMOTE, since=4 * SETTLE_S + 1))
    assert "(PushFailed: chat-1, chat-2 did not take the configuration)" in draft.records[0].summary


@pytest.mark.parametrize("verdict", ["Emergency", "TakenBack"])
def test_what_relieves_stands_where_it_was_taken(verdict: str) -> None:
    behind, everyone = seen(canary(), *controls()), {"canary": None, "controls": (), "verdict": verdict}
    early = step(behind, in_phase(Phase.PROMOTE, since=4 * SETTLE_S, **everyone))
    assert (early.actions, early.records) == ((), ())
    late = step(behind, in_phase(Phase.PROMOTE, since=4 * SETTLE_S + 1, **everyone))
    assert (late.actions, late.records) == ((WriteConfig(2, CANDIDATE),), ())


def test_promotion_ends_when_the_config_map_is_observed() -> None:
    written = replace(everywhere(), promoted=Promoted(2, CANDIDATE))
    draft = step(written, in_phase(Phase.PROMOTE, verdict="Promoted"))
    assert (draft.state.change, draft.state.phase) == (None, Phase.COOLDOWN)
    assert draft.state.cooldown_until == NOW + SHORT_S + SCRAPE_S, "a step rate has no memory"
    assert draft.state.overlay == (OverlayEntry("numWorkers", 2, 4, "d-0001"),)
    assert draft.state.watch is not None
    assert (draft.state.watch.since, draft.state.watch.until) == (NOW, NOW + VERIFY_S)
    other = step(written, in_phase(Phase.PROMOTE, verdict="Promoted", measure="tierLoad"))
    assert other.state.cooldown_until == NOW + COOLDOWN_S


def test_revert_ends_when_no_engine_runs_the_candidate() -> None:
    assert step(seen(canary(), *controls()), in_phase(Phase.REVERT)).state.phase is Phase.REVERT
    back = seen(sent_back(canary()), *controls())
    draft = step(back, in_phase(Phase.REVERT))
    assert (draft.state.change, draft.state.phase, draft.state.overlay) == (None, Phase.COOLDOWN, ())


def test_an_engine_that_takes_no_revert_keeps_no_change_in_flight() -> None:
    stuck = seen(canary(), *controls())
    assert step(stuck, in_phase(Phase.REVERT, since=4 * SETTLE_S)).state.phase is Phase.REVERT
    assert step(stuck, in_phase(Phase.REVERT, since=4 * SETTLE_S + 1)).state.change is None
