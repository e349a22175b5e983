"""How an experiment begins: who tries it, who it is compared with, and what is remembered."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from tests.operator.tuning.experiments import CONFIG, begun, context, restarted, seen
from tests.operator.tuning.observations import BAD, GOOD, NOW, replica

from kvpilot_operator.tuning.context import Draft, Proposal
from kvpilot_operator.tuning.experiment.start import enough_exposure, start
from kvpilot_operator.tuning.state import MAX_CONTROLS, KnobChange, Phase, StepRate, TuningState

PROPOSAL = Proposal(
    "workers-up", (KnobChange("numWorkers", 2, 4),), "p95", 0.4, "workers were short", ratio=1.8
)


def started(now: float, proposal: Proposal = PROPOSAL, **figures: Any) -> Draft:
    """An experiment that begins on three replicas, of which chat-0 restarted once."""
    first, *others = (replica(f"chat-{index}", config=CONFIG, attained=BAD, **figures) for index in range(3))
    at = replace(context(seen(restarted(first), *others)), now=now)
    return start(at, Draft(TuningState()), proposal, ())


def test_start_draws_the_canary_from_those_with_the_fewest_restarts_and_names_the_others() -> None:
    draft = started(NOW)
    change = begun(draft)
    assert change.canary is not None
    assert (change.canary.name, [item.name for item in change.controls]) == ("chat-2", ["chat-0", "chat-1"])
    assert (draft.state.phase, change.epoch, change.generation, change.restarts) == (Phase.CANARY, 1, 1, 1)
    assert draft.records[0].summary == (
        "Workers were short; trying numWorkers 2 -> 4 on chat-2 against chat-0, chat-1; predicted gain 40%."
    )
    assert draft.records[0].evidence == {
        "seed": change.seed,
        "measure": "capacity",
        "why": "workers were short",
        "predictedGain": 0.4,
        "predictedRatio": 1.8,
    }


def test_draw_of_the_canary_favours_no_name() -> None:
    drawn = Counter(begun(started(NOW + tick)).canary_uid for tick in range(200))
    assert set(drawn) == {"uid-chat-1", "uid-chat-2"}
    assert min(drawn.values()) > 70


def started_on_many(now: float) -> Draft:
    """An experiment that begins on 200 replicas, of which each restarted once."""
    replicas = (restarted(replica(f"chat-{index}", config=CONFIG, attained=BAD)) for index in range(200))
    return start(replace(context(seen(*replicas)), now=now), Draft(TuningState()), PROPOSAL, ())


def test_start_draws_a_few_controls_from_many_replicas_and_names_them() -> None:
    draft = started_on_many(NOW)
    change, record = begun(draft), draft.records[0]
    names = tuple(item.name for item in change.controls)
    assert len({*change.control_uids, change.canary_uid}) == MAX_CONTROLS + 1 == 9
    assert record.controls == names
    assert f"against {', '.join(names)};" in record.summary
    assert change.restarts == 9, "of both arms, so that one more on them aborts it"


def test_draw_of_the_controls_favours_no_name() -> None:
    drawn = Counter(uid for tick in range(200) for uid in begun(started_on_many(NOW + tick)).control_uids)
    assert len(drawn) == 200
    assert max(drawn.values()) < 30, "each is drawn 8 times of 200"


def test_start_remembers_how_many_requests_failed_also_without_buckets_of_rows() -> None:
    change = begun(started(NOW, errors=0.05))
    assert (change.rate_before, change.errors_before) == (StepRate(), pytest.approx(0.05))
    assert change.judged_before == pytest.approx(3 * 20.0 * 60.0), (
        "three replicas, 20 requests/s, long window"
    )


def test_start_remembers_how_fast_the_arms_were() -> None:
    change = begun(started(NOW, row_rate=100.0))
    assert change.measure == "capacity"
    assert change.rate_before.rate == pytest.approx(100.0)
    assert change.difference_before is not None
    assert change.difference_before.log_ratio == pytest.approx(0.0)
    other = begun(started(NOW, replace(PROPOSAL, ratio=0.0, measure="tierLoad"), stages={"tier_load": 0.4}))
    assert (other.measure, other.ratio) == ("tierLoad", 0.0)
    assert other.difference_before is not None and other.difference_before.variance > 0


@pytest.mark.parametrize(("rate", "enough"), [(20.0, True), (0.2, False)])
def test_exposure_is_what_one_replica_gets_in_the_time_allowed(rate: float, enough: bool) -> None:
    replicas = (replica(f"chat-{index}", rate=rate, attained=GOOD) for index in range(3))
    assert enough_exposure(context(seen(*replicas))) == enough
