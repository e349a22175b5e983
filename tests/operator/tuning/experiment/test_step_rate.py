"""Step rates of two arms: no false proofs from machines that differ and wander, and quick true ones."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
from tests.operator.tuning.observations import counts, curve

from kvpilot_operator.tuning.experiment.capacity_verdict import BETTER, WORSE
from kvpilot_operator.tuning.experiment.evidence import GAIN_EVIDENCE, HARM_EVIDENCE
from kvpilot_operator.tuning.experiment.statistics import mixture_evidence
from kvpilot_operator.tuning.experiment.step_rate import (
    as_loaded,
    corrected,
    difference,
    of_equal_prompts,
    of_other_times,
    step_rate,
)
from kvpilot_operator.tuning.observation import Counts
from kvpilot_operator.tuning.state import Effect, KnobChange, StepRate

LONG_S, TICK_S, VERIFY_S = 60, 2, 180
"""Seconds before the change, between two looks, and until the experiment is overdue, at Fast pace."""

RATE = 20.0
"""Requests/s of each arm."""

Array = npt.NDArray[np.float64]


def arm(
    draw: np.random.Generator, runs: int, machine: float, wander: float, effect: float
) -> tuple[Array, Array]:
    """Rates that ``runs`` machines show: over the long window before, and by seconds since the change.

    The log of a machine's speed is its own plus what it wanders by within a minute; requests differ by a
    log-normal of variance 0.3.
    """
    keep = math.exp(-1 / 60)
    fresh = draw.normal(0, wander, (runs, LONG_S + VERIFY_S))
    log = np.empty_like(fresh)
    now = draw.normal(0, wander, runs)
    for second in range(fresh.shape[1]):
        now = keep * now + math.sqrt(1 - keep**2) * fresh[:, second]
        log[:, second] = now
    log += draw.normal(0, machine / math.sqrt(2), (runs, 1))
    log[:, LONG_S:] += effect
    shown = np.exp(log + draw.normal(0, math.sqrt(0.3 / RATE), log.shape))
    since = np.cumsum(shown[:, LONG_S:], axis=1) / np.arange(1, VERIFY_S + 1)
    return shown[:, :LONG_S].mean(axis=1), since


@cache
def experiments(effect: float, machine: float, wander: float, runs: int) -> list[tuple[float, float]]:
    """Seconds to the proof of a gain, and to that of harm, of each run; infinite without."""
    draw = np.random.default_rng(11)
    before, rates = arm(draw, runs, machine, wander, effect)
    other_before, other_rates = arm(draw, runs, machine, wander, 0.0)
    return [
        verdict(
            difference(StepRate(before[run], LONG_S * RATE), StepRate(other_before[run], LONG_S * RATE)),
            rates[run],
            other_rates[run],
        )
        for run in range(runs)
    ]


def verdict(known: Effect | None, rates: Array, others: Array) -> tuple[float, float]:
    """When one experiment ends with a gain, and when with harm, as it is looked at after every tick."""
    for at in range(4, VERIFY_S + 1, TICK_S):
        requests = at * RATE
        found = difference(StepRate(rates[at - 1], requests), StepRate(others[at - 1], requests))
        assert found is not None
        judged = corrected(found, known)
        if mixture_evidence(judged, BETTER) >= GAIN_EVIDENCE:
            return at, math.inf
        if mixture_evidence(judged, WORSE, above=False) >= HARM_EVIDENCE:
            return math.inf, at
    return math.inf, math.inf


@pytest.mark.parametrize("machine", [0.0, 0.15])
@pytest.mark.parametrize("wander", [0.05, 0.1])
def test_machines_that_differ_prove_nothing(machine: float, wander: float) -> None:
    runs = experiments(0.0, machine, wander, 1000)
    assert sum(gain < math.inf for gain, _ in runs) <= 50
    assert sum(harm < math.inf for _, harm in runs) <= 20


def test_twice_the_capacity_is_proven_by_a_few_hundred_requests() -> None:
    gains = sorted(gain for gain, _ in experiments(math.log(2), 0.1, 0.05, 400))
    assert gains[len(gains) // 2] * RATE <= 100
    assert gains[len(gains) * 95 // 100] * RATE <= 300


def test_half_the_capacity_is_proven_harmful() -> None:
    runs = experiments(math.log(0.5), 0.1, 0.05, 400)
    assert sum(harm < math.inf for _, harm in runs) >= 380
    assert not any(gain < math.inf for gain, _ in runs)


def test_the_best_bucket_shows_what_an_engine_can_do() -> None:
    seen = counts(60.0, rows=8, row_rate=100.0, busy=0.5)
    two = Counts(
        outcomes=seen.outcomes,
        step_rows=seen.step_rows * 2,
        bucket_rows={4: seen.step_rows, 8: seen.step_rows},
        bucket_seconds={4: 60.0, 8: 30.0},
    )
    assert step_rate(two, ()).rate == pytest.approx(100.0)
    assert step_rate(two, ()).requests == pytest.approx(600.0), "half of the row-steps of 1,200 requests"


@pytest.mark.parametrize(
    "seen",
    [
        Counts(),
        counts(60.0),  # a runtime without buckets of rows
        counts(60.0, rows=8, row_rate=100.0, busy=0.01),  # 0.6 s in steps
        counts(60.0, rows=8, row_rate=100.0, rate=0.05),  # three requests
        counts(60.0, rows=8, row_rate=100.0, done=0.0),
    ],
    ids=["nothing", "no buckets", "too short", "too few", "none ended"],
)
def test_too_little_work_shows_no_rate(seen: Counts) -> None:
    assert step_rate(seen, ()) == StepRate()
    assert difference(step_rate(seen, ()), StepRate(100.0, 50.0)) is None


def test_the_rate_does_not_depend_on_the_load() -> None:
    shown = {step_rate(counts(60.0, rows=8, row_rate=100.0, busy=busy), ()).rate for busy in (0.1, 0.5, 0.95)}
    assert max(shown) - min(shown) < 1e-9


def test_what_the_machines_differed_by_before_is_taken_out_as_far_as_it_is_known() -> None:
    now = Effect(math.log(1.2), 0.001)
    assert corrected(now, None).log_ratio == now.log_ratio
    known = corrected(now, Effect(math.log(1.2), 0.001))
    assert 0 < known.log_ratio < 0.2 * now.log_ratio
    assert now.variance < known.variance < corrected(now, None).variance
    vague = corrected(now, Effect(math.log(1.2), 10.0))
    assert vague.log_ratio == pytest.approx(now.log_ratio, rel=0.01)


def test_larger_chunks_are_compared_by_requests_as_each_takes_fewer_row_steps() -> None:
    chunk, workers = (KnobChange("maxStepTokens", 16, 32),), (KnobChange("numWorkers", 2, 4),)
    small = replace(counts(60.0, rows=8, row_rate=100.0), step_rows=32 * 1200.0)
    large = replace(counts(60.0, rows=8, row_rate=80.0), step_rows=16 * 1200.0)
    by_steps = difference(step_rate(large, workers), step_rate(small, workers))
    by_requests = difference(step_rate(large, chunk), step_rate(small, chunk))
    assert by_steps is not None and by_requests is not None
    assert math.exp(by_steps.log_ratio) == pytest.approx(0.8), "each step is longer"
    assert math.exp(by_requests.log_ratio) == pytest.approx(1.6), "and does twice the work"
    assert by_requests.variance == pytest.approx(2 * by_steps.variance)


@pytest.mark.parametrize(
    ("rows", "values", "enough"),
    [
        (8.0, (KnobChange("numWorkers", 2, 8),), True),
        (4.0, (KnobChange("numWorkers", 2, 8),), False),
        (2.0, (KnobChange("numWorkers", 16, 4),), True),  # a quarter of the rows is all that it can show
        (1.0, (KnobChange("numWorkers", 16, 4),), False),
        (4.0, (KnobChange("prefetchSize", 32, 16),), False),  # takes no rows away
        (8.0, (KnobChange("cacheStrategy", "lru", "adaptive"), KnobChange("maxMemoryMb", None, 64)), True),
    ],
)
def test_harm_is_seen_with_as_many_rows_as_before(
    rows: float, values: tuple[KnobChange, ...], enough: bool
) -> None:
    assert as_loaded(StepRate(50.0, 100.0, rows), StepRate(100.0, 100.0, 8.0), values) is enough


def test_most_rows_are_told_beside_the_best_rate() -> None:
    """A device that thrashes with 16 rows: it was loaded, and its best is with eight."""
    seen = Counts(
        outcomes={"ok": 100.0},
        step_rows=10_000.0,
        bucket_rows={8: 6000.0, 16: 4000.0, 32: 10.0},
        bucket_seconds={8: 10.0, 16: 20.0, 32: 0.1},
    )
    found = step_rate(seen, ())
    assert (found.rate, found.rows) == (600.0, 16)


PROMPT, ANSWER, TOKEN_S = 256, 8, 0.005
CURVE = curve()


def answered(rows: int, hit: float, *, speed: float = 1.0, requests: int = 400) -> StepRate:
    """What an engine shows that answers long prompts in steps of ``rows`` rows."""
    computed, row_steps = requests * PROMPT * (1 - hit), requests * (ANSWER + 1.0)
    busy_s = (row_steps / rows * CURVE[rows] + computed * TOKEN_S) / speed
    shown = Counts(
        outcomes={"ok": float(requests)},
        query_tokens=float(requests * PROMPT),
        hit_tokens=requests * PROMPT - computed,
        busy_seconds=busy_s,
        steps=row_steps / rows,
        step_rows=row_steps,
        bucket_rows={rows: row_steps},
        bucket_seconds={rows: busy_s},
    )
    return step_rate(shown, (), CURVE)


@pytest.mark.parametrize(("hit", "other_hit"), [(0.43, 0.64), (0.64, 0.43), (0.1, 0.9), (0.0, 1.0)])
def test_what_the_caches_hold_is_no_difference_of_the_engines(hit: float, other_hit: float) -> None:
    arms = answered(4, hit), answered(4, other_hit)
    raw, equal = difference(*arms), of_equal_prompts(*arms)
    assert raw is not None and equal is not None
    assert abs(raw.log_ratio) > 0.25
    assert abs(equal.log_ratio) < 1e-6
    assert equal.variance == pytest.approx(raw.variance + (raw.log_ratio / 2) ** 2), "and less is known"


@pytest.mark.parametrize("hit", [0.3, 0.5, 0.7])
def test_a_gain_shows_for_equal_prompts_whatever_the_caches_hold(hit: float) -> None:
    found = of_equal_prompts(answered(4, hit), answered(1, 1 - hit))
    true = difference(answered(4, 0.5), answered(1, 0.5))
    assert found is not None and true is not None
    assert found.log_ratio == pytest.approx(true.log_ratio, abs=1e-6)


def test_a_slower_engine_is_slower_for_equal_prompts_too() -> None:
    found = of_equal_prompts(answered(4, 0.7, speed=0.5), answered(4, 0.3))
    assert found is not None and found.log_ratio < math.log(0.6)


def test_without_a_curve_or_prompts_rates_are_compared_as_they_are() -> None:
    one, other = StepRate(120.0, 100.0, computed=30.0), StepRate(100.0, 100.0, computed=10.0)
    assert of_equal_prompts(one, other) == difference(one, other)
    assert of_equal_prompts(StepRate(120.0, 100.0), StepRate(100.0, 100.0)) is not None
    assert of_equal_prompts(StepRate(), other) is None


def test_the_past_of_the_same_engines_needs_no_prior_of_machines() -> None:
    now = Effect(math.log(1.5), 0.001)
    assert of_other_times(now).log_ratio == now.log_ratio
    assert now.variance < of_other_times(now).variance < corrected(now, None).variance
