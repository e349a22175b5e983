"""Rules about the cache: prefetch, compression, quotas and memory."""

from __future__ import annotations

from kvpilot_engine.contract import BLOCK_TOKENS, compression_level
from kvpilot_engine.contract.config import CacheStrategy
from kvpilot_engine.contract.knobs import COMPRESSION_LEVELS, GROWTH, MIB, QUOTA_GROWTH, CompressionLevel
from kvpilot_engine.contract.metrics import Stage
from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.assess.diagnosis import share, waits_for_pages
from kvpilot_operator.tuning.assess.objectives import ceiling, hit_rate
from kvpilot_operator.tuning.configuration import value
from kvpilot_operator.tuning.context import Context, Found, Proposal
from kvpilot_operator.tuning.experiment.evidence import CAPACITY, TIER_LOAD
from kvpilot_operator.tuning.observation import Counts, gauges_of
from kvpilot_operator.tuning.rules.bounds import Room, room
from kvpilot_operator.tuning.rules.prediction import ladder_gain, miss_gain, round_to
from kvpilot_operator.tuning.state import KnobChange

ACCURATE, WASTED = 0.7, 0.3
"""Share of prefetched blocks that are used: from the first on, fetch further ahead; below the second, fetch
less."""

ENOUGH_BLOCKS = 20
"""With fewer prefetched blocks their accuracy says nothing."""

DECODING_AT_FAULT = 0.5
"""Decoding is at fault if it takes this share of the time in tier loads."""

MAX_MEASURED_MEMORY, MAX_PREDICTED_MEMORY = 0.75, 0.9
"""Fractions of the memory objective. A change that needs memory is made below the first where its effect on
memory is unknown, else if it predicts at most the second."""


STRATEGY_GAIN = 0.25
"""Share of the distance to an infinite cache that a better eviction policy is assumed to win."""

HOST_SHARE = 0.5
"""Share of what a larger cache would win that a fuller host tier is assumed to win: it is one of two."""


def prefetch_up(context: Context) -> Found:
    """Tier load is at fault and prefetched blocks are used: fetch further ahead."""
    if context.diagnosis.stage != Stage.TIER_LOAD:
        return reasons.NOT_AT_FAULT, "tier load is not at fault"
    size, enabled = room(context, "prefetchSize"), room(context, "enablePrefetch")
    used = accuracy(context.long)
    if enabled.now and size.now and used is not None and used < ACCURATE:
        return reasons.INACCURATE, f"{used:.0%} of prefetched blocks were used"
    after = int(min(max(4, size.now * GROWTH), size.maximum))
    if enabled.now and after <= size.now:
        return reasons.AT_BOUND, f"prefetchSize is {size.now}"
    values = [size.to(after)] if after > size.now else []
    if not enabled.now:
        values.insert(0, enabled.to(after=True))
    wait = share(context.diagnosis, Stage.TIER_LOAD)
    before = size.now if enabled.now else 0
    reported = "none were fetched ahead" if used is None else f"{used:.0%} of prefetched blocks were used"
    return Proposal(
        "prefetch-up",
        tuple(values),
        context.diagnosis.objective,
        ladder_gain(1.0, before, max(after, size.now)),
        f"tier load was {wait:.0%} of request time and {reported}",
        measure=TIER_LOAD,
    )


def prefetch_down(context: Context) -> Found:
    """Most prefetched blocks are wasted in both windows: fetch fewer. Needs no breach.

    At the least number it is switched off, unless requests wait for loads, which a few blocks shorten too.
    """
    size, enabled = room(context, "prefetchSize"), room(context, "enablePrefetch")
    if not enabled.now or size.now == 0:
        return reasons.NOT_EFFECTIVE, "nothing is fetched ahead"
    used = accuracy(context.short), accuracy(context.long)
    if any(part is None or part >= WASTED for part in used):
        return reasons.NOT_AT_FAULT, "prefetched blocks are not wasted"
    after, change = int(max(size.now // 2, size.minimum)), None
    if after < size.now:
        change = size.to(after)
    elif _at_least(context, size) and context.diagnosis.stage != Stage.TIER_LOAD and enabled.tunable:
        after, change = 0, enabled.to(after=False)
    if change is None:
        return reasons.AT_BOUND, f"prefetchSize is {size.now}"
    return Proposal(
        "prefetch-down",
        (change,),
        "prefetchWaste",
        1 - after / size.now,
        f"{1 - (used[1] or 0.0):.0%} of prefetched blocks were wasted",
    )


def compression_down(context: Context) -> Found:
    """Tier load is at fault because of decoding, and memory is free: the next lower compression level.

    The host tier's budget grows with it where it may, to keep the number of blocks.
    """
    if context.diagnosis.stage != Stage.TIER_LOAD:
        return reasons.NOT_AT_FAULT, "tier load is not at fault"
    counts = context.short
    decoding = counts.decode_seconds or 0.0
    part = decoding / max(counts.stage_seconds.get(Stage.TIER_LOAD, 0.0), 1e-9)
    if part < DECODING_AT_FAULT:
        return reasons.NOT_AT_FAULT, f"decoding is {part:.0%} of the time in tier loads"
    now, target = level(context), context.policy.objectives.memory
    if now == COMPRESSION_LEVELS[0]:
        return reasons.AT_BOUND, "blocks are not encoded"
    if context.memory > MAX_MEASURED_MEMORY * target:
        return reasons.MEMORY_TIGHT, f"memory is at {context.memory:.0%}"
    after = COMPRESSION_LEVELS[COMPRESSION_LEVELS.index(now) - 1]
    wait = share(context.diagnosis, Stage.TIER_LOAD)
    return Proposal(
        "compression-down",
        (compress_to(context, after), *_host_for(context, after.kept / now.kept)),
        context.diagnosis.objective,
        ladder_gain(min(1.0, part), now.kept, after.kept),
        f"tier load was {wait:.0%} of request time, {min(1.0, part):.0%} of it decoding, "
        f"and memory was at {context.memory:.0%}",
        measure=TIER_LOAD,
    )


def quota_up(context: Context) -> Found:
    """The hit rate is low (or pages are short), pages are evicted, and memory is free: a larger quota."""
    waits = context.diagnosis.stage == Stage.ADMISSION_WAIT
    starved = context.diagnosis.stage == Stage.PREEMPTED or (
        waits and waits_for_pages(context.measured, value(context.config, "numWorkers"))
    )
    if not (context.breached("hitRate") or starved):
        infeasible = any(item.name == "hitRate" and item.state == "Infeasible" for item in context.objectives)
        if infeasible:
            return (
                reasons.TARGET_ABOVE_CEILING,
                "not even an infinite cache would reach the hit rate asked for",
            )
        return reasons.NOT_AT_FAULT, "the hit rate is not at fault"
    if not context.long.evicted_pages and not starved:
        return reasons.NO_EVICTIONS, "nothing is evicted"
    growth = _growth(context)
    if growth is None:
        return reasons.AT_BOUND, "maxTokens and hostMemoryMb are at their bounds"
    extra = _extra_mib(context, growth)
    if not _fits(context, extra):
        return reasons.MEMORY_TIGHT, f"memory is at {context.memory:.0%}, and {extra:.0f} MiB more are needed"
    rate, top = hit_rate(context.long) or 0.0, ceiling(context.long) or 0.0
    before, after = float(growth.before), float(growth.after)
    if context.breached("hitRate"):
        gain, objective = miss_gain(rate, top, before, after), "hitRate"
        reported = f"{rate:.0%} of prompt tokens came from the cache, an infinite one would give {top:.0%}"
    else:
        objective = context.diagnosis.objective
        gain = ladder_gain(share(context.diagnosis, Stage(context.diagnosis.stage)), before, after)
        reported = f"requests waited for pages ({context.diagnosis.stage_text})"
    by_hits = context.breached("hitRate")
    return Proposal(
        "cache-quota-up",
        (growth, *_budget_for(context, extra)),
        objective,
        gain,
        reported,
        ratio=0.0 if by_hits else after / before,
        measure="" if by_hits else CAPACITY,
    )


def strategy_adaptive(context: Context) -> Found:
    """The hit rate is low, and a fixed policy chooses what is evicted: let it follow the traffic."""
    if not context.breached("hitRate"):
        return reasons.NOT_AT_FAULT, "the hit rate is not at fault"
    strategy = room(context, "cacheStrategy")
    if strategy.now == CacheStrategy.ADAPTIVE:
        return reasons.NOT_EFFECTIVE, "cacheStrategy is adaptive"
    if CacheStrategy(strategy.now) is CacheStrategy.ADAPTIVE.runs_as:
        return (
            reasons.NOT_EFFECTIVE,
            f"cacheStrategy adaptive runs as {strategy.now} so far, which is in force",
        )
    if not context.long.evicted_pages:
        return reasons.NO_EVICTIONS, "nothing is evicted"
    rate, top = hit_rate(context.long) or 0.0, ceiling(context.long) or 0.0
    return Proposal(
        "strategy-adaptive",
        (strategy.to(CacheStrategy.ADAPTIVE.value),),
        "hitRate",
        STRATEGY_GAIN * (top - rate) / (1 - rate) if rate < 1 else 0.0,
        f"{rate:.0%} of prompt tokens came from the cache, an infinite one would give {top:.0%}, and "
        f"{strategy.now} chooses what is evicted",
    )


def compression_up(context: Context) -> Found:
    """The hit rate is low and memory is tight: encode more, so that the host tier holds more blocks."""
    if not context.breached("hitRate"):
        return reasons.NOT_AT_FAULT, "the hit rate is not at fault"
    if not (value(context.config, "hostMemoryMb") and context.long.evicted_pages):
        return reasons.NOT_EFFECTIVE, "no host tier holds evicted blocks"
    now, used = level(context), room(context, "useCompression")
    if now == COMPRESSION_LEVELS[-1]:
        return reasons.AT_BOUND, "blocks are encoded at the highest level"
    after = COMPRESSION_LEVELS[COMPRESSION_LEVELS.index(now) + 1]
    values = (
        (compress_to(context, after),) if used.now else (used.to(after=True), compress_to(context, after))
    )
    rate, top = hit_rate(context.long) or 0.0, ceiling(context.long) or 0.0
    return Proposal(
        "compression-up",
        values,
        "hitRate",
        HOST_SHARE * miss_gain(rate, top, after.kept, now.kept),
        f"{rate:.0%} of prompt tokens came from the cache, an infinite one would give {top:.0%}; "
        f"{after.codec} blocks take {after.kept / now.kept:.0%} of the bytes",
    )


def _at_least(context: Context, knob: Room) -> bool:
    """True if a knob stands at its least value, and is not kept where it is by a pin or a direction."""
    bounds = context.policy.bounds[knob.knob]
    return knob.tunable and bounds.minimum is not None and knob.now <= bounds.minimum


def accuracy(counts: Counts) -> float | None:
    """Share of prefetched blocks that were used; None while there are few, or nobody counts them."""
    used, wasted = counts.prefetch_used, counts.prefetch_wasted
    if used is None or wasted is None or used + wasted < ENOUGH_BLOCKS:
        return None
    return used / (used + wasted)


def level(context: Context) -> CompressionLevel:
    """The compression level in force."""
    return compression_level(
        value(context.config, "useCompression"), value(context.config, "compressionRatio")
    )


def limit_mib(context: Context) -> float:
    """The smallest memory limit of the replicas, MiB; 0 if it is unknown."""
    return min((item.memory_limit_bytes for item in gauges_of(context.ready)), default=0.0) / MIB


def _fits(context: Context, extra: float) -> bool:
    """True if so many MiB more keep memory far enough below its objective."""
    target, limit = context.policy.objectives.memory, limit_mib(context)
    if not limit:
        return context.memory <= MAX_MEASURED_MEMORY * target
    return context.memory + extra / limit <= MAX_PREDICTED_MEMORY * target


def compress_to(context: Context, after: CompressionLevel) -> KnobChange:
    """The change to another compression level."""
    return room(context, "compressionRatio").to(after.kept)


def _host_for(context: Context, factor: float) -> tuple[KnobChange, ...]:
    """The host tier's budget times ``factor`` where that fits, so that it holds as many blocks as before."""
    host = room(context, "hostMemoryMb")
    after = round(host.now * factor)
    fits = limit_mib(context) and _fits(context, after - host.now)
    if not (host.tunable and fits and host.now < after <= host.maximum):
        return ()
    return (host.to(after), *_budget_for(context, after - host.now))


def _budget_for(context: Context, extra: float) -> tuple[KnobChange, ...]:
    """A memory budget that is set grows by what a quota within it gets."""
    budget = room(context, "maxMemoryMb")
    if budget.now is None or not budget.tunable:
        return ()
    after = int(min(budget.now + round_to(extra, 1, up=True), budget.maximum))
    return (budget.to(after),) if after > budget.now else ()


def _growth(context: Context) -> KnobChange | None:
    """The next larger quota: of the device pool while it can grow, else of the host tier."""
    tokens, host = room(context, "maxTokens"), room(context, "hostMemoryMb")
    after = int(min(round_to(tokens.now * QUOTA_GROWTH, BLOCK_TOKENS), tokens.maximum))
    if tokens.tunable and after > tokens.now:
        return tokens.to(after)
    more = int(min(max(64, host.now * QUOTA_GROWTH), host.maximum))
    return host.to(more) if host.tunable and more > host.now else None


def _extra_mib(context: Context, growth: KnobChange) -> float:
    """MiB that a larger quota may take; for tokens an upper bound, as if the whole budget grew."""
    if growth.knob == "hostMemoryMb":
        return float(growth.after - growth.before)
    budget: float = max((item.budget_bytes for item in gauges_of(context.ready)), default=0.0) / MIB
    return budget * (float(growth.after) / float(growth.before) - 1)
