"""Rules about the cache: prefetch, codec, quotas and memory. ``rules.RULES`` gives their order."""

from __future__ import annotations

from kvpilot_engine.contract import BLOCK_TOKENS, codec_rung
from kvpilot_engine.contract.knobs import LADDER, CodecRung
from kvpilot_engine.contract.metrics import Stage
from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.bounds import room
from kvpilot_operator.tuning.configuration import value
from kvpilot_operator.tuning.diagnosis import pages_short, share
from kvpilot_operator.tuning.look import Look, Proposal
from kvpilot_operator.tuning.objectives import ceiling, hit_rate
from kvpilot_operator.tuning.observation import Counts
from kvpilot_operator.tuning.prediction import ladder_gain, miss_gain, round_to
from kvpilot_operator.tuning.state import KnobChange

Found = Proposal | tuple[str, str]

ACCURATE, WASTED = 0.7, 0.3
"""Share of prefetched blocks that are used: at least this to fetch further ahead, under that to fetch
less."""

ENOUGH_BLOCKS = 20
"""Prefetched blocks below which their accuracy says nothing."""

CODEC_PAYS = 0.5
"""Decoding is at fault when it takes this share of the time in tier loads."""

AMPLE, TARGETED = 0.75, 0.9
"""Fractions of the memory objective: memory is ample below the first; no change may predict more than
the other."""

GROWTH = 1.5
"""Step of a cache quota upwards (the tuning guide's factor)."""

LEAST_CUT = 0.75
"""Step of the memory budget downwards while the limit in bytes is unknown; it is never more than halved."""

MIB = 1 << 20


def prefetch_up(look: Look) -> Found:
    """Tier load is at fault, and what is fetched ahead is used: fetch further."""
    if look.diagnosis.stage != Stage.TIER_LOAD:
        return reasons.NOT_AT_FAULT, "tier load is not at fault"
    size, enabled = room(look, "prefetchSize"), room(look, "enablePrefetch")
    used = accuracy(look.long)
    if enabled.now and size.now and used is not None and used < ACCURATE:
        return reasons.INACCURATE, f"{used:.0%} of prefetched blocks were used"
    after = int(min(max(4, size.now * 2), size.maximum))
    if enabled.now and after <= size.now:
        return reasons.AT_BOUND, f"prefetchSize is {size.now}"
    values = [size.to(after)] if after > size.now else []
    if not enabled.now:
        values.insert(0, enabled.to(after=True))
    wait = share(look.diagnosis, Stage.TIER_LOAD)
    before = size.now if enabled.now else 0
    told = "none were fetched ahead" if used is None else f"{used:.0%} of prefetched blocks were used"
    return Proposal(
        "prefetch-up",
        tuple(values),
        look.diagnosis.objective,
        ladder_gain(wait, before, max(after, size.now)),
        f"tier load was {wait:.0%} of request time and {told}",
    )


def prefetch_down(look: Look) -> Found:
    """Most of what is fetched ahead is wasted, in both windows: fetch less. Needs no breach."""
    size = room(look, "prefetchSize")
    if not value(look.config, "enablePrefetch") or size.now == 0:
        return reasons.NOT_EFFECTIVE, "nothing is fetched ahead"
    used = accuracy(look.short), accuracy(look.long)
    if any(part is None or part >= WASTED for part in used):
        return reasons.NOT_AT_FAULT, "prefetched blocks are not wasted"
    after = int(max(size.now // 2, size.minimum))
    if after >= size.now:
        return reasons.AT_BOUND, f"prefetchSize is {size.now}"
    return Proposal(
        "prefetch-down",
        (size.to(after),),
        "prefetchWaste",
        1 - after / size.now,
        f"{1 - (used[1] or 0.0):.0%} of prefetched blocks were wasted",
    )


def looser(look: Look) -> Found:
    """Tier load is at fault, decoding is what takes its time, and memory is ample: the next looser codec.

    The host tier's budget grows along where it may, to keep the number of blocks.
    """
    if look.diagnosis.stage != Stage.TIER_LOAD:
        return reasons.NOT_AT_FAULT, "tier load is not at fault"
    counts = look.short
    part = counts.decode_seconds / max(counts.stage_seconds.get(Stage.TIER_LOAD, 0.0), 1e-9)
    if part < CODEC_PAYS:
        return reasons.NOT_AT_FAULT, f"decoding is {part:.0%} of the time in tier loads"
    now, target = rung(look), look.policy.objectives.memory
    if now == LADDER[0]:
        return reasons.AT_BOUND, "blocks are not encoded"
    if look.memory > AMPLE * target:
        return reasons.MEMORY_TIGHT, f"memory is at {look.memory:.0%}"
    after = LADDER[LADDER.index(now) - 1]
    wait = share(look.diagnosis, Stage.TIER_LOAD)
    return Proposal(
        "compression-looser",
        (_codec(look, after), *_host_for(look, after.kept / now.kept)),
        look.diagnosis.objective,
        ladder_gain(wait * min(1.0, part), now.kept, after.kept),
        f"tier load was {wait:.0%} of request time, {min(1.0, part):.0%} of it decoding, "
        f"and memory was at {look.memory:.0%}",
    )


def memory_relief(look: Look) -> Found:
    """Memory is over its limit: a smaller budget, and a tighter codec to keep the number of blocks."""
    if not look.breached("memory"):
        return reasons.NOT_AT_FAULT, "memory is not over its limit"
    budget = room(look, "maxMemoryMb")
    held = held_mib(look)
    if held <= 0:
        return reasons.NOT_EFFECTIVE, "the engine does not tell what its cache holds"
    target, limit = look.policy.objectives.memory, limit_mib(look)
    excess = (look.memory - TARGETED * target) * limit if limit else held * (1 - LEAST_CUT)
    after = int(max(round_to(held - excess, 1), held / 2, budget.minimum))
    if after >= held or (budget.now is not None and after >= budget.now):
        return reasons.AT_BOUND, f"the cache holds {held:.0f} MiB, and {budget.minimum:.0f} MiB is the least"
    now = rung(look)
    encodes = value(look.config, "useCompression") and value(look.config, "hostMemoryMb")
    tighter = _tighter(now, after / held) if encodes else now
    values: list[KnobChange] = [budget.to(after)]
    if tighter != now and room(look, "compressionRatio").tunable:
        values.append(_codec(look, tighter))
    predicted = (held - after) / limit / look.memory if limit else 1 - LEAST_CUT
    return Proposal(
        "memory-relief",
        tuple(values),
        "memory",
        predicted,
        f"memory was at {look.memory:.0%} of its limit, {target:.0%} is allowed; "
        f"the cache held {held:.0f} MiB",
    )


def quota_up(look: Look) -> Found:
    """The hit rate is under target and ceiling (or pages are short), pages are evicted, memory is ample."""
    waits = look.diagnosis.stage == Stage.ADMISSION_WAIT
    starved = look.diagnosis.stage == Stage.PREEMPTED or (
        waits and pages_short(look.observation, value(look.config, "numWorkers"))
    )
    if not (look.breached("hitRate") or starved):
        infeasible = any(item.name == "hitRate" and item.state == "Infeasible" for item in look.objectives)
        if infeasible:
            return (
                reasons.TARGET_ABOVE_CEILING,
                "not even an infinite cache would reach the hit rate asked for",
            )
        return reasons.NOT_AT_FAULT, "the hit rate is not at fault"
    if not look.long.evicted_pages and not starved:
        return reasons.NO_EVICTIONS, "nothing is evicted"
    target = look.policy.objectives.memory
    growth = _growth(look)
    if growth is None:
        return reasons.AT_BOUND, "maxTokens and hostMemoryMb are at their bounds"
    limit, extra = limit_mib(look), _extra_mib(look, growth)
    crowded = look.memory + extra / limit > TARGETED * target if limit else look.memory > AMPLE * target
    if crowded:
        return reasons.MEMORY_TIGHT, f"memory is at {look.memory:.0%}, and {extra:.0f} MiB more are needed"
    rate, top = hit_rate(look.long) or 0.0, ceiling(look.long) or 0.0
    before, after = float(growth.before), float(growth.after)
    if look.breached("hitRate"):
        gain, objective = miss_gain(rate, top, before, after), "hitRate"
        told = f"{rate:.0%} of prompt tokens came from the cache, an infinite one would give {top:.0%}"
    else:
        objective = look.diagnosis.objective
        gain = ladder_gain(share(look.diagnosis, Stage(look.diagnosis.stage)), before, after)
        told = f"requests waited for pages ({look.diagnosis.stage})"
    return Proposal("cache-quota-up", (growth, *_budget_for(look, extra)), objective, gain, told)


def accuracy(counts: Counts) -> float | None:
    """Share of prefetched blocks that were used; None while there are few."""
    total = counts.prefetch_used + counts.prefetch_wasted
    return counts.prefetch_used / total if total >= ENOUGH_BLOCKS else None


def rung(look: Look) -> CodecRung:
    """The codec in force."""
    return codec_rung(value(look.config, "useCompression"), value(look.config, "compressionRatio"))


def held_mib(look: Look) -> float:
    """What the cache of the fullest engine holds, within its budget, MiB."""
    gauges = [pod.sample.gauges for pod in look.ready if pod.sample is not None]
    return max((min(g.cached_bytes or g.budget_bytes, g.budget_bytes) for g in gauges), default=0.0) / MIB


def limit_mib(look: Look) -> float:
    """The memory limit of the engines, MiB; 0 when it is unknown."""
    known = [p.sample.gauges.memory_limit_bytes for p in look.ready if p.sample is not None]
    return min(known, default=0.0) / MIB


def _codec(look: Look, after: CodecRung) -> KnobChange:
    return room(look, "compressionRatio").to(after.kept)


def _tighter(now: CodecRung, factor: float) -> CodecRung:
    """The loosest rung that keeps the number of blocks in ``factor`` of the bytes, else the tightest."""
    fitting = [item for item in LADDER if item.kept <= now.kept * factor]
    return fitting[0] if fitting else LADDER[-1]


def _host_for(look: Look, factor: float) -> tuple[KnobChange, ...]:
    """The host tier's budget times ``factor``, where that fits; the blocks it holds stay as many."""
    host, limit = room(look, "hostMemoryMb"), limit_mib(look)
    after = round(host.now * factor)
    fits = limit and look.memory + (after - host.now) / limit <= TARGETED * look.policy.objectives.memory
    if not (host.tunable and fits and host.now < after <= host.maximum):
        return ()
    return (host.to(after), *_budget_for(look, after - host.now))


def _budget_for(look: Look, extra: float) -> tuple[KnobChange, ...]:
    """A budget that is set grows by what is added below it."""
    budget = room(look, "maxMemoryMb")
    if budget.now is None or not budget.tunable:
        return ()
    after = int(min(budget.now + round_to(extra, 1, up=True), budget.maximum))
    return (budget.to(after),) if after > budget.now else ()


def _growth(look: Look) -> KnobChange | None:
    """The next larger quota: of the hot cache while it can, else of the host tier."""
    tokens, host = room(look, "maxTokens"), room(look, "hostMemoryMb")
    after = int(min(round_to(tokens.now * GROWTH, BLOCK_TOKENS), tokens.maximum))
    if tokens.tunable and after > tokens.now:
        return tokens.to(after)
    more = int(min(max(64, host.now * GROWTH), host.maximum))
    return host.to(more) if host.tunable and more > host.now else None


def _extra_mib(look: Look, growth: KnobChange) -> float:
    """Memory that a larger quota may take. For tokens an upper estimate: the whole budget grows alike."""
    if growth.knob == "hostMemoryMb":
        return float(growth.after - growth.before)
    budget: float = (
        max((pod.sample.gauges.budget_bytes for pod in look.ready if pod.sample), default=0.0) / MIB
    )
    return budget * (float(growth.after) / float(growth.before) - 1)
