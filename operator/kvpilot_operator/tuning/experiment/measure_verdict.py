"""Verdicts on all other changes: a measure of both arms, interval by interval, memory by its readings.

Each interval of a short window gives one difference of the arms. Their mean and their scatter are sufficient:
the state keeps them, and sessions, bursts and wandering machines are in the scatter, so nothing is assumed of
single requests. The verdict may be asked for after every interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.context import Context
from kvpilot_operator.tuning.experiment.capacity_verdict import harm_below, step_rates
from kvpilot_operator.tuning.experiment.evidence import (
    ERRORS,
    FAULTS,
    GAIN_EVIDENCE,
    HARM_EVIDENCE,
    MEMORY,
    SECONDS,
    WORK,
    Arm,
    arm,
    compared,
    counts_for,
    effect_of,
    error_evidence,
    errors_bounded,
)
from kvpilot_operator.tuning.experiment.statistics import OVERDISPERSION, Z95, mixture_evidence
from kvpilot_operator.tuning.experiment.step_rate import as_loaded, corrected, difference
from kvpilot_operator.tuning.experiment.verdict import (
    GAIN_SHARE,
    OPEN,
    Verdict,
    arms,
    format_arms,
    format_effect,
    met_by,
    overdue,
)
from kvpilot_operator.tuning.state import Change, Effect, KnobChange, Scatter, Tally

BETTER = math.log(0.95)
"""Log ratio of the measure that a gain must fall below."""

HARM = math.log(1.1)
"""Log ratio of the measure above which a change does harm."""

MIN_INTERVALS = 3

READING, AGREES = 0.02, 3.0
"""Standard deviation of the log ratio of two memory gauges, and by how many of them a reading may differ from
the mean. While memory falls or rises further, each begins a new row of readings."""

TIMES = frozenset({SECONDS, WORK})
"""Measures of whole requests. Any other may improve at the cost of the time in work, as a compression level
that holds more blocks and loads them more slowly, so that is compared beside it."""


def with_interval(context: Context, change: Change) -> Change:
    """The change with one more interval, once a whole short window has passed since the last one."""
    length = context.policy.pace.short
    last = max(change.tally.at, change.measured_from)  # a push began the measurement anew
    if context.now - last < length:
        return change
    canary, control = arms(context, change, "short")
    found = compared(canary, control, change.measure)
    if found is None:
        return change
    least = min(canary.judged, control.judged) if change.others else canary.judged

    def extended(tally: Tally, ratio: float, before: Effect | None) -> Tally:
        sign = -1.0 if change.crossed_at else 1.0
        shift = 0.0 if before is None else sign * before.log_ratio
        return tally.with_interval(ratio - shift, least, context.now)

    first = extended(Tally(), found, change.difference_before)
    if change.measure == MEMORY and abs(first.mean - change.tally.mean) > AGREES * READING:
        return replace(change, tally=first)
    change = replace(change, tally=extended(change.tally, found, change.difference_before))
    part = change.measure not in {*TIMES, MEMORY}
    longer = compared(canary, control, WORK) if change.others and part else None
    if longer is None:
        return change
    return replace(change, work=extended(change.work, longer, change.work_before))


def with_scatter(context: Context, change: Change) -> Change:
    """The change with the faults of one more long window; nothing is kept while nothing fails.

    Sessions are longer than a short window, and two cells that share one are not independent.
    """
    if context.now - max(change.scatter.at, change.measured_from) < context.policy.pace.long:
        return change
    since = with_cells(context, change.scatter, change.values, change.candidates)
    before = with_cells(context, change.scatter_before, change.values, change.others)
    return replace(change, scatter=since, scatter_before=before) if since.bad or before.bad else change


def with_cells(
    context: Context, scatter: Scatter, values: Sequence[KnobChange], uids: frozenset[str]
) -> Scatter:
    """The faults with those of each of the replicas in the long window."""
    for uid in sorted(uids):
        counts = counts_for(values, context.measured, "long", frozenset({uid}))
        scatter = scatter.with_cell(counts.errors, counts.admitted, context.now)
    return scatter


def difference_before(
    context: Context,
    measure: str,
    canary: str,
    controls: frozenset[str],
    values: Sequence[KnobChange],
) -> Effect | None:
    """What the arms differ by in the long window before a change; None without controls or without data."""
    if not controls:
        return None
    wanted, seen = context.policy.objectives, context.measured
    one, other = (arm(seen, "long", uids, wanted, values) for uids in (frozenset({canary}), controls))
    found = compared(one, other, measure)
    if measure == MEMORY:  # one reading
        return None if found is None else Effect(found, READING**2)
    least = min(one.judged, other.judged)
    return None if found is None or least <= 0 else Effect(found, 2 * OVERDISPERSION / least)


def judge_measure(context: Context, change: Change) -> Verdict:
    """The verdict by the intervals of a measure."""
    canary, control = arms(context, change)
    effect, failed = _effect(change, change.tally, change.difference_before), error_evidence(canary, control)
    known = change.work.count >= MIN_INTERVALS
    longer = _effect(change, change.work, change.work_before) if known else None
    slower = _capacity_lost(context, change)
    evidence = _evidence(change, canary, control, effect, max(failed, slower))
    wanted = context.policy.objectives
    text = format_effect(change, canary, control, wanted)

    def verdict(name: str, *, aborted: bool = False) -> Verdict:
        return Verdict(name, text, evidence, aborted)

    late = overdue(context, change)
    enough = effect is not None and change.tally.count >= MIN_INTERVALS
    worse = mixture_evidence(effect, HARM) if effect is not None and enough else 0.0
    lengthened = mixture_evidence(longer, HARM) if longer is not None and enough else 0.0
    if lengthened >= HARM_EVIDENCE:
        text += ", but requests are longer in work"
    if max(failed, slower, worse, lengthened) >= HARM_EVIDENCE:
        return verdict(reasons.HARMFUL)
    if effect is None or not enough:
        return verdict(reasons.TOO_FEW_REQUESTS if late else OPEN, aborted=late)
    if change.others and met_by(control, change.objective, wanted) and _verified_long(context, change):
        return verdict(reasons.BREACH_GONE, aborted=True)
    gained = mixture_evidence(effect, BETTER, above=False) >= GAIN_EVIDENCE
    harmless = longer is None or longer.log_ratio <= HARM
    harmless &= all(errors_bounded(canary, control, wanted, measure=name) for name in (FAULTS, ERRORS))
    if gained and harmless:
        return verdict(reasons.PROMOTED)
    if mixture_evidence(effect, min(BETTER, _asked(change))) >= GAIN_EVIDENCE:
        return verdict(reasons.NO_GAIN)
    return verdict(reasons.INCONCLUSIVE if late else OPEN)


def judge_memory(context: Context, change: Change) -> Verdict:
    """The verdict on memory: readings of the canary's against the controls' that agree."""
    canary, control = arms(context, change)
    wanted, failed = context.policy.objectives, error_evidence(canary, control)
    effect = _effect(change, change.tally, change.difference_before)
    evidence = _evidence(change, canary, control, effect, failed)
    text = format_effect(change, canary, control, wanted)
    if failed >= HARM_EVIDENCE:
        return Verdict(reasons.HARMFUL, text, evidence)
    asked = _asked(change)
    if effect is not None and effect.log_ratio <= asked:
        # A small cache frees little: half of what is asked for is enough to be sure of.
        sure = effect.log_ratio + Z95 * math.sqrt(effect.variance) <= max(BETTER, asked / 2)
        if sure and change.tally.count >= MIN_INTERVALS:
            return Verdict(reasons.PROMOTED, text, evidence)
        return Verdict(reasons.INCONCLUSIVE if overdue(context, change) else OPEN, text, evidence)
    if _verified_long(context, change):
        return Verdict(reasons.NO_GAIN, text, evidence)
    return Verdict(OPEN, text, evidence)


def _asked(change: Change) -> float:
    """Log ratio of the measure that is enough of what was predicted."""
    return math.log(max(1e-3, 1 - GAIN_SHARE * change.predicted_gain))


def _effect(change: Change, tally: Tally, before: Effect | None) -> Effect | None:
    """What the intervals show; the difference before the change is out of each, its variance comes on top."""
    known = None if before is None else Effect(0.0, before.variance)
    implied = READING**2 if change.measure == MEMORY else None
    return effect_of(tally, known, alone=not change.others, implied=implied)


def _verified_long(context: Context, change: Change) -> bool:
    return context.now - change.measured_from >= context.policy.pace.verify


def _capacity_lost(context: Context, change: Change) -> float:
    """E-value against "the candidate's replicas do as much work per second as the change leaves"."""
    if not change.others:
        return 0.0
    one, other = step_rates(context, change)
    found = difference(one, other)
    if found is None or not as_loaded(one, other, change.values):
        return 0.0
    return mixture_evidence(corrected(found, None), harm_below(change.ratio), above=False)


def _evidence(
    change: Change, canary: Arm, control: Arm, effect: Effect | None, harm: float
) -> dict[str, Any]:
    found: dict[str, Any] = {
        **format_arms(canary, control),
        "measure": change.measure,
        "intervals": change.tally.count,
        "gain": None,
        "predictedGain": round(change.predicted_gain, 4),
        "unproven": not change.controls,
    }
    if effect is None:
        return found | {"harmEValue": float(f"{harm:.3g}")}
    reach = Z95 * math.sqrt(effect.variance)
    gain = 1 - math.exp(effect.log_ratio)
    return found | {
        "gain": round(gain, 4),
        "gainLow": round(1 - math.exp(effect.log_ratio + reach), 4),
        "gainHigh": round(1 - math.exp(effect.log_ratio - reach), 4),
        "predictionError": round(gain - change.predicted_gain, 4),
        "gainEValue": float(f"{mixture_evidence(effect, BETTER, above=False):.3g}"),
        "harmEValue": float(f"{max(harm, mixture_evidence(effect, HARM)):.3g}"),
    }
