"""From series to ``Sample``: pure, and the same for every source of metrics.

An adapter groups what it read by pod and drops the labels that only say where a series came from; here the
names of the contract become the fields of the observation. No data is never zero: a pod whose metrics are
not whole has no sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from kvpilot_engine.contract import metrics as names
from kvpilot_operator.tuning.observation import Counts, Gauges, Sample

SeriesKey = tuple[str, tuple[tuple[str, str], ...]]
"""Metric name as exposed (with ``_bucket``, ``_sum``, ``_total``) and its sorted labels without identity."""

IDENTITY_LABELS = frozenset(
    {"__name__", "namespace", "pod", "pod_uid", "kvpilot_name", "component", "instance", "job", "container"}
)
"""Labels that say which pod a series is of."""

GAUGES: tuple[str, ...] = (
    names.REQUESTS_WAITING,
    names.REQUESTS_RUNNING,
    names.MEMORY_RATIO,
    names.MEMORY_LIMIT_BYTES,
    names.STEP_MARGINAL_GAIN,
    names.CACHE_BYTES,
    names.CACHE_BUDGET_BYTES,
    names.CONFIG_GENERATION,
)
"""Gauges that a sample is made of; every engine publishes all of them from its start."""

COUNTERS: tuple[str, ...] = (
    f"{names.REQUEST_SECONDS}_bucket",
    f"{names.FIRST_TOKEN_SECONDS}_bucket",
    f"{names.STAGE_SECONDS}_sum",
    names.ARRIVALS_TOTAL,
    names.REQUESTS_TOTAL,
    names.OUTPUT_TOKENS_TOTAL,
    names.QUERY_TOKENS_TOTAL,
    names.HIT_TOKENS_TOTAL,
    names.CEILING_TOKENS_TOTAL,
    names.EVICTED_PAGES_TOTAL,
    names.PREEMPTIONS_TOTAL,
    names.PREFETCH_BLOCKS_TOTAL,
    names.CODEC_SECONDS_TOTAL,
    names.STEPS_TOTAL,
    names.STEP_BUSY_SECONDS_TOTAL,
    names.STEP_ROWS_TOTAL,
)
"""Counters whose increase over a window a sample is made of."""

HISTOGRAMS: tuple[str, ...] = (f"{names.REQUEST_SECONDS}_bucket", f"{names.FIRST_TOKEN_SECONDS}_bucket")
"""Those of them whose edges must all be there."""


class IncompleteSeriesError(ValueError):
    """The series of one pod do not make a sample: one sentence that names what is missing."""


def series_key(labels: Mapping[str, str], name: str = "") -> SeriesKey:
    """The key of a series from all its labels; ``name`` where ``__name__`` is not among them."""
    kept = ((label, value) for label, value in labels.items() if label not in IDENTITY_LABELS)
    return name or labels["__name__"], tuple(sorted(kept))


def sample_from(
    windows: Mapping[str, Mapping[SeriesKey, float]],
    gauges: Mapping[SeriesKey, float],
    pod_seconds: Mapping[str, float],
    age_s: float,
    coverage_s: float,
) -> Sample:
    """One engine's metrics.

    Args:
        windows: increases by window name; a window without any series is left out of the sample.
        gauges: last values.
        pod_seconds: time that each window really covers, s.
        age_s: age of the newest values, s.
        coverage_s: time that the longest window really covers, s.

    Raises:
        IncompleteSeriesError: a gauge, a counter or an edge is missing, or a value is not finite.
    """
    counts = {
        window: _counts(increases, pod_seconds.get(window, 0.0), window)
        for window, increases in windows.items()
        if increases
    }
    return Sample(windows=counts, gauges=_gauges(gauges), age_s=age_s, coverage_s=coverage_s)


def _counts(increases: Mapping[SeriesKey, float], pod_seconds: float, window: str) -> Counts:
    _check(increases, COUNTERS, f"window {window}")
    within = {name: _edges(increases, name, window) for name in HISTOGRAMS}
    prefetch = _by_label(increases, names.PREFETCH_BLOCKS_TOTAL, "result")
    codec = _by_label(increases, names.CODEC_SECONDS_TOTAL, "op")
    hits = _by_label(increases, names.HIT_TOKENS_TOTAL, "tier")
    return Counts(
        pod_seconds=pod_seconds,
        arrivals=_sum(increases, names.ARRIVALS_TOTAL),
        outcomes=_by_label(increases, names.REQUESTS_TOTAL, "outcome"),
        request_within=within[HISTOGRAMS[0]],
        first_token_within=within[HISTOGRAMS[1]],
        stage_seconds=_by_label(increases, f"{names.STAGE_SECONDS}_sum", "stage"),
        query_tokens=_sum(increases, names.QUERY_TOKENS_TOTAL),
        hit_tokens=sum(hits.values()),
        host_hit_tokens=hits.get("host", 0.0),
        ceiling_tokens=_sum(increases, names.CEILING_TOKENS_TOTAL),
        output_tokens=_sum(increases, names.OUTPUT_TOKENS_TOTAL),
        evicted_pages=_sum(increases, names.EVICTED_PAGES_TOTAL),
        preemptions=_sum(increases, names.PREEMPTIONS_TOTAL),
        prefetch_used=prefetch.get("used", 0.0),
        prefetch_wasted=prefetch.get("wasted", 0.0),
        encode_seconds=codec.get("encode", 0.0),
        decode_seconds=codec.get("decode", 0.0),
        busy_seconds=_sum(increases, names.STEP_BUSY_SECONDS_TOTAL),
        steps=_sum(increases, names.STEPS_TOTAL),
        step_rows=_sum(increases, names.STEP_ROWS_TOTAL),
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
        marginal_gain=_sum(values, names.STEP_MARGINAL_GAIN),
        cached_bytes=_sum(values, names.CACHE_BYTES),
        budget_bytes=_sum(values, names.CACHE_BUDGET_BYTES),
        generation=round(_sum(values, names.CONFIG_GENERATION)),
    )


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
    by_edge = {float(labels["le"]): value for labels, value in _of(increases, name)}
    if missing := [edge for edge in names.EDGES_S if edge not in by_edge]:
        raise IncompleteSeriesError(
            f"window {window}: {name} lacks the edges {', '.join(map(str, missing))} s"
        )
    return {edge: by_edge[edge] for edge in names.EDGES_S}


def _of(values: Mapping[SeriesKey, float], name: str) -> Iterator[tuple[dict[str, str], float]]:
    return ((dict(labels), value) for (series, labels), value in values.items() if series == name)


def _sum(values: Mapping[SeriesKey, float], name: str) -> float:
    return sum(value for _, value in _of(values, name))


def _by_label(values: Mapping[SeriesKey, float], name: str, label: str) -> dict[str, float]:
    totals: dict[str, float] = {}
    for labels, value in _of(values, name):
        key = labels.get(label, "")
        totals[key] = totals.get(key, 0.0) + value
    return totals
