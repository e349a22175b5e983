"""From series to ``Sample``: pure, and the same for every source of metrics.

An adapter groups series by pod and drops the labels of their origin; here the metric names of the contract
become the fields of an observation. No data is not zero: a pod without an essential metric has no sample, and
what a runtime does not export is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from kvpilot_engine.contract import PAGE_TOKENS
from kvpilot_engine.contract import metrics as names
from kvpilot_operator.tuning.observation import OPTIONAL_COUNTS, Counts, Gauges, MemoryUse, Sample

N = TypeVar("N", int, float)

SeriesKey = tuple[str, tuple[tuple[str, str], ...]]
"""Metric name as exposed (with ``_bucket``, ``_sum``, ``_total``) and its sorted labels without identity."""

GAUGES: tuple[str, ...] = (
    names.REQUESTS_WAITING,
    names.REQUESTS_RUNNING,
    names.MEMORY_RATIO,
    names.MEMORY_LIMIT_BYTES,
    names.CACHE_BYTES,
    names.CACHE_BUDGET_BYTES,
    names.CONFIG_GENERATION,
)
"""Gauges of a sample, which every engine must publish. Queue and configuration are part of every decision;
without its memory, and what the cache has of it, nothing keeps a larger cache from ending an engine."""

COUNTERS: tuple[str, ...] = (
    f"{names.REQUEST_SECONDS}_bucket",
    f"{names.STAGE_SECONDS}_sum",
    names.ARRIVALS_TOTAL,
    names.REQUESTS_TOTAL,
    names.STEPS_TOTAL,
    names.STEP_BUSY_SECONDS_TOTAL,
    names.STEP_ROWS_TOTAL,
)
"""Counters of a sample, by their increase over a window: without them nothing can be trusted or compared."""

FIRST_TOKEN_BUCKET = f"{names.FIRST_TOKEN_SECONDS}_bucket"
OPTIONAL_COUNTERS: tuple[str, ...] = (
    FIRST_TOKEN_BUCKET,
    *(name for name in dict.fromkeys(OPTIONAL_COUNTS.values()) if name != names.FIRST_TOKEN_SECONDS),
    names.BUCKET_ROWS_TOTAL,
    names.BUCKET_SECONDS_TOTAL,
)
OPTIONAL_GAUGES: tuple[str, ...] = (
    names.STEP_CURVE_SECONDS,
    names.STEP_MARGINAL_GAIN,
    names.LONGEST_REQUEST_TOKENS,
    names.CACHED_PAGES,
)
"""What a sample also holds where the runtime has it. Absent is not zero: rules that need it stand aside."""


class IncompleteSeriesError(ValueError):
    """The series of one pod are incomplete: one sentence that names what is missing."""


SUFFIXES = ("_bucket", "_sum", "_count")
"""What Prometheus appends to the name of a histogram."""


def series_key(labels: Mapping[str, str], name: str = "") -> SeriesKey:
    """The key of a series: its name (``name`` if ``__name__`` is not among the labels) and its own labels.

    Only labels of the contract are its own; all others say where it came from.
    """
    exposed = name or labels["__name__"]
    return exposed, tuple(sorted((label, labels[label]) for label in own_labels(exposed) if label in labels))


def own_labels(exposed: str) -> frozenset[str]:
    """Labels that the contract gives a series of that exposed name."""
    metric = names.METRICS.get(exposed)
    if metric is not None:
        return frozenset(metric.labels)
    suffix = next((item for item in SUFFIXES if exposed.endswith(item)), "")
    histogram = names.METRICS.get(exposed.removesuffix(suffix))
    return frozenset((*histogram.labels, "le")) if histogram is not None else frozenset()


def sample_from(
    windows: Mapping[str, Mapping[SeriesKey, float]],
    gauges: Mapping[SeriesKey, float],
    replica_seconds: Mapping[str, float],
    age_s: float,
    coverage_s: float,
    *,
    scrape_s: float = 0.0,
) -> Sample:
    """One engine's metrics.

    Args:
        windows: increases by window name; a window without any series is left out of the sample.
        gauges: last values.
        replica_seconds: time that each window covers, s.
        age_s: age of the newest values, s.
        coverage_s: time that the longest window covers, s.
        scrape_s: interval of the scrapes as it was seen, s; 0 if unknown.

    Raises:
        IncompleteSeriesError: an essential gauge or counter is missing, or an edge of a histogram, or a value
            is not finite, or a label that holds a number does not.
    """
    counts = {
        window: _counts(increases, replica_seconds.get(window, 0.0), window)
        for window, increases in windows.items()
        if increases
    }
    return Sample(
        windows=counts, gauges=_gauges(gauges), age_s=age_s, coverage_s=coverage_s, scrape_s=scrape_s
    )


def _counts(increases: Mapping[SeriesKey, float], replica_seconds: float, window: str) -> Counts:
    _check(increases, COUNTERS, f"window {window}")
    present = {name for name, _ in increases}
    prefetch = _by_label(increases, names.PREFETCH_BLOCKS_TOTAL, "result")
    codec = _by_label(increases, names.CODEC_SECONDS_TOTAL, "op")
    hits = _by_label(increases, names.HIT_TOKENS_TOTAL, "tier")
    optional: dict[str, float] = {
        "query_tokens": _sum(increases, names.QUERY_TOKENS_TOTAL),
        "hit_tokens": sum(hits.values()),
        "host_hit_tokens": hits.get("host", 0.0),
        "ceiling_tokens": _sum(increases, names.CEILING_TOKENS_TOTAL),
        "output_tokens": _sum(increases, names.OUTPUT_TOKENS_TOTAL),
        "evicted_pages": _sum(increases, names.EVICTED_PAGES_TOTAL),
        "preemptions": _sum(increases, names.PREEMPTIONS_TOTAL),
        "prefetch_used": prefetch.get("used", 0.0),
        "prefetch_wasted": prefetch.get("wasted", 0.0),
        "encode_seconds": codec.get("encode", 0.0),
        "decode_seconds": codec.get("decode", 0.0),
    }
    return Counts(
        replica_seconds=replica_seconds,
        arrivals=_sum(increases, names.ARRIVALS_TOTAL),
        outcomes=_by_label(increases, names.REQUESTS_TOTAL, "outcome"),
        request_within=_edges(increases, f"{names.REQUEST_SECONDS}_bucket", window),
        first_token_within=_edges(increases, FIRST_TOKEN_BUCKET, window)
        if FIRST_TOKEN_BUCKET in present
        else None,
        stage_seconds=_by_label(increases, f"{names.STAGE_SECONDS}_sum", "stage"),
        busy_seconds=_sum(increases, names.STEP_BUSY_SECONDS_TOTAL),
        steps=_sum(increases, names.STEPS_TOTAL),
        step_rows=_sum(increases, names.STEP_ROWS_TOTAL),
        bucket_rows=_by_rows(increases, names.BUCKET_ROWS_TOTAL),
        bucket_seconds=_by_rows(increases, names.BUCKET_SECONDS_TOTAL),
        **{item: number if OPTIONAL_COUNTS[item] in present else None for item, number in optional.items()},
    )


def _gauges(values: Mapping[SeriesKey, float]) -> Gauges:
    _check(values, GAUGES, "last values")
    tightest, ratio = max(_of(values, names.MEMORY_RATIO), key=lambda item: item[1])
    limits = [limit for labels, limit in _of(values, names.MEMORY_LIMIT_BYTES) if labels == tightest]
    return Gauges(
        waiting=_sum(values, names.REQUESTS_WAITING),
        running=_sum(values, names.REQUESTS_RUNNING),
        memory_ratio=ratio,
        memory_limit_bytes=max(limits, default=0.0),
        marginal_gain=_last(values, names.STEP_MARGINAL_GAIN),
        cached_bytes=_sum(values, names.CACHE_BYTES),
        budget_bytes=_sum(values, names.CACHE_BUDGET_BYTES),
        generation=round(_sum(values, names.CONFIG_GENERATION)),
        host=_memory(values, "host"),
        device=_memory(values, "device"),
        curve=_by_rows(values, names.STEP_CURVE_SECONDS),
        longest_request_tokens=_last(values, names.LONGEST_REQUEST_TOKENS),
        token_bytes=_token_bytes(values),
    )


def _token_bytes(values: Mapping[SeriesKey, float]) -> float | None:
    """Bytes of a token in the pool, from the pages that it holds: 0 while it holds none, None if unknown."""
    pool = names.TIERS[0]
    pages = _by_label(values, names.CACHED_PAGES, "tier").get(pool)
    if pages is None:
        return None
    held = _by_label(values, names.CACHE_BYTES, "tier").get(pool, 0.0)
    return held / pages / PAGE_TOKENS if pages else 0.0


def _memory(values: Mapping[SeriesKey, float], kind: str) -> MemoryUse | None:
    """Memory of one kind. The pool lies on the device where there is one, every other tier on the host."""
    limits, ratios, cached, budgets = (
        _by_label(values, metric, label)
        for metric, label in (
            (names.MEMORY_LIMIT_BYTES, "kind"),
            (names.MEMORY_RATIO, "kind"),
            (names.CACHE_BYTES, "tier"),
            (names.CACHE_BUDGET_BYTES, "tier"),
        )
    )
    if not limits.get(kind):
        return None
    pool, has_device = names.TIERS[0], bool(limits.get("device"))

    def there(by_tier: Mapping[str, float]) -> float:
        return sum(n for tier, n in by_tier.items() if (kind == "device") == (has_device and tier == pool))

    return MemoryUse(ratios.get(kind, 0.0), limits[kind], there(cached), there(budgets))


def _check(values: Mapping[SeriesKey, float], expected: tuple[str, ...], where: str) -> None:
    present = {name for name, _ in values}
    if missing := [name for name in expected if name not in present]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise IncompleteSeriesError(f"{where}: no series of {', '.join(missing[:3])}{more}")
    for (name, labels), value in values.items():
        if not math.isfinite(value):
            raise IncompleteSeriesError(f"{where}: {name}{dict(labels)} is {value}")


def _edges(increases: Mapping[SeriesKey, float], name: str, window: str) -> dict[float, float]:
    """Counts at or under each published edge; ``le="1"`` and ``le="1.0"`` are the same edge."""
    by_edge = _by_number(increases, name, "le", float)
    if missing := [edge for edge in names.EDGES_S if edge not in by_edge]:
        raise IncompleteSeriesError(
            f"window {window}: {name} lacks the edges {', '.join(map(str, missing))} s"
        )
    return {edge: by_edge[edge] for edge in names.EDGES_S}


def _of(values: Mapping[SeriesKey, float], name: str) -> Iterator[tuple[dict[str, str], float]]:
    return ((dict(labels), value) for (series, labels), value in values.items() if series == name)


def _sum(values: Mapping[SeriesKey, float], name: str) -> float:
    return sum(value for _, value in _of(values, name))


def _last(values: Mapping[SeriesKey, float], name: str) -> float | None:
    """The value of a gauge without labels; None where it is absent."""
    return next((value for _, value in _of(values, name)), None)


def _by_rows(values: Mapping[SeriesKey, float], name: str) -> dict[int, float]:
    by_rows = _by_number(values, name, "rows", int)
    if by_rows and min(by_rows) < 1:
        raise IncompleteSeriesError(f"{name} has a series of {min(by_rows)} rows")
    return dict(sorted(by_rows.items()))


def _by_number(
    values: Mapping[SeriesKey, float], name: str, label: str, number: Callable[[str], N]
) -> dict[N, float]:
    """Values by a label that holds a number; two spellings of one number are one."""
    totals: dict[N, float] = {}
    for text, value in _by_label(values, name, label).items():
        try:
            key = number(text)
        except ValueError as error:
            raise IncompleteSeriesError(f"{name} has {label}={text!r}, which is no number") from error
        totals[key] = totals.get(key, 0.0) + value
    return totals


def _by_label(values: Mapping[SeriesKey, float], name: str, label: str) -> dict[str, float]:
    totals: dict[str, float] = {}
    for labels, value in _of(values, name):
        key = labels.get(label, "")
        totals[key] = totals.get(key, 0.0) + value
    return totals
