"""The watch over a change that runs on all replicas: harm takes it back.

Before and after are no proof for latencies, since the load moves them. They are one for step rates and
errors, which do not depend on the load while there is work. The engines are compared with their own past, so
what machines differ by is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.assess.capacity import USE
from kvpilot_operator.tuning.assess.forecast import SIGNIFICANT
from kvpilot_operator.tuning.assess.guards import DAY
from kvpilot_operator.tuning.assess.objectives import arrival_rate, overflow
from kvpilot_operator.tuning.configuration import value
from kvpilot_operator.tuning.context import OVERLOAD, Context, Draft, Proposal, format_changes
from kvpilot_operator.tuning.experiment.capacity_verdict import harm_below
from kvpilot_operator.tuning.experiment.ends import TAKEN_BACK
from kvpilot_operator.tuning.experiment.evidence import (
    FAULTS,
    HARM_EVIDENCE,
    Arm,
    counts_for,
    error_evidence,
)
from kvpilot_operator.tuning.experiment.expectation import record_result
from kvpilot_operator.tuning.experiment.measure_verdict import MIN_INTERVALS
from kvpilot_operator.tuning.experiment.start import errors_of
from kvpilot_operator.tuning.experiment.statistics import OVERDISPERSION, mixture_evidence, overdispersion
from kvpilot_operator.tuning.experiment.step_rate import as_loaded, difference, of_other_times, step_rate
from kvpilot_operator.tuning.experiment.verdict import EXPOSURE_LIMIT
from kvpilot_operator.tuning.observation import Counts
from kvpilot_operator.tuning.state import (
    MAX_BLOCKED_VALUES,
    MAX_REVERSALS,
    BlockedValue,
    KnobChange,
    Measure,
    Phase,
    Reversal,
    Scatter,
    Watch,
)

MORE_ARRIVALS = 0.1
"""Growth of the arrivals from which on errors that the load can make are not blamed on an edit."""

RELIEF = 0.02
"""Part of the memory limit that an emergency has to free, or it is taken back."""


def watch(context: Context, draft: Draft) -> Draft:
    """Judge what runs on all replicas against how it was before it."""
    seen = draft.state.watch
    if seen is None or draft.state.change is not None:
        return draft
    uids = frozenset(replica.uid for replica in context.current)
    counts = counts_for(seen.values, context.measured, "watch", uids)
    if context.trust.nothing is None and counts.judged:
        seen = _with_interval(context, seen, uids)
        draft = draft.with_state(watch=seen)
        rate = step_rate(counts, seen.values)
        found = difference(rate, seen.rate_before)
        failed = _failed(seen, counts)
        bound = harm_below(seen.ratio)
        slower = 0.0
        if found is not None and as_loaded(rate, seen.rate_before, seen.values):
            slower = mixture_evidence(of_other_times(found), bound, above=False)
        evidence = {
            "verdict": reasons.HARMFUL,
            "ratio": None if found is None else round(math.exp(found.log_ratio), 3),
            "predictedRatio": round(seen.ratio, 3),
            "harmEValue": float(f"{max(failed, slower):.3g}"),
        }
        if failed >= HARM_EVIDENCE:
            return _harm(context, draft, seen, "more requests fail than before", evidence)
        if slower >= HARM_EVIDENCE:
            return _harm(context, draft, seen, "the engines do less work per second than before", evidence)
    unseen = context.trust.nothing is not None or not context.current
    longest = seen.until + EXPOSURE_LIMIT * context.policy.pace.verify
    if context.now < seen.until or (unseen and context.now < longest):
        return draft
    if seen.memory_before and context.current and context.memory > seen.memory_before - RELIEF:
        evidence = {"verdict": reasons.NO_GAIN, "memory": round(context.memory, 3)}
        return _take_back(context, draft, seen, "memory did not fall", evidence)
    return draft.with_state(watch=None)


def watch_of_edit(context: Context, decision: str, changed: tuple[KnobChange, ...]) -> Watch | None:
    """The watch over an edit of the user, which is reported if it does harm; None without a measurement."""
    rate, errors, pace = step_rate(context.long, changed), errors_of(context, changed), context.policy.pace
    if errors.share is None:
        return None
    since = context.now + pace.tick + pace.scrape  # no scrape before the engines ran it counts
    short, long = (counts_for(changed, context.measured, window) for window in ("short", "long"))
    rates = [arrival_rate(context.measured, window) / len(context.ready) for window in ("short", "long")]
    scatter = Scatter().with_cell(short.failed, short.judged)
    return Watch(
        decision,
        "user-edit",
        changed,
        since,
        since + pace.verify,
        rate,
        errors.share,
        errors.of,
        own=False,
        scatter_before=scatter.with_cell(long.failed - short.failed, long.judged - short.judged),
        arrivals_before=max(rates) if _has_room(context, rates[1]) else 0.0,
    )


def _has_room(context: Context, arrivals: float) -> bool:
    """True if a replica serves so many requests/s with room: near its limit they fail by chance as well."""
    rows = min(value(context.config, "numWorkers"), value(context.config, "batchSize"))
    calm = all(overflow(context.measured, window) <= OVERLOAD for window in ("short", "long"))
    return calm and context.capacity is not None and arrivals <= USE * context.capacity.rate(rows)


def _with_interval(context: Context, seen: Watch, uids: frozenset[str]) -> Watch:
    """The watch over an edit with one more interval, and without errors of the load once that grew."""
    if seen.own or context.now - max(seen.scatter.at, seen.since) < context.policy.pace.short:
        return seen
    counts = counts_for(seen.values, context.measured, "short", uids)
    if seen.arrivals_before and _grown(counts, seen.arrivals_before):
        seen = replace(seen, arrivals_before=0.0)
    return replace(seen, scatter=seen.scatter.with_cell(counts.failed, counts.judged, context.now))


def _grown(counts: Counts, before: float) -> bool:
    """True if more requests arrive than before, and not by chance."""
    expected = before * counts.replica_seconds
    chance = SIGNIFICANT * math.sqrt(OVERDISPERSION * expected)
    return counts.arrivals - expected > max(MORE_ARRIVALS * expected, chance)


def _failed(seen: Watch, counts: Counts) -> float:
    """E-value against "no more requests fail than before".

    An edit may alter how many are shed or late as well, as a shorter queue does. They count while no more
    requests arrive than before, and so many as arrive beyond that are the load's. A single burst is none
    either, so several intervals must have shown how much they vary.
    """
    before = Measure(FAULTS, seen.errors_before * seen.judged_before, seen.judged_before)
    now = Measure(FAULTS, counts.errors, counts.admitted)
    dispersion = overdispersion(seen.scatter_before, seen.scatter)
    if not seen.own and seen.scatter.count < MIN_INTERVALS:
        return 1.0
    if seen.arrivals_before:
        beyond = max(0.0, counts.arrivals - seen.arrivals_before * counts.replica_seconds)
        before = Measure(FAULTS, seen.scatter_before.bad, seen.scatter_before.of)
        now = Measure(FAULTS, max(0.0, counts.failed - beyond), counts.judged)
    return error_evidence(Arm({FAULTS: now}, now.of, dispersion=dispersion), Arm({FAULTS: before}, before.of))


def _harm(context: Context, draft: Draft, seen: Watch, why: str, evidence: Mapping[str, Any]) -> Draft:
    if not seen.own:
        summary = f"{format_changes(seen.values)}, the user's change, does harm: {why}."
        return draft.recorded(
            context,
            rule=seen.rule,
            outcome="Harmful",
            summary=summary,
            changes=seen.values,
            evidence=evidence,
        ).with_state(watch=None)
    return _take_back(context, draft, seen, why, evidence)


def _take_back(context: Context, draft: Draft, seen: Watch, why: str, evidence: Mapping[str, Any]) -> Draft:
    """Restore on all replicas what was before, and block the value."""
    for item in draft.state.expected:
        if item.id == seen.id:
            draft = record_result(context, draft, item, "it was taken back before its effect showed")
    leading, state = seen.values[0], draft.state
    back = tuple(KnobChange(item.knob, item.after, item.before) for item in seen.values)
    proposal = Proposal(seen.rule, back, "", 0.0, why)
    change = draft.new_change(context, proposal, canary=None, controls=(), restarts=0, verdict=TAKEN_BACK)
    draft = draft.with_state(
        watch=None,
        reversals=(*state.reversals, Reversal(leading.knob, context.now))[-MAX_REVERSALS:],
        blocked_values=(
            *state.blocked_values,
            BlockedValue(leading.knob, leading.after, context.now + DAY),
        )[-MAX_BLOCKED_VALUES:],
    )
    summary = f"{format_changes(seen.values)} was reverted ({evidence['verdict']}): {why}."
    return draft.recorded(
        context,
        id=seen.id,
        rule=seen.rule,
        outcome="Reverted",
        summary=summary,
        changes=seen.values,
        generation=change.generation,
        evidence=evidence,
    ).beginning(Phase.PROMOTE, replace(change, id=seen.id))
