"""Names of the engine's metrics, and the edges of its histograms. The only place where they are spelled.

Counters end in ``_total``. The engine publishes, the operator reads; both import this module.
"""

from __future__ import annotations

from enum import StrEnum

EDGES_S: tuple[float, ...] = (
    0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0,
)  # fmt: skip
"""Edges of the latency histograms, s. A latency objective must be one of them, so nothing is interpolated."""

ROW_BUCKETS: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Rows at which the curve of step time is kept; a step counts for the nearest bucket at or above it."""


class Stage(StrEnum):
    """Where a request spends its time. The stages of a request add up to its whole time in the core."""

    ADMISSION_WAIT = "admission_wait"  #: no worker slot, or no free page, yet
    TIER_LOAD = "tier_load"  #: waits for blocks of a slower tier
    BATCH_WAIT = "batch_wait"  #: admitted and loaded, waits for a row or for step tokens
    PREFILL = "prefill"  #: from the first step with its tokens to its first new token
    DECODE = "decode"  #: from its first new token to its last
    PREEMPTED = "preempted"  #: lost its pages, waits to run again


class Outcome(StrEnum):
    """How a request ended. ``cancelled`` and ``invalid`` are the client's doing and judge nothing."""

    OK = "ok"
    SHED = "shed"  #: refused with 429
    TIMEOUT = "timeout"
    ERROR = "error"  #: 5xx
    CANCELLED = "cancelled"
    INVALID = "invalid"  #: refused with 400


# Histograms. The first three count successful requests only: attainment is bucket / judged requests.
REQUEST_SECONDS = "kvpilot_request_seconds"  # arrival to last byte, of successful requests
FIRST_TOKEN_SECONDS = "kvpilot_first_token_seconds"  # arrival to first new token, of successful requests
INTER_TOKEN_SECONDS = "kvpilot_inter_token_seconds"  # mean time between new tokens of a request
STAGE_SECONDS = "kvpilot_stage_seconds"  # {stage}: time of a request in one stage

# Counters of requests and tokens.
ARRIVALS_TOTAL = "kvpilot_arrivals_total"  # requests that came in
REQUESTS_TOTAL = "kvpilot_requests_total"  # {outcome}: requests that ended
OUTPUT_TOKENS_TOTAL = "kvpilot_output_tokens_total"  # new tokens
QUERY_TOKENS_TOTAL = "kvpilot_prefix_query_tokens_total"  # prompt tokens looked up
HIT_TOKENS_TOTAL = "kvpilot_prefix_hit_tokens_total"  # {tier}: prompt tokens served from pool | host
CEILING_TOKENS_TOTAL = "kvpilot_prefix_ceiling_tokens_total"  # prompt tokens an infinite cache would serve

# The cache.
EVICTED_PAGES_TOTAL = "kvpilot_evicted_pages_total"  # pages that left the hot pool
PREEMPTIONS_TOTAL = "kvpilot_preemptions_total"  # running requests that gave up their pages
BLOCKS_LOST_TOTAL = "kvpilot_blocks_lost_total"  # {reason}: blocks dropped
PREFETCH_BLOCKS_TOTAL = "kvpilot_prefetch_blocks_total"  # {result}: used | wasted
CODEC_SECONDS_TOTAL = "kvpilot_codec_seconds_total"  # {op}: encode | decode
TIER_LOAD_BLOCKS_TOTAL = "kvpilot_tier_load_blocks_total"  # blocks decoded from a slower tier
CACHED_PAGES = "kvpilot_cached_pages"  # {tier}: pages held now
CACHE_BYTES = "kvpilot_cache_bytes"  # {tier}: bytes held now
CACHE_BUDGET_BYTES = "kvpilot_cache_budget_bytes"  # {tier}: bytes it may hold

# Steps.
STEPS_TOTAL = "kvpilot_steps_total"  # steps
STEP_BUSY_SECONDS_TOTAL = "kvpilot_step_busy_seconds_total"  # wall time in steps
STEP_ROWS_TOTAL = "kvpilot_step_rows_total"  # sum of rows over steps
STEP_CURVE_SECONDS = "kvpilot_step_curve_seconds"  # {rows}: measured time of a decode step
STEP_MARGINAL_GAIN = "kvpilot_step_marginal_gain"  # relative gain of tokens/s from one more sequence

# State.
REQUESTS_WAITING = "kvpilot_requests_waiting"  # admission wait
REQUESTS_RUNNING = "kvpilot_requests_running"  # holds a worker slot and pages
MEMORY_RATIO = "kvpilot_memory_ratio"  # {kind}: host | device, used / limit as the design defines it
MEMORY_BYTES = "kvpilot_memory_bytes"  # {kind}: host | device
MEMORY_LIMIT_BYTES = "kvpilot_memory_limit_bytes"  # {kind}: host | device
CONFIG_GENERATION = "kvpilot_config_generation"  # name of the configuration that runs
CONFIG_CONVERGING = "kvpilot_config_converging"  # 1 while a lowered quota is not reached
ENGINE_INFO = "kvpilot_engine_info"  # {version, model, device, contract} = 1
