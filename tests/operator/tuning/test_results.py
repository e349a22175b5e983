"""What was predicted of actions without arms, against what came of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.operator.tuning.observations import BAD, DOWN, NOW, curve, gauges, many, observe
from tests.operator.tuning.plans import QUEUED, SMALL
from tests.operator.tuning.policies import policy_of

from kvpilot_operator.tuning.decide import decide
from kvpilot_operator.tuning.decision import Decision
from kvpilot_operator.tuning.observation import Observation
from kvpilot_operator.tuning.state import Expected, Prediction, ReplicaMark, TuningState

CONFIG = {"numWorkers": 8, "batchSize": 16}
USE = Prediction("use", 0.6, 0.52, 0.69)
OUT = Expected("d-0003", "replicas-up", "replicas 2 -> 3", USE, NOW, 3)
CUT = Expected("d-0004", "memory-emergency", "batchSize 16 -> 8", Prediction("memory", 0.9, 0.85, 0.95), NOW)


def serving(replicas: int, at: float = 0.0, config: dict[str, Any] = CONFIG, **figures: Any) -> Observation:
    return observe(*many(replicas, **figures), config=config, at=NOW + at)


def step(state: TuningState, seen: Observation, **policy: Any) -> Decision:
    return decide(seen, state, policy_of(**policy), seen.at)


def waiting(*items: Expected, **fields: Any) -> TuningState:
    return TuningState(last_generation=1, next_decision=5, expected=items, **fields)


def test_the_use_of_the_replicas_is_measured_once_they_have_served_for_a_window() -> None:
    begun = step(waiting(OUT), serving(3, busy=0.5))
    assert (begun.records, begun.state.expected) == ((), (replace(OUT, since=NOW),))
    early = step(begun.state, serving(3, at=10.0, busy=0.5))
    assert (early.records, early.state.expected) == ((), begun.state.expected), "nothing is written meanwhile"
    shown = step(early.state, serving(3, at=11.0, busy=0.5))
    (record,) = shown.records
    assert (record.id, record.rule, record.outcome) == ("d-0003", "replicas-up", "Measured")
    assert record.summary == (
        "replicas 2 -> 3: the replicas were 50% in use after 11 s; 60% (52% to 69%) was predicted."
    )
    assert record.evidence == {
        "measure": "use",
        "predicted": 0.6,
        "predictedLow": 0.52,
        "predictedHigh": 0.69,
        "measured": 0.5,
        "predictionError": -0.1,
    }
    assert (shown.state.expected, shown.state.next_decision) == ((), 5)


def test_replicas_that_come_late_are_waited_for_until_the_deadline() -> None:
    state = step(step(waiting(OUT), serving(3)).state, serving(2, at=11.0)).state
    assert state.expected == (OUT,), "one of them is gone again"
    assert step(state, serving(2, at=239.0)).records == ()
    (record,) = step(state, serving(2, at=240.0)).records
    assert record.summary == (
        "replicas 2 -> 3: its effect could not be measured within 240 s; 60% (52% to 69%) was predicted."
    )
    assert (record.evidence["measured"], record.evidence["predictionError"]) == (None, None)


def test_nothing_is_measured_without_metrics() -> None:
    ready = waiting(replace(OUT, since=NOW - 60))
    silent = observe(*many(3), config=CONFIG, metrics_problem=DOWN)
    assert step(ready, silent).state.expected == ready.expected


def test_memory_is_measured_after_a_cut_has_settled() -> None:
    state = step(waiting(CUT), serving(3, gauges=gauges(memory_ratio=0.78))).state
    assert step(state, serving(3, at=14.0, gauges=gauges(memory_ratio=0.78))).records == ()
    (record,) = step(state, serving(3, at=15.0, gauges=gauges(memory_ratio=0.78))).records
    assert (record.id, record.outcome) == ("d-0004", "Measured")
    assert record.summary == (
        "batchSize 16 -> 8: memory was at 78% after 15 s; 90% (85% to 95%) was predicted."
    )
    assert record.evidence["predictionError"] == -0.12


def test_a_result_keeps_no_experiment_from_beginning() -> None:
    due = waiting(replace(OUT, since=NOW - 60))
    queued = serving(3, config=SMALL, attained=BAD, stages=QUEUED)
    assert [record.outcome for record in step(due, queued).records] == ["Measured", "Started"]


FULL = gauges(memory_ratio=0.97, cached_bytes=200 * 2**20, memory_limit_bytes=1000 * 2**20)


def test_an_emergency_says_what_should_come_of_it() -> None:
    decision = step(waiting(), serving(3, gauges=FULL))
    (record,) = decision.records
    # At least 2 points of the limit, at most half of the 77 that the cache does not hold.
    assert record.evidence | {"why": ""} == {
        "verdict": "Emergency",
        "why": "",
        "measure": "memory",
        "predicted": 0.7675,
        "predictedLow": 0.585,
        "predictedHigh": 0.95,
    }
    (item,) = decision.state.expected
    assert (item.id, item.what, item.replicas) == ("d-0005", "batchSize 16 -> 8", 0)


def test_a_scale_in_says_what_should_come_of_it() -> None:
    marks = (ReplicaMark(NOW - 60, 2), ReplicaMark(NOW - 1, 2))
    decision = step(waiting(scale_down=marks), serving(3, busy=0.3, rate=5.0))
    (record,) = decision.records
    assert (record.outcome, record.replicas) == ("ScaledIn", (3, 2))
    assert record.evidence["predicted"] == 0.45
    assert record.evidence["predictedLow"] == pytest.approx(0.45 / 1.15, abs=1e-4)
    assert record.evidence["predictedHigh"] == pytest.approx(0.45 * 1.15, abs=1e-4)
    (item,) = decision.state.expected
    assert (item.id, item.what, item.replicas) == ("d-0005", "replicas 3 -> 2", 2)


def test_another_scaling_ends_the_wait_for_the_last_one() -> None:
    full = serving(2, rate=60.0, busy=1.0, rows=8, row_rate=300.0, gauges=gauges(curve=curve()))
    decision = step(waiting(OUT, CUT), full)
    assert [(record.id, record.outcome) for record in decision.records] == [
        ("d-0003", "Measured"),
        ("d-0005", "ScaledOut"),
    ]
    assert decision.records[0].summary == (
        "replicas 2 -> 3: another one came before its effect showed; 60% (52% to 69%) was predicted."
    )
    assert [item.id for item in decision.state.expected] == ["d-0004", "d-0005"], "of the same kind alone"


def test_what_the_user_asks_for_is_no_prediction() -> None:
    decision = step(waiting(OUT), replace(serving(3), desired_replicas=9))
    (measured, bounded) = decision.records
    assert (measured.outcome, bounded.rule) == ("Measured", "replicas-bounds")
    assert "predicted" not in bounded.evidence
    assert decision.state.expected == ()
