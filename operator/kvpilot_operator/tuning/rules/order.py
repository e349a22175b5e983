"""Every remedy in the order in which it is considered, and the walk through them.

A remedy knows its own fault and nothing of the others, so each one can be read, disabled and tested alone.
What applies to all of them (trust, pause, mode, ``disabledRules``, repetition) is checked here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from kvpilot_engine.contract import KnobClass
from kvpilot_engine.contract import knob as catalogued
from kvpilot_engine.contract.knobs import Price
from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.context import Context, Found, Plan, Scope
from kvpilot_operator.tuning.decision import Rejected
from kvpilot_operator.tuning.replicas import replicas_down, replicas_up
from kvpilot_operator.tuning.rules.bounds import vet
from kvpilot_operator.tuning.rules.cache import (
    compression_down,
    compression_up,
    prefetch_down,
    prefetch_up,
    quota_up,
    strategy_adaptive,
)
from kvpilot_operator.tuning.rules.compute import batch_up, step_tokens_up, workers_down, workers_up
from kvpilot_operator.tuning.rules.memory import memory_emergency, memory_relief
from kvpilot_operator.tuning.rules.signals import Move, Signal, down, up
from kvpilot_operator.tuning.state import Phase, TuningState

HITS = ("query_tokens", "hit_tokens", "ceiling_tokens")
"""Counts of what the cache serves and could serve."""

PREFETCHED = ("prefetch_used", "prefetch_wasted")

REPLICA_PRICE = Price(gpus=1, cold_seconds=60)
"""A replica costs more than any knob: an accelerator, and a start with an empty cache."""


@dataclass(frozen=True)
class Remedy:
    """One thing that the tuner can do about a fault.

    Attributes:
        name: for ``disabledRules``.
        why: why it stands where it stands.
        find: a proposal for what is observed, or the reason and the message of a rejection.
        scope: proven on a canary, made on all replicas at once, or a change of the number of replicas.
        moves: what it changes and which way; () for the number of replicas. The first one leads; the others
            go along where they may.
        any_knob: it makes whichever of its moves fits, instead.
        cures: signals that it acts on and that its moves lower.
        needs: quota without which it has nothing to act on.
        switch: flag without which it does nothing, unless it is one of its moves.
        within: knob beyond whose value it does not raise the leading one, unless that goes along.
        reads: counts (``OPTIONAL_COUNTS``) without which it stands aside, since absent is not zero.
        drops: what is lost when it is made; "" for nothing.
        reversible: a revert restores at once what was before.
        replicas: replicas that it costs, each with its accelerator.
        urgent: before every remedy that is not, whatever its price.
    """

    name: str
    why: str
    find: Callable[[Context, TuningState, Plan], Found]
    scope: Scope = "canary"
    moves: tuple[Move, ...] = ()
    cures: tuple[Signal, ...] = ()
    any_knob: bool = False
    needs: str = ""
    switch: str = ""
    within: str = ""
    reads: tuple[str, ...] = ()
    drops: str = ""
    reversible: bool = True
    replicas: int = 0
    urgent: bool = False

    @property
    def knobs(self) -> tuple[str, ...]:
        """What it changes, the leading knob first."""
        return tuple(move.knob for move in self.moves)

    @property
    def price(self) -> Price:
        """Price of one step of the leading knob from the default configuration, or of one replica."""
        if self.knobs:
            return catalogued(self.knobs[0]).price
        return REPLICA_PRICE if self.replicas > 0 else Price(gpus=self.replicas)

    @property
    def rank(self) -> tuple[bool, bool, Price]:
        """The order of the list: urgent ones, then by price, and last what gives back a replica."""
        return (not self.urgent, self.replicas < 0, self.price)

    @property
    def cls(self) -> KnobClass | None:
        """Class of the leading knob: how a change of it is proven."""
        return catalogued(self.knobs[0]).cls if self.knobs else None


def consider(context: Context, state: TuningState) -> Plan:
    """The first proposal of each scope that stands, and why the other remedies do not."""
    plan, rejected = Plan(), list[Rejected]()
    if context.policy.mode == "Off":
        return plan
    for remedy in REMEDIES:
        if getattr(plan, remedy.scope) is not None:
            continue
        found = _refused(context, state, remedy) or remedy.find(context, state, plan)
        if isinstance(found, tuple):
            rejected.append(Rejected(remedy.name, *found))
        elif remedy.scope == "canary" and (refused := vet(context, state, found)) is not None:
            rejected.append(refused)
        else:
            plan = plan.with_proposal(remedy.scope, found)
    return replace(plan, rejected=tuple(rejected))


def _refused(context: Context, state: TuningState, remedy: Remedy) -> tuple[str, str] | None:
    """Why a remedy must not be considered, or None: what is checked of all of them alike."""
    for block in _blocks(context, remedy):
        return block
    if remedy.name in context.policy.disabled_rules:
        return reasons.RULE_DISABLED, "disabled by the resource"
    if metric := context.absent(remedy.reads):
        return reasons.METRIC_ABSENT, f"not every engine exports {metric}"
    if remedy.scope == "everywhere" and state.phase in {Phase.EMERGENCY, Phase.PROMOTE}:
        return reasons.COOLDOWN, "another change is being made everywhere"
    if any(item.key == remedy.name for item in state.reported):
        return reasons.COOLDOWN, "made a short while ago"
    return None


def _blocks(context: Context, remedy: Remedy) -> tuple[tuple[str, str], ...]:
    """More capacity and relief of memory need not wait for replicas that cannot be trusted."""
    if remedy.scope == "everywhere" or remedy.replicas > 0:
        return context.urgent_blocks
    return context.relief_blocks if "memory" in remedy.cures else context.blocks


def _by_context(find: Callable[[Context], Found]) -> Callable[[Context, TuningState, Plan], Found]:
    return lambda context, state, plan: find(context)


_ALL = (
    Remedy(
        "memory-emergency",
        "first: memory is nearly exhausted, so the batch is cut on all replicas at once",
        memory_emergency,
        scope="everywhere",
        moves=down("batchSize"),
        cures=("memory",),
        urgent=True,
    ),
    Remedy(
        "memory-relief",
        "urgent: an engine that is killed for its memory loses its cache and every request",
        memory_relief,
        moves=down("maxMemoryMb", "maxTokens", "hostMemoryMb", "compressionRatio"),
        cures=("memory",),
        any_knob=True,
        drops="cached blocks beyond the smaller budget",
        reversible=False,
        urgent=True,
    ),
    Remedy(
        "workers-up",
        "costs nothing but work, and idle capacity is the most common fault",
        _by_context(workers_up),
        moves=up("numWorkers", "batchSize"),
        cures=("admission wait",),
        within="batchSize",
    ),
    Remedy(
        "workers-down",
        "as cheap; fewer requests at once are each served faster, where that is enough for the load",
        _by_context(workers_down),
        moves=down("numWorkers"),
        cures=("time in work",),
    ),
    Remedy(
        "batch-up",
        "as cheap; after the workers, which carry the batch along",
        _by_context(batch_up),
        moves=up("batchSize"),
        cures=("batch wait",),
        within="numWorkers",
    ),
    Remedy(
        "step-tokens-up",
        "a longer step delays every row in it",
        _by_context(step_tokens_up),
        moves=up("maxStepTokens"),
        cures=("batch wait", "time in work"),
        reads=("query_tokens", "hit_tokens", "output_tokens"),
    ),
    Remedy(
        "prefetch-up",
        "costs bandwidth of the slower tiers",
        _by_context(prefetch_up),
        moves=up("prefetchSize", "enablePrefetch"),
        cures=("tier load",),
        needs="hostMemoryMb",
        switch="enablePrefetch",
        reads=PREFETCHED,
    ),
    Remedy(
        "prefetch-down",
        "after prefetch-up, so that one decision never argues both ways",
        _by_context(prefetch_down),
        moves=down("prefetchSize", "enablePrefetch"),
        cures=("wasted prefetches",),
        any_knob=True,
        needs="hostMemoryMb",
        switch="enablePrefetch",
        reads=PREFETCHED,
    ),
    Remedy(
        "strategy-adaptive",
        "costs no memory; the pages that are held stay",
        _by_context(strategy_adaptive),
        moves=up("cacheStrategy"),
        cures=("misses",),
        reads=(*HITS, "evicted_pages"),
    ),
    Remedy(
        "compression-down",
        "costs memory; blocks that are encoded stay as they are",
        _by_context(compression_down),
        moves=up("compressionRatio", "hostMemoryMb", "maxMemoryMb"),
        cures=("tier load",),
        needs="hostMemoryMb",
        switch="useCompression",
        reads=("decode_seconds",),
    ),
    Remedy(
        "compression-up",
        "costs work of the codec; before a quota, which costs memory",
        _by_context(compression_up),
        moves=(*down("compressionRatio"), *up("useCompression")),
        cures=("misses",),
        needs="hostMemoryMb",
        switch="useCompression",
        reads=(*HITS, "evicted_pages"),
    ),
    Remedy(
        "cache-quota-up",
        "costs the most memory, and helps only as the cache fills",
        _by_context(quota_up),
        moves=up("maxTokens", "hostMemoryMb", "maxMemoryMb"),
        cures=("misses", "admission wait"),
        any_knob=True,
        reads=(*HITS, "evicted_pages"),
    ),
    Remedy(
        "replicas-up",
        "costs an accelerator: where the device is saturated or no knob promises relief",
        replicas_up,
        scope="replicas",
        replicas=1,
    ),
    Remedy(
        "replicas-down",
        "last: one replica less after a long time in which fewer would have done",
        replicas_down,
        scope="replicas",
        drops="the cache of the removed replica",
        reversible=False,
        replicas=-1,
    ),
)

REMEDIES: tuple[Remedy, ...] = tuple(sorted(_ALL, key=lambda remedy: remedy.rank))
"""Every remedy in the order of :attr:`Remedy.rank`; of equal ones, as they stand above."""
