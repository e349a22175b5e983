"""How an experiment begins: the canary and its controls, and what they are compared with."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence

from kvpilot_operator.tuning.assess.objectives import arrival_rate
from kvpilot_operator.tuning.context import Context, Draft, Proposal
from kvpilot_operator.tuning.decision import Rejected
from kvpilot_operator.tuning.experiment.capacity_verdict import rates_before
from kvpilot_operator.tuning.experiment.evidence import CAPACITY, FAULTS, WORK, arm, counts_for
from kvpilot_operator.tuning.experiment.measure_verdict import difference_before, with_cells
from kvpilot_operator.tuning.experiment.verdict import EXPOSURE_LIMIT
from kvpilot_operator.tuning.observation import ObservedReplica
from kvpilot_operator.tuning.price import price_of
from kvpilot_operator.tuning.state import MAX_CONTROLS, KnobChange, Measure, Phase, ReplicaRef, Scatter


def start(context: Context, draft: Draft, proposal: Proposal, rejected: tuple[Rejected, ...]) -> Draft:
    """Begin an experiment on one replica; the state keeps everything that later decisions need."""
    seed = zlib.crc32(f"{draft.next_id}:{context.now:.3f}".encode())
    canary, controls = _drawn(context.ready, seed)
    others = frozenset(replica.uid for replica in controls)
    before = _before(context, canary, proposal) if not controls else ()
    measure = proposal.measure or (CAPACITY if proposal.ratio else proposal.objective)
    errors = errors_of(context, proposal.values)
    rate, differ = rates_before(context, proposal.values, canary.uid, others)
    longer = None
    if measure != CAPACITY:
        differ = difference_before(context, measure, canary.uid, others, proposal.values)
        longer = difference_before(context, WORK, canary.uid, others, proposal.values)
    change = draft.new_change(
        context,
        proposal,
        canary=ReplicaRef(canary.uid, canary.name),
        controls=tuple(ReplicaRef(replica.uid, replica.name) for replica in controls),
        restarts=sum(replica.restarts for replica in (canary, *controls)),
        before=before,
        why=proposal.message,
        measure=measure,
        seed=seed,
        rate_before=rate,
        errors_before=errors.share or 0.0,
        judged_before=errors.of,
        difference_before=differ,
        work_before=longer,
        scatter_before=scatter_before(context, proposal.values),
    )
    against = ", ".join(replica.name for replica in controls) or "its own past (one replica, unproven)"
    return draft.recorded(
        context,
        rule=proposal.rule,
        outcome="Started",
        summary=f"{proposal.sentence}; trying {proposal.summary} on {canary.name} against {against}; "
        f"predicted gain {proposal.predicted_gain:.0%}.",
        changes=proposal.values,
        generation=change.generation,
        canary=canary.name,
        controls=tuple(item.name for item in change.controls),
        rejected=rejected,
        price=price_of(context, proposal),
        evidence={
            "seed": seed,
            "measure": measure,
            "why": proposal.message,
            "predictedGain": round(proposal.predicted_gain, 4),
            "predictedRatio": round(proposal.ratio, 3),
        },
    ).beginning(Phase.CANARY, change)


def _drawn(
    replicas: tuple[ObservedReplica, ...], seed: int
) -> tuple[ObservedReplica, tuple[ObservedReplica, ...]]:
    """The canary and its controls, drawn at random so that no name is favoured.

    The canary is one of the replicas with the fewest restarts. The controls are all others, or MAX_CONTROLS.
    """
    draw, fewest = random.Random(seed), min(replica.restarts for replica in replicas)
    by_uid = sorted(replicas, key=lambda replica: replica.uid)
    canary = draw.choice([replica for replica in by_uid if replica.restarts == fewest])
    if len(replicas) <= MAX_CONTROLS + 1:
        return canary, tuple(replica for replica in replicas if replica.uid != canary.uid)
    return canary, tuple(draw.sample([r for r in by_uid if r.uid != canary.uid], MAX_CONTROLS))


def errors_of(context: Context, values: Sequence[KnobChange]) -> Measure:
    """Requests of the long window that failed by a fault of the engine, of those that were not shed."""
    counts = counts_for(values, context.measured, "long")
    return Measure(FAULTS, counts.errors, counts.admitted)


def scatter_before(context: Context, values: Sequence[KnobChange]) -> Scatter:
    """Faults of the long window by replica."""
    return with_cells(context, Scatter(), values, frozenset(replica.uid for replica in context.ready))


def enough_exposure(context: Context) -> bool:
    """True if one replica gets enough requests for a verdict within the time allowed."""
    arrivals = arrival_rate(context.measured, "long") / len(context.ready)
    pace = context.policy.pace
    return arrivals * EXPOSURE_LIMIT * pace.verify >= pace.requests_per_arm


def _before(context: Context, replica: ObservedReplica, proposal: Proposal) -> tuple[Measure, ...]:
    """What a change on the only replica is compared with: the measures during the breach.

    Only the measure that it should cure and the errors are tested for harm, as load changes all others.
    The short window is used, unless it holds too few requests for a verdict.
    """
    wanted = context.policy.objectives
    window = "short" if context.short.judged >= context.policy.pace.requests_per_arm else "long"
    measured = arm(context.measured, window, frozenset({replica.uid}), wanted, proposal.values)
    return tuple(
        item
        for name, item in measured.measures.items()
        if name == proposal.objective or name not in wanted.latency
    )
