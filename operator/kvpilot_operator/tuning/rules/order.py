"""The rules, cheapest first. Each looks at one look and proposes one change, or says why it does not.

The order is the policy: the first proposal that stands is made. A rule knows its own fault and nothing of the
others, so each one can be read, disabled and tested alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvpilot_engine.contract.metrics import Stage
from kvpilot_operator.tuning import cache_rules, reasons
from kvpilot_operator.tuning.bounds import Room, room, vet
from kvpilot_operator.tuning.decision import Rejected
from kvpilot_operator.tuning.diagnosis import pages_short, share
from kvpilot_operator.tuning.look import Look, Plan, Proposal
from kvpilot_operator.tuning.objectives import judged_window, rates
from kvpilot_operator.tuning.observation import Counts
from kvpilot_operator.tuning.prediction import grown, ladder_gain, needed_concurrency, queue_gain
from kvpilot_operator.tuning.state import TuningState

Found = Proposal | tuple[str, str]
"""A proposal, or the reason and the message of a rejection."""

STEP_FULL = 0.8
"""Steps that carry this share of ``max_step_tokens`` on the mean are limited by it."""


@dataclass(frozen=True)
class Rule:
    """One rule: its name (for ``disabledRules``), why it stands where it stands, and what it looks for."""

    name: str
    why: str
    find: Callable[[Look], Found]


def consider(look: Look, state: TuningState) -> Plan:
    """The first proposal that stands, and why the rules before it (or all of them) do not."""
    rejected: list[Rejected] = []
    for rule in RULES:
        if rule.name in look.policy.disabled_rules:
            rejected.append(Rejected(rule.name, reasons.RULE_DISABLED, "disabled by the resource"))
            continue
        found = rule.find(look)
        if isinstance(found, tuple):
            rejected.append(Rejected(rule.name, *found))
            continue
        refused = vet(look, state, found)
        if refused is None:
            return Plan(found, tuple(rejected))
        rejected.append(refused)
    return Plan(None, tuple(rejected))


def counts_of(look: Look) -> Counts:
    """The short window where it says something, else the long one."""
    return look.observation.counts(judged_window(look.observation))


def needed_per_engine(look: Look) -> float:
    """Requests in work at once that the arrivals need, per engine; of both windows the busier one."""
    arrivals = max(rates(look.observation, window)[0] for window in ("short", "long"))
    return needed_concurrency(counts_of(look), arrivals / len(look.ready))


def at_fault(look: Look, *stages: Stage) -> bool:
    """True when an objective that requests feel is breached and one of these stages is why."""
    return look.diagnosis.stage in stages


def workers_up(look: Look) -> Found:
    """Admission wait is at fault and slots are what it waits for: size the workers by Little's law.

    The batch goes along where it would be smaller than the workers, as the wait would only move there.
    """
    if not at_fault(look, Stage.ADMISSION_WAIT):
        return reasons.NOT_AT_FAULT, "admission wait is not at fault"
    if look.diagnosis.saturated:
        return reasons.DEVICE_SATURATED, "more requests at once would only share a device that is full"
    workers, batch = room(look, "numWorkers"), room(look, "batchSize")
    if pages_short(look.observation, workers.now):
        return reasons.PAGES_SHORT, f"requests wait while fewer than {workers.now} workers hold one"
    needed = needed_per_engine(look)
    most = workers.maximum if _can_grow(batch) else min(workers.maximum, max(batch.now, 1))
    after = grown(workers.now, needed, most)
    if after <= workers.now:
        return reasons.AT_BOUND, f"numWorkers is {workers.now}, and more would wait for the batch"
    values = [workers.to(after)]
    if batch.now < after and _can_grow(batch):
        values.append(batch.to(int(min(after, batch.maximum))))
    wait = share(look.diagnosis, Stage.ADMISSION_WAIT) + _batch_share(look, batch, after)
    return Proposal(
        "workers-up",
        tuple(values),
        look.diagnosis.objective,
        queue_gain(min(1.0, wait), workers.now, after, needed),
        f"admission wait was {share(look.diagnosis, Stage.ADMISSION_WAIT):.0%} of request time; "
        f"{needed:.1f} requests in work at once are needed per engine",
    )


def batch_up(look: Look) -> Found:
    """Batch wait is at fault and rows are what it waits for."""
    if not at_fault(look, Stage.BATCH_WAIT):
        return reasons.NOT_AT_FAULT, "batch wait is not at fault"
    if look.diagnosis.saturated:
        return reasons.DEVICE_SATURATED, "more rows would gain under 10%"
    batch, workers = room(look, "batchSize"), room(look, "numWorkers")
    if batch.now >= workers.now:
        return reasons.NOT_EFFECTIVE, f"batchSize {batch.now} already holds all {workers.now} workers"
    needed = min(needed_per_engine(look), workers.now)
    after = grown(batch.now, max(needed, batch.now + 1), min(batch.maximum, workers.now))
    if after <= batch.now:
        return reasons.AT_BOUND, f"batchSize is {batch.now}"
    wait = share(look.diagnosis, Stage.BATCH_WAIT)
    return Proposal(
        "batch-up",
        (batch.to(after),),
        look.diagnosis.objective,
        queue_gain(wait, batch.now, after, needed),
        f"batch wait was {wait:.0%} of request time with {batch.now} rows for {workers.now} workers",
    )


def step_tokens_up(look: Look) -> Found:
    """Prompts queue for their share of a step: the steps are full of prompt tokens."""
    if not at_fault(look, Stage.PREFILL, Stage.BATCH_WAIT):
        return reasons.NOT_AT_FAULT, "neither prefill nor batch wait is at fault"
    tokens, counts = room(look, "maxStepTokens"), counts_of(look)
    computed = counts.query_tokens - counts.hit_tokens + counts.output_tokens
    per_step = computed / counts.steps if counts.steps else 0.0
    if per_step < STEP_FULL * tokens.now:
        return reasons.NOT_EFFECTIVE, f"steps do not fill {tokens.now} tokens"
    after = int(min(tokens.now * 2, tokens.maximum))
    if after <= tokens.now:
        return reasons.AT_BOUND, f"maxStepTokens is {tokens.now}"
    wait = share(look.diagnosis, Stage(look.diagnosis.stage))
    return Proposal(
        "step-tokens-up",
        (tokens.to(after),),
        look.diagnosis.objective,
        ladder_gain(wait, tokens.now, after),
        f"steps carried {per_step:.0f} of {tokens.now} tokens, and {look.diagnosis.stage} was {wait:.0%} of "
        "request time",
    )


def _can_grow(knob: Room) -> bool:
    return knob.tunable and knob.now < knob.maximum


def _batch_share(look: Look, batch: Room, after: int) -> float:
    """Batch wait that goes along when the batch grows with the workers."""
    return share(look.diagnosis, Stage.BATCH_WAIT) if batch.now < after and _can_grow(batch) else 0.0


RULES: tuple[Rule, ...] = (
    Rule(
        "memory-relief",
        "first, since an engine that is killed for its memory loses its cache and every request",
        cache_rules.memory_relief,
    ),
    Rule("workers-up", "costs nothing but work, and idle capacity is the most common fault", workers_up),
    Rule("batch-up", "as cheap; after the workers, which carry the batch along", batch_up),
    Rule("step-tokens-up", "as hot, but a longer step delays every row in it", step_tokens_up),
    Rule("prefetch-up", "costs bandwidth of the slow tiers", cache_rules.prefetch_up),
    Rule(
        "prefetch-down",
        "after prefetch-up, so that one look never argues both ways",
        cache_rules.prefetch_down,
    ),
    Rule(
        "compression-looser", "costs memory, and blocks encoded before stay as they are", cache_rules.looser
    ),
    Rule("cache-quota-up", "costs the most memory, and pays only as the cache fills", cache_rules.quota_up),
)
"""The rules in order of price."""

BESIDE_RULES: tuple[tuple[str, str], ...] = (
    ("memory-emergency", "memory is nearly exhausted: the batch is cut everywhere at once"),
    ("replicas-up", "the device is saturated, or arrivals outrun completions: one more engine"),
    ("replicas-down", "engines are idle for long: one engine less"),
)
"""What stands beside the ordered rules, for ``disabledRules``: name and what it does."""
