"""The engine's metrics: name, type, help and labels of each, in the only table that spells them.

The engine publishes these, the operator reads them, and docs/reference/metrics.md is generated from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Literal, Self

EDGES_S: tuple[float, ...] = (
    0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0,
)  # fmt: skip
"""Edges of the latency histograms, s. A latency objective must be one of them, so nothing is interpolated."""

ROW_BUCKETS: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Rows at which the curve of step time is kept; a step counts for the nearest bucket at or above it."""

ROW_LABELS: tuple[str, ...] = tuple(map(str, ROW_BUCKETS))

TIERS = ("pool", "host")
"""The device pool and the tiers below it, fastest first."""

LOST_REASONS = ("busy", "incomplete", "evicted", "shrunk", "corrupt", "failed")
"""Why a block was dropped: the encoder was busy; one of its pages was evicted before; the tier was full; the
tier's budget was lowered; its checksum did not match; its encoding failed."""


class Stage(StrEnum):
    """Where a request spends its time. The stages of a request add up to its whole time in the core."""

    ADMISSION_WAIT = "admission_wait"  #: no worker slot, or no free page, yet
    TIER_LOAD = "tier_load"  #: waits for blocks of a slower tier
    BATCH_WAIT = "batch_wait"  #: admitted and loaded, waits for a row or for step tokens
    PREFILL = "prefill"  #: from the first step with its tokens to its first new token
    DECODE = "decode"  #: from its first new token to its last
    PREEMPTED = "preempted"  #: lost its pages, waits to run again


class Outcome(StrEnum):
    """How a request ended. The client causes ``cancelled`` and ``invalid``: the error rate omits both.

    A request is ``too_large`` if the model could serve it and the cache's quota is too small for it.
    """

    OK = "ok"
    SHED = "shed"  #: refused with 429
    TIMEOUT = "timeout"
    ERROR = "error"  #: 5xx
    CANCELLED = "cancelled"
    INVALID = "invalid"  #: refused with 4xx other than 429
    TOO_LARGE = "too_large"  #: refused with 400, as the cache may not hold as many tokens


MetricType = Literal["counter", "gauge", "histogram"]


class Metric(str):
    """One metric: a string, its name as exposed, with what the metrics page says of it.

    Attributes:
        type: as Prometheus defines it. The name of a counter ends in ``_total``.
        help: what is measured, in which unit; one sentence.
        labels: label name -> the values that are exposed from the start; () where they are not known then.
    """

    type: MetricType
    help: str
    labels: Mapping[str, tuple[str, ...]]

    def __new__(cls, name: str, type_: MetricType, text: str, **labels: tuple[str, ...]) -> Self:
        """The entry of the table."""
        metric = super().__new__(cls, name)
        metric.type, metric.help, metric.labels = type_, text, labels
        return metric


# Requests. Histograms count successful requests only: attainment is bucket / judged requests.
REQUEST_SECONDS = Metric(
    "kvpilot_request_seconds", "histogram", "Arrival to last byte of successful requests, s."
)
FIRST_TOKEN_SECONDS = Metric(
    "kvpilot_first_token_seconds", "histogram", "Arrival to first new token of successful requests, s."
)
INTER_TOKEN_SECONDS = Metric(
    "kvpilot_inter_token_seconds", "histogram", "Between consecutive new tokens of successful requests, s."
)
STAGE_SECONDS = Metric(
    "kvpilot_stage_seconds", "histogram", "Time of successful requests in each stage, s.", stage=tuple(Stage)
)
ARRIVALS_TOTAL = Metric("kvpilot_arrivals_total", "counter", "Requests that arrived.")
REQUESTS_TOTAL = Metric("kvpilot_requests_total", "counter", "Requests that ended.", outcome=tuple(Outcome))
OUTPUT_TOKENS_TOTAL = Metric("kvpilot_output_tokens_total", "counter", "New tokens.")

# The cache.
QUERY_TOKENS_TOTAL = Metric(
    "kvpilot_prefix_query_tokens_total", "counter", "Prompt tokens looked up in the cache."
)
HIT_TOKENS_TOTAL = Metric(
    "kvpilot_prefix_hit_tokens_total", "counter", "Prompt tokens served from the cache.", tier=TIERS
)
CEILING_TOKENS_TOTAL = Metric(
    "kvpilot_prefix_ceiling_tokens_total", "counter", "Prompt tokens that an infinite cache would serve."
)
EVICTED_PAGES_TOTAL = Metric("kvpilot_evicted_pages_total", "counter", "Pages evicted from the device pool.")
PREEMPTIONS_TOTAL = Metric(
    "kvpilot_preemptions_total", "counter", "Running requests that gave up their pages."
)
BLOCKS_LOST_TOTAL = Metric(
    "kvpilot_blocks_lost_total",
    "counter",
    "Blocks dropped from a tier or on the way to one.",
    reason=LOST_REASONS,
)
PREFETCH_BLOCKS_TOTAL = Metric(
    "kvpilot_prefetch_blocks_total", "counter", "Blocks fetched ahead.", result=("used", "wasted")
)
CODEC_SECONDS_TOTAL = Metric(
    "kvpilot_codec_seconds_total", "counter", "Time in codecs, s.", op=("encode", "decode")
)
TIER_LOAD_BLOCKS_TOTAL = Metric(
    "kvpilot_tier_load_blocks_total",
    "counter",
    "Blocks loaded from a tier into the device pool.",
    tier=TIERS[1:],
)
CACHED_PAGES = Metric("kvpilot_cached_pages", "gauge", "Pages held now.", tier=TIERS)
CACHE_BYTES = Metric("kvpilot_cache_bytes", "gauge", "Bytes held now.", tier=TIERS)
CACHE_BUDGET_BYTES = Metric("kvpilot_cache_budget_bytes", "gauge", "Bytes that may be held.", tier=TIERS)

# Steps.
STEPS_TOTAL = Metric("kvpilot_steps_total", "counter", "Steps of the engine.")
STEP_BUSY_SECONDS_TOTAL = Metric("kvpilot_step_busy_seconds_total", "counter", "Wall time in steps, s.")
STEP_ROWS_TOTAL = Metric("kvpilot_step_rows_total", "counter", "Rows of a step, summed over steps.")
BUCKET_ROWS_TOTAL = Metric(
    "kvpilot_step_bucket_rows_total",
    "counter",
    "Rows of a step, summed over the steps of each bucket of rows.",
    rows=ROW_LABELS,
)
BUCKET_SECONDS_TOTAL = Metric(
    "kvpilot_step_bucket_seconds_total",
    "counter",
    "Wall time in the steps of each bucket of rows, s.",
    rows=ROW_LABELS,
)
STEP_CURVE_SECONDS = Metric(
    "kvpilot_step_curve_seconds", "gauge", "Measured time of a decode step by its rows, s.", rows=()
)
STEP_MARGINAL_GAIN = Metric(
    "kvpilot_step_marginal_gain", "gauge", "Relative gain of tokens/s from one more sequence."
)

# State.
REQUESTS_WAITING = Metric(
    "kvpilot_requests_waiting", "gauge", "Requests without a worker slot, or without pages for their prompt."
)
REQUESTS_RUNNING = Metric("kvpilot_requests_running", "gauge", "Requests with a worker slot and pages.")
MEMORY_RATIO = Metric("kvpilot_memory_ratio", "gauge", "Used memory over its limit.", kind=("host", "device"))
MEMORY_BYTES = Metric("kvpilot_memory_bytes", "gauge", "Used memory, bytes.", kind=("host", "device"))
MEMORY_LIMIT_BYTES = Metric(
    "kvpilot_memory_limit_bytes", "gauge", "Memory limit, bytes; 0 without a device.", kind=("host", "device")
)
LONGEST_REQUEST_TOKENS = Metric(
    "kvpilot_longest_request_tokens",
    "gauge",
    "Prompt and answer of the longest request within a day, tokens.",
)
CONFIG_GENERATION = Metric("kvpilot_config_generation", "gauge", "Generation of the configuration in force.")
CONFIG_CONVERGING = Metric("kvpilot_config_converging", "gauge", "1 while a lowered quota is not reached.")
ENGINE_INFO = Metric(
    "kvpilot_engine_info", "gauge", "Constant 1.", version=(), model=(), device=(), contract=()
)

METRICS: Mapping[str, Metric] = {
    value: value for value in tuple(vars().values()) if isinstance(value, Metric)
}
"""Every metric by its name, in the order of the reference page."""

Samples = Mapping[str, Mapping[str, float]]
"""Values of metrics with at most one label: metric name -> label value ("" without a label) -> value."""


def total(samples: Samples, name: str) -> float:
    """A metric's value, summed over its label; 0.0 where it is absent."""
    return sum(samples.get(name, {}).values())
