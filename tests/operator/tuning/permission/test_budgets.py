"""What changes may cost within a day."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.operator.tuning.experiments import canary, controls, in_phase, restarted, seen
from tests.operator.tuning.observations import BAD, NOW, context_of, observe, three
from tests.operator.tuning.policies import policy_of

from kvpilot_operator.tuning.assess.guards import DAY
from kvpilot_operator.tuning.context import Draft, Proposal
from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.permission.budgets import GRAIN_S, charge, overspent
from kvpilot_operator.tuning.state import KnobChange, Phase, Spent, TuningState

SMALL = {"numWorkers": 2, "batchSize": 2}
QUEUED = {"admission_wait": 0.71, "prefill": 0.04, "decode": 0.25}
MIB = 2**20
QUOTA = Proposal("cache-quota-up", (KnobChange("maxTokens", 1024, 2048),), "hitRate", 0.3, "")
WORKERS = Proposal("workers-up", (KnobChange("numWorkers", 2, 4),), "p95", 0.3, "")


def breached(**changes: Any) -> Any:
    return observe(*three(attained=BAD, stages=QUEUED), config=SMALL, **changes)


def spent_of(lost: float, state: TuningState, now: float = NOW, **policy: Any) -> tuple[Spent, ...]:
    context = context_of(breached(cache_lost_bytes=lost), policy_of(**policy))
    return charge(replace(context, now=now), Draft(state)).state.spent


def test_dropped_cache_is_added_up_in_a_few_entries_and_forgotten_after_a_day() -> None:
    limit = {"cache_lost_per_day": 100 * MIB}
    assert spent_of(5.0, TuningState()) == (), "without a budget nothing is written"
    first = spent_of(5.0, TuningState(), **limit)
    assert first == (Spent("cacheLost", NOW, 5.0),)
    again = spent_of(7.0, TuningState(spent=first), NOW + GRAIN_S - 1, **limit)
    assert again == (Spent("cacheLost", NOW, 12.0),)
    later = spent_of(1.0, TuningState(spent=again), NOW + GRAIN_S, **limit)
    assert later == (*again, Spent("cacheLost", NOW + GRAIN_S, 1.0))
    assert spent_of(0.0, TuningState(spent=later), NOW + DAY, **limit) == later[1:]


def test_a_restart_during_a_change_is_counted() -> None:
    state = in_phase(Phase.VERIFY, since=20.0)
    found = seen(canary(), restarted(controls()[0]), controls()[1])
    decision = decide(found, state, policy_of(restarts_per_day=3), NOW)
    assert decision.state.spent == (Spent("restarts", NOW, 1),)
    assert decide(found, state, policy_of(), NOW).state.spent == ()


@pytest.mark.parametrize(
    ("spent", "limits", "proposal", "reason"),
    [
        (("restarts", 2), {"restarts_per_day": 2}, WORKERS, "RestartBudget"),
        (("restarts", 1), {"restarts_per_day": 2}, WORKERS, None),
        (("restarts", 0), {"restarts_per_day": 0}, WORKERS, "RestartBudget"),
        (("restarts", 9), {}, WORKERS, None),
        (("cacheLost", 5.0 * MIB), {"cache_lost_per_day": 5 * MIB}, QUOTA, "CacheBudget"),
        (("cacheLost", 4.0 * MIB), {"cache_lost_per_day": 5 * MIB}, QUOTA, None),
        (("cacheLost", 9.0 * MIB), {"cache_lost_per_day": 5 * MIB}, WORKERS, None),
        (("cacheLost", 9.0 * MIB), {"cache_lost_per_day": 5 * MIB}, replace(QUOTA, objective="memory"), None),
    ],
)
def test_what_is_spent_holds_experiments(
    spent: tuple[str, float], limits: dict[str, int], proposal: Proposal, reason: str | None
) -> None:
    state = TuningState(spent=(Spent(spent[0], NOW, spent[1]),))
    found = overspent(context_of(breached(), policy_of(**limits)), state, proposal)
    assert (None if found is None else found[0]) == reason


def test_no_experiment_begins_on_a_spent_budget() -> None:
    state = TuningState(last_generation=1, spent=(Spent("restarts", NOW - 60, 2),))
    decision = decide(breached(), state, policy_of(restarts_per_day=2), NOW)
    assert decision.state.change is None
    assert {hold.reason: hold.message for hold in decision.state.holds}["RestartBudget"] == (
        "replicas restarted during changes 2 times in a day"
    )
