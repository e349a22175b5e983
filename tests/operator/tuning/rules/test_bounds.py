"""Why a proposal is refused: bounds, blocked values, the flap budget, a small gain."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.operator.tuning.observations import NOW
from tests.operator.tuning.plans import QUEUED, SMALL, context, plan, why_not
from tests.operator.tuning.policies import policy_of

from kvpilot_operator.tuning.context import Proposal
from kvpilot_operator.tuning.decision import Rejected
from kvpilot_operator.tuning.rules.bounds import room, vet
from kvpilot_operator.tuning.rules.order import consider
from kvpilot_operator.tuning.state import BlockedValue, KnobChange, Reversal, TuningState


def test_failed_values_are_blocked_until_they_expire() -> None:
    breach = context(SMALL, stages=QUEUED)
    blocked_values = TuningState(blocked_values=(BlockedValue("numWorkers", 8, NOW + 1),))
    expired = TuningState(blocked_values=(BlockedValue("numWorkers", 8, NOW - 1),))
    assert why_not(consider(breach, blocked_values), "workers-up") == (
        "ValueBlocked",
        "numWorkers 8 is blocked after a failed experiment",
    )
    assert consider(breach, expired).canary is not None


def test_flap_budget_stops_a_knob_for_six_hours() -> None:
    breach = context(SMALL, stages=QUEUED)
    recent = TuningState(reversals=(Reversal("numWorkers", NOW - 60), Reversal("numWorkers", NOW - 21_000)))
    old = replace(recent, reversals=(Reversal("numWorkers", NOW - 60), Reversal("numWorkers", NOW - 22_000)))
    assert why_not(consider(breach, recent), "workers-up") == (
        "FlapBudgetSpent",
        "numWorkers was reverted 2 times in 6 hours",
    )
    assert consider(breach, old).canary is not None


def test_small_gain_is_refused() -> None:
    found = plan({"prefetchSize": 62}, stages={"tier_load": 0.15, "decode": 0.85}, prefetched=(3.0, 0.0))
    assert why_not(found, "prefetch-up") == ("SmallGain", "prefetchSize 62 -> 64 promises 3%")


@pytest.mark.parametrize(
    ("measure", "refused"), [("", True), ("capacity", True), ("work", False), ("memory", False)]
)
def test_only_a_gain_of_capacity_must_be_large(measure: str, refused: bool) -> None:
    proposal = Proposal("any", (KnobChange("numWorkers", 2, 4),), "p95", 0.5, "", ratio=0.6, measure=measure)
    why = Rejected("any", "SmallGain", "numWorkers 2 -> 4 promises 50% and 0.60 times the capacity")
    assert vet(context(SMALL), TuningState(), proposal) == (why if refused else None)


def test_unknown_knob_has_no_room() -> None:
    assert room(context({}, policy_of(bounds={})), "numWorkers").tunable is False


def test_a_direction_leaves_no_room_the_other_way() -> None:
    own = {name: replace(policy_of().bounds[name], direction="DownOnly") for name in ("numWorkers",)}
    breach = context(SMALL, policy_of(bounds={**policy_of().bounds, **own}), stages=QUEUED)
    limits = room(breach, "numWorkers")
    assert (limits.minimum, limits.maximum) == (1, 2)
    assert consider(breach, TuningState()).canary is None
    own = {"numWorkers": replace(own["numWorkers"], direction="UpOnly")}
    breach = context(SMALL, policy_of(bounds={**policy_of().bounds, **own}), stages=QUEUED)
    assert room(breach, "numWorkers").minimum == 2
    assert consider(breach, TuningState()).canary is not None


def test_vet_refuses_a_companion_that_goes_the_wrong_way() -> None:
    own = {"batchSize": replace(policy_of().bounds["batchSize"], direction="DownOnly")}
    breach = context(SMALL, policy_of(bounds={**policy_of().bounds, **own}), stages=QUEUED)
    proposal = Proposal("workers-up", (KnobChange("batchSize", 2, 4),), "p95", 0.5, "")
    assert vet(breach, TuningState(), proposal) == Rejected(
        "workers-up", "NotTunable", "batchSize may only shrink (direction DownOnly)"
    )
