"""Rules about memory: host and device apart, since a cut of one frees nothing of the other."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from kvpilot_engine.contract import BLOCK_TOKENS
from kvpilot_engine.contract import metrics as names
from kvpilot_engine.contract.knobs import COMPRESSION_LEVELS, MIB, CompressionLevel
from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.assess.guards import DAY, is_blocked
from kvpilot_operator.tuning.assess.objectives import hit_rate, judged_window
from kvpilot_operator.tuning.configuration import value
from kvpilot_operator.tuning.context import Context, Draft, Found, Plan, Proposal
from kvpilot_operator.tuning.experiment.evidence import MEMORY
from kvpilot_operator.tuning.experiment.watch import RELIEF
from kvpilot_operator.tuning.observation import Gauges, MemoryUse, gauges_of
from kvpilot_operator.tuning.rules.bounds import room
from kvpilot_operator.tuning.rules.cache import MAX_PREDICTED_MEMORY, compress_to, level
from kvpilot_operator.tuning.rules.prediction import round_to
from kvpilot_operator.tuning.state import (
    MAX_LONGEST,
    MEMORY_USED,
    KnobChange,
    LongestRequest,
    Prediction,
    TuningState,
)

EMERGENCY_MEMORY = 0.95
"""Memory ratio at which the batch is cut at once; nothing else frees memory within seconds."""

BUDGET_CUT = 0.75
"""Factor of the memory budget downwards while the limit in bytes is unknown; it is never more than halved."""

MIN_COMPUTED = 0.01
"""Share of the prompt tokens that is computed at least: the last token of a prompt always is."""

_LENGTH_UNKNOWN = (reasons.METRIC_ABSENT, f"not every engine exports {names.LONGEST_REQUEST_TOKENS}")
"""Why a quota is not cut: requests might no longer fit."""

Kind = Literal["host", "device"]


@dataclass(frozen=True)
class Pressure:
    """The kind of memory that is fullest, on the replica where it is, and whether there is a device."""

    kind: Kind
    use: MemoryUse
    has_device: bool

    @property
    def held(self) -> float:
        """What the cache holds of this kind, within its budget, MiB."""
        return min(self.use.cached_bytes or self.use.budget_bytes, self.use.budget_bytes) / MIB


def memory_emergency(context: Context, state: TuningState, plan: Plan) -> Found:
    """Memory is nearly exhausted: halve the batch. What is left is for ``memory_relief``.

    A batch that was cut without any relief is restored by the watch, and its value stays blocked.
    """
    if context.memory < EMERGENCY_MEMORY:
        return reasons.NOT_AT_FAULT, "memory is not nearly exhausted"
    batch = room(context, "batchSize")
    after = int(max(batch.now // 2, batch.minimum, 1)) if batch.tunable else batch.now
    if after >= batch.now:
        return reasons.AT_BOUND, f"batchSize is {batch.now}"
    if is_blocked(state, "batchSize", after, context.now):
        return reasons.VALUE_BLOCKED, f"batchSize {after} freed no memory a short while ago"
    message = f"memory was at {context.memory:.0%} of its limit"
    prediction = _after_cut(context, after / batch.now)
    return Proposal("memory-emergency", (batch.to(after),), "memory", 0.0, message, prediction=prediction)


def _after_cut(context: Context, left: float) -> Prediction:
    """Memory after a cut of the batch to a part: between the least relief and all that rows can hold.

    Rows hold at most what the cache does not, in proportion to their number; weights are in it as well, and
    where nothing is known of the cache, it is everything.
    """
    memory, pressure = context.memory, pressure_of(context)
    limit = 0.0 if pressure is None else pressure.use.limit_bytes / MIB
    cached = pressure.held / limit if pressure is not None and limit else 0.0
    high = memory - RELIEF
    low = min(high, memory - (1 - left) * max(0.0, memory - cached))
    return Prediction.rounded(MEMORY_USED, (low + high) / 2, low, high)


def memory_relief(context: Context, state: TuningState, plan: Plan) -> Found:
    """Memory is over its limit: a smaller quota of the kind that is over.

    On a device that is the pool; on the host the tier, or the whole budget where the pool lies there too. No
    quota falls below what the longest request of the last day needs; where that is unknown, none is cut that
    requests need.
    """
    if not context.breached("memory"):
        return reasons.NOT_AT_FAULT, "memory is not over its limit"
    pressure = pressure_of(context)
    if pressure is None or pressure.held <= 0:
        return reasons.NOT_EFFECTIVE, "the engine does not report what its cache holds"
    if pressure.kind == "device":
        return _smaller_pool(context, state, pressure)
    if pressure.has_device:
        return _smaller_tier(context, pressure)
    return _smaller_budget(context, state, pressure)


def pressure_of(context: Context) -> Pressure | None:
    """The fullest kind of memory of the replicas that can be relieved; None if none reports it by kind."""
    gauges = gauges_of(context.relievable)
    found = [*_uses("host", gauges), *_uses("device", gauges)]
    return max(found, key=lambda item: item.use.ratio, default=None)


def _uses(kind: Kind, gauges: Iterable[Gauges]) -> Iterable[Pressure]:
    for item in gauges:
        use = item.host if kind == "host" else item.device
        if kind == "host" and use is None and item.device is None:  # a runtime that reports them as one
            use = MemoryUse(item.memory_ratio, item.memory_limit_bytes, item.cached_bytes, item.budget_bytes)
        if use is not None:
            yield Pressure(kind, use, item.device is not None)


def _excess_mib(context: Context, pressure: Pressure) -> float:
    target, limit = context.policy.objectives.memory, pressure.use.limit_bytes / MIB
    if not limit:
        return pressure.held * (1 - BUDGET_CUT)
    return (pressure.use.ratio - MAX_PREDICTED_MEMORY * target) * limit


def _gain(pressure: Pressure, freed_mib: float) -> float:
    limit = pressure.use.limit_bytes / MIB
    return freed_mib / limit / pressure.use.ratio if limit else 1 - BUDGET_CUT


def remember_longest(context: Context, draft: Draft) -> Draft:
    """Remember the longest requests for a day, since an engine that restarts forgets its own."""
    tokens = _reported_longest(context)
    if tokens is None:
        return draft
    kept = [
        replace(item, until=item.until or context.now + DAY)
        for item in draft.state.longest
        if item.tokens > tokens and not 0 < item.until <= context.now
    ]
    if tokens:
        kept.append(LongestRequest(tokens))
    if len(kept) > MAX_LONGEST:  # the longer one stands for the shorter one as well
        kept[:2] = [replace(kept[0], until=kept[1].until)]
    return draft.with_state(longest=tuple(kept))


def _reported_longest(context: Context) -> int | None:
    """Tokens of the longest request that engines report, whole blocks; None unless every one says so."""
    reported = [item.longest_request_tokens for item in gauges_of(context.trust.trusted)]
    known = [item for item in reported if item is not None]
    if not known or len(known) < len(reported):
        return None
    return math.ceil(max(known) / BLOCK_TOKENS) * BLOCK_TOKENS


def _longest(context: Context, state: TuningState) -> int | None:
    """Tokens of the longest request of the last day, whole blocks; None where an engine does not say."""
    reported = _reported_longest(context)
    return None if reported is None else max([reported, *(item.tokens for item in state.longest)])


def _smaller_pool(context: Context, state: TuningState, pressure: Pressure) -> Found:
    """A smaller quota of the device pool; its budget counts as used on a device."""
    tokens, longest = room(context, "maxTokens"), _longest(context, state)
    if longest is None:
        return _LENGTH_UNKNOWN
    budget = pressure.use.budget_bytes / MIB
    wanted = tokens.now * max(0.5, 1 - _excess_mib(context, pressure) / budget)
    floor = max(longest, tokens.minimum)
    after = int(max(round_to(wanted, BLOCK_TOKENS), floor))
    if not tokens.tunable or after >= tokens.now:
        return reasons.AT_BOUND, f"maxTokens is {tokens.now}, and requests need up to {floor:.0f} tokens"
    part = after / tokens.now
    left = _least_left(context, rows=part, hits=part)
    return _relief(context, pressure, (tokens.to(after),), budget * (1 - part), left)


def _smaller_tier(context: Context, pressure: Pressure) -> Found:
    """A smaller host tier; the pool lies on the device and is no part of it."""
    host = room(context, "hostMemoryMb")
    after = int(
        max(round_to(pressure.held - _excess_mib(context, pressure), 1), pressure.held / 2, host.minimum)
    )
    if not host.tunable or after >= min(host.now, pressure.held):
        return reasons.AT_BOUND, f"the host tier holds {pressure.held:.0f} MiB and gives no more"
    part = after / pressure.held
    values = (host.to(after), *_kept_blocks(context, part))
    left = _least_left(context, rows=1.0, hits=part)
    return _relief(context, pressure, values, pressure.held - after, left)


def _smaller_budget(context: Context, state: TuningState, pressure: Pressure) -> Found:
    """A smaller budget of pool and host tier together, and a higher compression level to keep the blocks."""
    budget, held, longest = room(context, "maxMemoryMb"), pressure.held, _longest(context, state)
    if longest is None:
        return _LENGTH_UNKNOWN
    sizes = [item.token_bytes for item in gauges_of(context.trust.trusted) if item.token_bytes is not None]
    if longest and not sizes:
        return reasons.METRIC_ABSENT, f"no engine exports {names.CACHED_PAGES}"
    if longest and not any(sizes):
        return reasons.NOT_EFFECTIVE, "no pool holds a page that would show what a token takes"
    needed_mib = math.ceil(longest * max(sizes, default=0.0) / MIB)
    floor = max(held / 2, budget.minimum, needed_mib)
    after = int(max(round_to(held - _excess_mib(context, pressure), 1), floor))
    if after >= held or (budget.now is not None and after >= budget.now):
        return reasons.AT_BOUND, f"the cache holds {held:.0f} MiB, the minimum is {floor:.0f} MiB"
    part = after / held
    values = (budget.to(after), *_kept_blocks(context, part))
    return _relief(context, pressure, values, held - after, _least_left(context, rows=part, hits=part))


def _relief(
    context: Context, pressure: Pressure, values: tuple[KnobChange, ...], freed_mib: float, left: float
) -> Proposal:
    return Proposal(
        "memory-relief",
        values,
        "memory",
        _gain(pressure, freed_mib),
        f"{pressure.kind} memory was at {pressure.use.ratio:.0%} of its limit, "
        f"{context.policy.objectives.memory:.0%} is allowed; the cache held {pressure.held:.0f} MiB of it",
        ratio=left,
        measure=MEMORY,
    )


def _least_left(context: Context, *, rows: float, hits: float) -> float:
    """The least part of the step rate that is left with these parts of the rows and of the cached tokens.

    A curve of hits over the size of a cache is concave, so that hits fall in proportion at most; what is no
    longer a hit is computed, and prefill grows with it. Without a curve of step time only rows count.
    """
    capacity = context.capacity
    if capacity is None:
        return rows
    rate = hit_rate(context.measured.counts(judged_window(context.measured))) or 0.0
    computed = (1 - hits * rate) / max(1 - rate, MIN_COMPUTED)
    less = replace(capacity, prefill_s=capacity.prefill_s * computed)
    return less.rate(max(1.0, rows * capacity.rows)) / capacity.rate(capacity.rows)


def _kept_blocks(context: Context, factor: float) -> tuple[KnobChange, ...]:
    """The compression level that keeps as many blocks in ``factor`` of the bytes, if the tier encodes."""
    now = level(context)
    encodes = value(context.config, "useCompression") and value(context.config, "hostMemoryMb")
    higher = _higher_level(now, factor) if encodes else now
    if higher == now or not room(context, "compressionRatio").tunable:
        return ()
    return (compress_to(context, higher),)


def _higher_level(now: CompressionLevel, factor: float) -> CompressionLevel:
    """The lowest level that keeps the number of blocks in ``factor`` of the bytes, else the highest."""
    fitting = [item for item in COMPRESSION_LEVELS if item.kept <= now.kept * factor]
    return fitting[0] if fitting else COMPRESSION_LEVELS[-1]
