"""Series become samples, and what is not whole becomes no sample."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from kvpilot_engine.contract import PAGE_TOKENS
from kvpilot_engine.contract import metrics as names
from kvpilot_operator.adapters.metrics.series import (
    COUNTERS,
    GAUGES,
    OPTIONAL_COUNTERS,
    IncompleteSeriesError,
    SeriesKey,
    own_labels,
    sample_from,
    series_key,
)
from kvpilot_operator.tuning.observation import OPTIONAL_COUNTS, MemoryUse, Sample


def key(name: str, **labels: str) -> SeriesKey:
    return series_key(labels, name)


def increases() -> dict[SeriesKey, float]:
    named = (*COUNTERS, *OPTIONAL_COUNTERS)
    values = {key(name): 0.0 for name in named if not name.endswith("_bucket") and "_step_bucket" not in name}
    for i, edge in enumerate(names.EDGES_S):
        values[key(f"{names.REQUEST_SECONDS}_bucket", le=f"{edge:g}")] = float(i)
        values[key(f"{names.FIRST_TOKEN_SECONDS}_bucket", le=str(edge))] = float(2 * i)
    return values


def gauges() -> dict[SeriesKey, float]:
    return {key(name): 1.0 for name in GAUGES}


def sample(**changed: dict[SeriesKey, float]) -> Sample:
    return sample_from(
        {"short": changed.get("short", increases())},
        changed.get("gauges", gauges()),
        {"short": 9.0},
        0.5,
        9.0,
    )


def test_only_labels_of_the_contract_distinguish_series() -> None:
    name = names.HIT_TOKENS_TOTAL
    one = series_key({"__name__": name, "pod": "a", "tier": "pool", "prometheus_replica": "a"})
    assert one == series_key({"__name__": name, "pod": "b", "tier": "pool", "endpoint": "http"})
    assert one == (name, (("tier", "pool"),))
    bucket = f"{names.STAGE_SECONDS}_bucket"
    assert own_labels(bucket) == {"stage", "le"}
    assert own_labels("up") == frozenset()


def test_counts_come_from_their_series() -> None:
    short = increases() | {
        key(names.ARRIVALS_TOTAL): 30.0,
        key(names.REQUESTS_TOTAL, outcome="ok"): 20.0,
        key(names.REQUESTS_TOTAL, outcome="shed"): 2.0,
        key(names.REQUESTS_TOTAL, outcome="cancelled"): 3.0,
        key(names.HIT_TOKENS_TOTAL, tier="pool"): 100.0,
        key(names.HIT_TOKENS_TOTAL, tier="host"): 60.0,
        key(names.PREFETCH_BLOCKS_TOTAL, result="used"): 7.0,
        key(names.PREFETCH_BLOCKS_TOTAL, result="wasted"): 2.0,
        key(names.CODEC_SECONDS_TOTAL, op="decode"): 0.25,
        key(f"{names.STAGE_SECONDS}_sum", stage="prefill"): 4.0,
    }
    counts = sample_from({"short": short}, gauges(), {"short": 10.0}, 0.5, 10.0).windows["short"]
    assert (counts.arrivals, counts.judged, counts.completed, counts.replica_seconds) == (30, 22, 20, 10)
    assert (counts.hit_tokens, counts.host_hit_tokens) == (160, 60)
    assert (counts.prefetch_used, counts.prefetch_wasted, counts.decode_seconds) == (7, 2, 0.25)
    assert counts.stage_seconds["prefill"] == 4.0


@pytest.mark.parametrize("edge", names.EDGES_S)
def test_every_published_edge_is_there_whatever_its_spelling(edge: float) -> None:
    counts = sample_from({"short": increases()}, gauges(), {}, 0, 0).windows["short"]
    index = names.EDGES_S.index(edge)
    assert counts.request_within[edge] == index
    assert counts.first_token_within[edge] == 2 * index


def test_memory_is_the_fullest_kind_and_bytes_are_all_tiers() -> None:
    values = gauges() | {
        key(names.MEMORY_RATIO, kind="host"): 0.4,
        key(names.MEMORY_RATIO, kind="device"): 1.2,
        key(names.MEMORY_LIMIT_BYTES, kind="host"): 100.0,
        key(names.MEMORY_LIMIT_BYTES, kind="device"): 70.0,
        key(names.CACHE_BYTES, tier="pool"): 10.0,
        key(names.CACHE_BYTES, tier="host"): 5.0,
        key(names.CONFIG_GENERATION): 17.0,
    }
    got = sample_from({}, values, {}, 0, 0).gauges
    assert (got.memory_ratio, got.cached_bytes, got.generation) == (1.2, 16.0, 17)
    assert got.memory_limit_bytes == 70.0


def test_memory_is_known_by_kind() -> None:
    by_tier = {key(names.CACHE_BYTES), key(names.CACHE_BUDGET_BYTES)}
    values = {name: value for name, value in gauges().items() if name not in by_tier} | {
        key(names.MEMORY_RATIO, kind="host"): 0.4,
        key(names.MEMORY_RATIO, kind="device"): 1.2,
        key(names.MEMORY_LIMIT_BYTES, kind="host"): 100.0,
        key(names.MEMORY_LIMIT_BYTES, kind="device"): 70.0,
        key(names.CACHE_BYTES, tier="pool"): 10.0,
        key(names.CACHE_BYTES, tier="host"): 5.0,
        key(names.CACHE_BUDGET_BYTES, tier="pool"): 12.0,
        key(names.CACHE_BUDGET_BYTES, tier="host"): 6.0,
    }
    got = sample_from({}, values, {}, 0, 0).gauges
    assert got.host == MemoryUse(0.4, 100.0, 5.0, 6.0)
    assert got.device == MemoryUse(1.2, 70.0, 10.0, 12.0)
    values[key(names.MEMORY_LIMIT_BYTES, kind="device")] = 0.0
    got = sample_from({}, values, {}, 0, 0).gauges
    assert got.device is None
    assert got.host == MemoryUse(0.4, 100.0, 15.0, 18.0), "the pool lies on the host"


def test_optional_series_are_absent_and_not_zero() -> None:
    short = increases() | {
        key(names.BUCKET_ROWS_TOTAL, rows="16"): 320.0,
        key(names.BUCKET_ROWS_TOTAL, rows="2"): 4.0,
        key(names.BUCKET_SECONDS_TOTAL, rows="16"): 2.0,
    }
    curve = {key(names.STEP_CURVE_SECONDS, rows="8"): 0.02}
    got = sample_from({"short": short}, gauges() | curve, {"short": 10.0}, 0.5, 10.0)
    assert got.windows["short"].bucket_rows == {2: 4.0, 16: 320.0}
    assert got.windows["short"].bucket_seconds == {16: 2.0}
    assert got.gauges.curve == {8: 0.02}
    without = sample_from({"short": increases()}, gauges(), {"short": 10.0}, 0.5, 10.0)
    assert (without.windows["short"].bucket_rows, without.gauges.curve) == ({}, {})
    assert (without.gauges.longest_request_tokens, without.gauges.token_bytes) == (None, None)
    assert without.gauges.marginal_gain is None
    held = {
        key(names.LONGEST_REQUEST_TOKENS): 3072.0,
        key(names.STEP_MARGINAL_GAIN): 0.25,
        key(names.CACHED_PAGES, tier="pool"): 2.0,
        key(names.CACHE_BYTES, tier="pool"): 64.0 * PAGE_TOKENS,
    }
    got = sample_from({}, gauges() | held, {}, 0, 0).gauges
    assert (got.longest_request_tokens, got.token_bytes, got.marginal_gain) == (3072.0, 32.0, 0.25)


def test_a_window_without_series_is_absent_and_not_zero() -> None:
    got = sample_from({"short": increases(), "long": {}}, gauges(), {"short": 5.0}, 0.5, 5.0)
    assert set(got.windows) == {"short"}


@pytest.mark.parametrize("name", [n for n in COUNTERS if not n.endswith("_bucket")])
def test_a_missing_essential_counter_is_no_sample(name: str) -> None:
    values = increases()
    del values[key(name)]
    with pytest.raises(IncompleteSeriesError, match=f"window short: no series of {name}$"):
        sample(short=values)


@pytest.mark.parametrize(("count", "metric"), OPTIONAL_COUNTS.items())
def test_a_count_that_is_not_exported_is_none_and_the_others_stay(count: str, metric: str) -> None:
    whole = sample().windows["short"]
    values = {k: v for k, v in increases().items() if not k[0].startswith(metric)}
    counts = sample(short=values).windows["short"]
    gone = {item for item, name in OPTIONAL_COUNTS.items() if name == metric}
    assert count in gone
    assert counts == replace(whole, **dict.fromkeys(gone))


@pytest.mark.parametrize("histogram", [names.REQUEST_SECONDS, names.FIRST_TOKEN_SECONDS])
def test_a_missing_edge_is_no_sample(histogram: str) -> None:
    values = increases()
    spelled = next(k for k in values if k[0] == f"{histogram}_bucket" and dict(k[1])["le"] == "0.5")
    del values[spelled]
    with pytest.raises(IncompleteSeriesError, match=rf"{histogram}_bucket lacks the edges 0\.5 s"):
        sample(short=values)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_no_sample(value: float) -> None:
    with pytest.raises(IncompleteSeriesError, match=f"last values: kvpilot_memory_ratio.* is {value}"):
        sample(gauges=gauges() | {key(names.MEMORY_RATIO): value})


def test_a_missing_gauge_is_no_sample() -> None:
    with pytest.raises(IncompleteSeriesError, match="no series of kvpilot_memory_ratio"):
        sample(gauges={k: v for k, v in gauges().items() if k[0] != names.MEMORY_RATIO})


@pytest.mark.parametrize(
    ("series", "message"),
    [
        (key(names.BUCKET_ROWS_TOTAL), r"bucket_rows_total has rows='', which is no number"),
        (key(names.BUCKET_SECONDS_TOTAL, rows="all"), r"rows='all', which is no number"),
        (key(names.BUCKET_ROWS_TOTAL, rows="0"), "has a series of 0 rows"),
        (key(f"{names.REQUEST_SECONDS}_bucket"), r"request_seconds_bucket has le='', which is no number"),
        (key(f"{names.FIRST_TOKEN_SECONDS}_bucket", le="often"), r"le='often', which is no number"),
    ],
)
def test_a_label_that_should_hold_a_number_and_does_not_is_no_sample(series: SeriesKey, message: str) -> None:
    with pytest.raises(IncompleteSeriesError, match=message):
        sample(short=increases() | {series: 1.0})


@pytest.mark.parametrize("label", [{}, {"rows": "many"}, {"rows": "-1"}])
def test_a_curve_without_its_rows_is_no_sample(label: dict[str, str]) -> None:
    with pytest.raises(IncompleteSeriesError, match=names.STEP_CURVE_SECONDS):
        sample(gauges=gauges() | {key(names.STEP_CURVE_SECONDS, **label): 0.02})


def test_two_spellings_of_a_number_are_one() -> None:
    short = increases() | {
        key(names.BUCKET_ROWS_TOTAL, rows="8"): 3.0,
        key(names.BUCKET_ROWS_TOTAL, rows="08"): 2.0,
        key(f"{names.REQUEST_SECONDS}_bucket", le="0.50"): 4.0,
    }
    counts = sample(short=short).windows["short"]
    assert counts.bucket_rows == {8: 5.0}
    assert counts.request_within[0.5] == names.EDGES_S.index(0.5) + 4.0
