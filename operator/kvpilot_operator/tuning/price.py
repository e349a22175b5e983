"""What a change costs at the present load, for its record; the order of remedies rests on fixed prices."""

from __future__ import annotations

from kvpilot_engine.contract import knob as catalogued
from kvpilot_engine.contract.knobs import MIB, Price
from kvpilot_operator.tuning.context import Context, Proposal
from kvpilot_operator.tuning.observation import gauges_of
from kvpilot_operator.tuning.state import KnobChange

TIERS = ("maxTokens", "hostMemoryMb")


def price_of(context: Context, proposal: Proposal) -> Price:
    """The price of a proposal, as far as the engines report what it depends on; bytes are those of a replica.

    A cache is warm again once the engines have computed as many tokens as its change takes or drops; without
    these figures the catalogue's time holds. A new replica is warm no sooner than it starts.
    """
    if proposal.replicas is not None:
        before, after = proposal.replicas
        each = 0 if context.policy.scaling is None else context.policy.scaling.gpus
        if after < before:
            return Price((after - before) * each, cache_bytes=(before - after) * _cached(context))
        return Price((after - before) * each, cold_seconds=round(context.observation.start_s, 1))
    size = sum(_bytes(context, change) for change in proposal.values if change.knob in TIERS)
    size = max(size, *(_bytes(context, item) for item in proposal.values if item.knob == "maxMemoryMb"), 0.0)
    rate, known = _computed(context) * _token_bytes(context), catalogued(proposal.values[0].knob).price
    cold = size / rate if size and rate else known.cold_seconds
    return Price(cold_seconds=round(cold, 1), cache_bytes=round(size))


def _bytes(context: Context, change: KnobChange) -> float:
    """Bytes that a quota takes or drops; a budget where none was begins at what is cached."""
    if change.knob == "maxTokens":
        return abs(float(change.after - change.before)) * _token_bytes(context)
    before = _cached(context) if change.before is None else change.before * MIB
    return abs(float(change.after * MIB - before))


def _token_bytes(context: Context) -> float:
    return max((item.token_bytes or 0.0 for item in gauges_of(context.ready)), default=0.0)


def _cached(context: Context) -> float:
    """Bytes that the fullest cache holds."""
    return max((item.cached_bytes for item in gauges_of(context.ready)), default=0.0)


def _computed(context: Context) -> float:
    """Tokens/s that a replica computes, so that they enter its cache."""
    counts = context.long
    tokens = (counts.computed or 0.0) + (counts.output_tokens or 0.0)
    return max(0.0, tokens) / max(1, len(context.ready)) / context.policy.pace.long
