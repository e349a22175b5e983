"""The simulated engine against what queueing, batching and its own counters must give."""

from __future__ import annotations

from itertools import pairwise

import pytest

from kvpilot_operator.backtest.engine import SimulatedEngine
from kvpilot_operator.backtest.model import EngineModel, Fault, SimulatedRequest
from kvpilot_operator.tuning.observation import Counts, Promoted

MODEL = EngineModel(step_s=lambda rows: 0.01 + 0.001 * rows, hits=lambda config: 0.8, marginal_gain=None)
WIDE = {"numWorkers": 16, "batchSize": 16, "maxStepTokens": 100}


def engine(config: dict[str, int] | None = None, model: EngineModel = MODEL) -> SimulatedEngine:
    return SimulatedEngine("u0", "chat-0", Promoted(1, {**WIDE, **(config or {})}), model, 0.0)


def request(at: float, *, prompt: float = 50, cached: float = 0, out: float = 5) -> SimulatedRequest:
    return SimulatedRequest(at, prompt, cached, out)


def counts(item: SimulatedEngine, at: float) -> Counts:
    item.scrape(at)
    return item.sample(at, {"all": at}).windows["all"]


def latencies(item: SimulatedEngine) -> list[float]:
    item.meter()
    return [took for _, took, _ in item.ended]


def test_lone_request_takes_its_prefill_and_its_steps() -> None:
    item = engine(model=EngineModel(step_s=lambda rows: 0.01, prefill_s=0.001, hits=lambda c: 0.8))
    item.run(10.0, [request(1.0, prompt=250, cached=50, out=5)])
    # 200 tokens that are not cached are two chunks of 100: two steps, then four more tokens.
    item.meter()
    assert item.ended == [pytest.approx((1.0, 6 * 0.01 + 200 * 0.001, 2 * 0.01 + 200 * 0.001))]


def test_a_prompt_costs_the_same_beside_rows_that_leave_it_less_of_a_step() -> None:
    model = EngineModel(step_s=lambda rows: 0.01, prefill_s=0.001)
    item = engine({"maxStepTokens": 32}, model)
    rows = [request(1.0, prompt=10, out=1000) for _ in range(15)]
    item.run(60.0, [*rows, request(3.0, prompt=320, out=1)])
    assert latencies(item)[0] == pytest.approx(0.320 + 0.01 * -(-320 // (32 - 15)), abs=0.02)
    assert counts(item, 60.0).busy_seconds == pytest.approx(1000 * 0.01 + (15 * 10 + 320) * 0.001, rel=0.01)


def test_a_row_costs_what_it_attends_to() -> None:
    model = EngineModel(step_s=lambda rows: 0.01, context_s=0.00001, hits=lambda config: 0.8)
    item = engine(model=model)
    item.run(10.0, [request(1.0, prompt=90, cached=90, out=21)])
    # 20 steps attend to 91, 92, ... 110 tokens, and the first one reads what is cached
    assert latencies(item) == [pytest.approx(21 * 0.01 + (90 + 20 * 100.5) * 0.00001)]
    assert item.curve()[1] == pytest.approx(0.01), "as measured at start-up"


def test_a_computed_prompt_token_costs_what_it_attends_to() -> None:
    model = EngineModel(step_s=lambda rows: 0.01, attend_s=0.00001, hits=lambda config: 0.8)
    item = engine(model=model)
    item.run(10.0, [request(1.0, prompt=90, cached=50, out=5)])
    # 40 tokens attend to the 50 cached ones and to half of the 40 in the mean
    assert latencies(item) == [pytest.approx(5 * 0.01 + 40 * (50 + 40 / 2) * 0.00001)]
    assert item._attending == pytest.approx(0.0, abs=1e-12)


def test_rows_share_the_steps() -> None:
    item = engine()
    item.run(10.0, [request(1.0, prompt=10) for _ in range(8)])
    assert latencies(item) == [pytest.approx(5 * 0.018)] * 8


def test_request_that_comes_within_a_step_begins_with_the_next() -> None:
    item = engine(model=EngineModel(step_s=lambda rows: 0.1))
    item.run(10.0, [request(1.0, out=10), request(1.05, out=1)])
    assert latencies(item)[0] == pytest.approx(0.05 + 0.1)


def test_stages_add_up_to_the_whole_latency() -> None:
    item = engine({"numWorkers": 4, "batchSize": 2})
    item.run(10.0, [request(1.0 + 0.01 * index) for index in range(40)])
    found = counts(item, 10.0)
    assert sum(found.stage_seconds.values()) == pytest.approx(sum(latencies(item)))
    assert min(found.stage_seconds[name] for name in ("admission_wait", "batch_wait", "prefill")) > 0


def test_buckets_hold_all_rows_and_seconds() -> None:
    item = engine()
    item.run(30.0, [request(0.02 * index, out=20) for index in range(400)])
    found = counts(item, 30.0)
    assert sum(found.bucket_rows.values()) == pytest.approx(found.step_rows)
    assert found.step_rows == pytest.approx(400 * 20, rel=0.01), "a row that joins within a step counts there"
    assert sum(found.bucket_seconds.values()) == pytest.approx(found.busy_seconds)
    for rows in found.bucket_seconds:
        rate = found.bucket_rows[rows] / found.bucket_seconds[rows]
        least, most = rows // 2 + 1, rows
        assert least / (0.01 + 0.001 * least) - 1e-6 <= rate <= most / (0.01 + 0.001 * most) + 1e-6


def test_throughput_is_that_of_the_rows_in_use() -> None:
    for workers in (2, 4, 8):
        item = engine({"numWorkers": workers}, EngineModel(step_s=MODEL.step_s, queue=100_000, timeout=1e6))
        item.run(100.0, [request(0.001 * index, prompt=10, out=10) for index in range(20_000)])
        expected = workers / (10 * (0.01 + 0.001 * workers))
        assert counts(item, 100.0).completed / 100 == pytest.approx(expected, rel=0.02)


def test_prompt_chunk_of_whole_steps_ends() -> None:
    item = engine(model=EngineModel(step_s=lambda rows: 0.01, prefill_s=0.001))
    item.run(10.0, [request(1.0, prompt=300)])
    assert len(latencies(item)) == 1


def test_full_queue_sheds_and_long_waits_time_out() -> None:
    item = engine({"numWorkers": 1}, EngineModel(step_s=lambda rows: 1.0, queue=3, timeout=8.0))
    item.run(30.0, [request(1.0 + 0.01 * index, out=5) for index in range(6)])
    found = counts(item, 30.0)
    assert (found.arrivals, found.outcomes["shed"], found.outcomes["timeout"]) == (6, 2, 3)


def test_lowered_batch_lets_rows_finish() -> None:
    item = engine()
    item.run(1.1, [request(1.0, out=100) for _ in range(12)])
    item.config = {**item.config, "batchSize": 2, "numWorkers": 2}
    item.run(60.0, [request(1.2, out=100)])
    assert (len(latencies(item)), item.inside) == (13, 0)


def test_inert_change_leaves_the_capacity_as_it_was() -> None:
    item = engine({"numWorkers": 2}, EngineModel(queue=100, fault=Fault({"numWorkers": 2.0}, inert=True)))
    item.config = {**item.config, "numWorkers": 8}
    item.run(1.0, [request(0.0, out=1000) for _ in range(12)])
    item.scrape(1.0)
    sample = item.sample(1.0, {"short": 1.0})
    assert item.held == 2
    assert (sample.gauges.running, sample.gauges.waiting) == (8, 4), "the slots are counted"
    assert set(sample.windows["short"].bucket_rows) == {2}, "and nothing else is"


def test_slower_fault_bites_above_its_value_only() -> None:
    model = EngineModel(step_s=lambda rows: 0.01, fault=Fault({"numWorkers": 4.0}, slower=2.0))
    for workers, took in ((4, 0.05), (5, 0.1)):
        item = engine({"numWorkers": workers}, model)
        item.run(10.0, [request(1.0, prompt=10, out=5)])
        assert latencies(item) == [pytest.approx(took)]


def test_restart_loses_requests_and_counts_since_the_last_scrape() -> None:
    item = engine()
    item.run(5.0, [request(0.1 * index) for index in range(20)])
    item.scrape(5.0)
    item.run(6.0, [request(5.1), request(5.99)])
    item.restart(Promoted(1, WIDE))
    assert latencies(item)[-1] == float("inf")
    item.run(10.0, [request(7.0)])
    found = counts(item, 10.0)
    assert (found.arrivals, found.completed) == (21, 21), "a reset is no decrease"
    assert item.describe().instance == "u0.1"


def test_gap_in_the_scrapes_is_not_covered() -> None:
    item = engine()
    for second in range(1, 31):
        item.run(float(second), [request(second - 0.5)])
        item.stale = 10 < second <= 20
        item.scrape(float(second))
    found = item.sample(30.0, {"long": 30.0}).windows["long"]
    assert (found.arrivals, found.replica_seconds) == (30, 20.0)


def test_curve_is_measured_where_steps_were_and_scaled_elsewhere() -> None:
    item = engine(model=EngineModel(step_s=MODEL.step_s, start_slope=0.5))
    assert item.curve()[8] == pytest.approx(0.011 + 0.5 * 0.007), "before any step, as measured at start-up"
    item.outlier = 2.0
    item.run(5.0, [request(1.0 + 0.001 * index, out=100) for index in range(4)])
    item.scrape(5.0)
    curve = item.curve()
    assert curve[4] == pytest.approx(2 * 0.014)
    assert curve[8] == pytest.approx(curve[4] * (0.011 + 0.5 * 0.007) / (0.011 + 0.5 * 0.003))
    assert all(low < high for low, high in pairwise(curve.values()))


def test_description_is_one_object_while_nothing_changes() -> None:
    item = engine()
    assert item.describe() is item.describe()
    before = item.describe()
    item.config = {**WIDE, "numWorkers": 3}
    assert (before.config.num_workers, item.describe().config.num_workers) == (16, 3)
