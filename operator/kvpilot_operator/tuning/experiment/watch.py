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
from kvpilot_operator.tuning.assess.guards import DAY
from kvpilot_operator.tuning.context import Context, Draft, Proposal, format_changes
from kvpilot_operator.tuning.experiment.capacity_verdict import harm_below
from kvpilot_operator.tuning.experiment.ends import TAKEN_BACK
from kvpilot_operator.tuning.experiment.evidence import FAULTS, HARM_EVIDENCE, Arm, counts_for, error_evidence
from kvpilot_operator.tuning.experiment.start import errors_of, scatter_before
from kvpilot_operator.tuning.experiment.statistics import mixture_evidence, overdispersion
from kvpilot_operator.tuning.experiment.step_rate import as_loaded, difference, of_other_times, step_rate
from kvpilot_operator.tuning.experiment.verdict import EXPOSURE_LIMIT
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
        before = Measure(FAULTS, seen.errors_before * seen.judged_before, seen.judged_before)
        now = Measure(FAULTS, counts.errors, counts.admitted)
        rate = step_rate(counts, seen.values)
        found = difference(rate, seen.rate_before)
        dispersion = overdispersion(seen.scatter_before, Scatter())
        one, other = (Arm({FAULTS: item}, item.of, dispersion=dispersion) for item in (now, before))
        failed = error_evidence(one, other)
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
        scatter_before=scatter_before(context, changed),
    )


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
