"""Rules about workers, batch and step tokens."""

from __future__ import annotations

import pytest
from tests.operator.tuning.observations import context_of, curve, gauges, observe, three
from tests.operator.tuning.plans import QUEUED, SMALL, bounded, plan, proposed, values, why_not
from tests.operator.tuning.policies import policy_of

from kvpilot_operator.tuning.context import Proposal
from kvpilot_operator.tuning.rules.compute import workers_down
from kvpilot_operator.tuning.state import KnobChange


def test_workers_are_sized_by_littles_law_and_carry_the_batch() -> None:
    # 20 requests/s x 0.29 s of work = 5.8 at once; with headroom 11.6: from 3 the next value is 12, fourfold.
    found = plan({"numWorkers": 3, "batchSize": 2}, stages=QUEUED)
    assert values(found) == {"numWorkers": (3, 12), "batchSize": (2, 12)}
    proposal = proposed(found)
    assert (proposal.rule, proposal.objective) == ("workers-up", "p95")
    assert proposal.predicted_gain == pytest.approx(0.71)
    assert proposal.message == (
        "admission wait was 71% of request time; 5.8 requests in work at once are needed per replica"
    )


def test_workers_grow_at_most_fourfold() -> None:
    assert values(plan(SMALL, stages=QUEUED, rate=90.0))["numWorkers"] == (2, 8)


def test_workers_alone_when_the_batch_holds_them() -> None:
    assert values(plan({"numWorkers": 2, "batchSize": 16}, stages=QUEUED)) == {"numWorkers": (2, 8)}


@pytest.mark.parametrize("ceiling", [{"numWorkers": 4}, None])
def test_workers_stay_within_bounds_and_ceilings(ceiling: dict[str, int] | None) -> None:
    policy = policy_of() if ceiling else bounded(numWorkers=(1, 4))
    found = plan(SMALL, policy, stages=QUEUED, ceilings=ceiling)
    assert values(found) == {"numWorkers": (2, 4), "batchSize": (2, 4)}


def test_workers_beyond_a_batch_that_cannot_grow_only_move_the_wait() -> None:
    found = plan(SMALL, bounded(batchSize=(1, 2)), stages=QUEUED)
    assert found.canary is None
    assert why_not(found, "workers-up") == ("AtBound", "numWorkers is 2, and more would wait for the batch")


def test_saturated_device_gets_no_more_workers() -> None:
    full = gauges(marginal_gain=0.05)
    found = plan(SMALL, stages=QUEUED, busy=0.97, gauges=full)
    assert found.canary is None
    assert why_not(found, "workers-up") == (
        "DeviceSaturated",
        "more requests at once would only share a saturated device",
    )


@pytest.mark.parametrize(("busy", "gain"), [(0.97, 0.9), (0.6, 0.05)])
def test_busy_with_few_rows_is_not_saturated(busy: float, gain: float) -> None:
    assert (
        proposed(plan(SMALL, stages=QUEUED, busy=busy, gauges=gauges(marginal_gain=gain))).rule
        == "workers-up"
    )


def test_waits_for_pages_are_not_waits_for_workers() -> None:
    config = {"numWorkers": 16, "batchSize": 16, "maxTokens": 2048}
    starved = gauges(waiting=20.0, running=6.0)
    found = plan(config, stages=QUEUED, gauges=starved)
    assert why_not(found, "workers-up") == (
        "WaitingForPages",
        "requests wait while fewer than 16 slots are in use",
    )
    assert (proposed(found).rule, values(found)) == ("cache-quota-up", {"maxTokens": (2048, 3072)})


def test_slots_that_are_free_for_a_moment_are_no_wait_for_pages() -> None:
    config = {"numWorkers": 16, "batchSize": 16, "maxTokens": 2048}
    # 20 requests/s of .75 s in work hold 15 slots; at the scrape many of them have just ended together.
    held = {**QUEUED, "decode": 0.75}
    found = plan(config, stages=held, rate=20.0, gauges=gauges(waiting=20.0, running=6.0))
    assert proposed(found).rule == "workers-up"


def test_fewer_workers_say_how_much_of_the_step_rate_they_leave() -> None:
    shown = gauges(curve=curve())
    crowded = three(
        rows=16,
        row_rate=320.0,
        rate=12.0,
        busy=0.15,
        stages={"prefill": 0.02, "decode": 0.5},
        attained={"p50": 0.2, "p95": 0.9, "p99": 1.0},
        gauges=shown,
    )
    found = workers_down(context_of(observe(*crowded, config={"numWorkers": 24, "batchSize": 24})))
    assert isinstance(found, Proposal), found
    assert (found.rule, found.values) == ("workers-down", (KnobChange("numWorkers", 24, 4),))
    # A step with 16 rows takes 16 / 320 = 0.05 s, of which the curve explains 0.016 + 0.0008 x 16; bursts
    # fill all 24 slots.
    prefill_s = 0.05 - shown.curve[16]
    rate = {rows: rows / (0.016 + 0.0008 * rows + prefill_s * rows / 16) for rows in (4, 24)}
    assert found.ratio == pytest.approx(rate[4] / rate[24])
    assert found.ratio < 1
    assert found.measure == "seconds", "who is not admitted waits, so that the work alone would look good"


def test_batch_grows_to_the_workers_at_most() -> None:
    stages = {"batch_wait": 0.5, "prefill": 0.1, "decode": 0.4}
    found = plan({"numWorkers": 8, "batchSize": 4}, stages=stages)
    assert (proposed(found).rule, values(found)) == ("batch-up", {"batchSize": (4, 8)})
    assert proposed(found).message == "batch wait was 50% of request time with 4 rows for 8 workers"
    assert why_not(found, "workers-up") == ("NotAtFault", "admission wait is not at fault")


def test_step_tokens_grow_when_steps_are_full_of_prompts() -> None:
    stages = {"prefill": 0.9, "decode": 0.1}
    config = {"numWorkers": 8, "batchSize": 8, "maxStepTokens": 256}
    full = plan(config, stages=stages, step_tokens=250.0)
    assert (proposed(full).rule, values(full)) == ("step-tokens-up", {"maxStepTokens": (256, 512)})
    assert proposed(full).predicted_gain == pytest.approx(0.45)
    assert why_not(plan(config, stages=stages, step_tokens=100.0), "step-tokens-up") == (
        "NotEffective",
        "steps do not fill 256 tokens",
    )
