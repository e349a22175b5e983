"""Verdicts on all other changes: a measure of both arms, interval by interval, and memory as it is.

Each interval of a short window gives one difference of the arms. Their mean and their scatter are sufficient:
the state keeps them, and sessions, bursts and wandering machines are in the scatter, so nothing is assumed of
single requests. The verdict may be asked for after every interval.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.context import Context
from kvpilot_operator.tuning.experiment.capacity_verdict import harm_below
from kvpilot_operator.tuning.experiment.evidence import (
    GAIN_EVIDENCE,
    HARM_EVIDENCE,
    MEMORY,
    Arm,
    arm,
    compared,
    effect_of,
    error_evidence,
    errors_bounded,
    relative_fall,
)
from kvpilot_operator.tuning.experiment.statistics import OVERDISPERSION, Z95, mixture_evidence
from kvpilot_operator.tuning.experiment.step_rate import corrected, difference, step_rate
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
from kvpilot_operator.tuning.state import Change, Effect

BETTER = math.log(0.95)
"""Log ratio of the measure that a gain must fall below."""

HARM = math.log(1.1)
"""Log ratio of the measure above which a change does harm."""

MIN_INTERVALS = 3


def with_interval(context: Context, change: Change) -> Change:
    """The change with one more interval, once a whole short window has passed since the last one."""
    length = context.policy.pace.short
    last = change.tally.at or change.measured_from
    if context.now - last < length or change.measure == MEMORY:
        return change
    canary, control = arms(context, change, "short")
    found = compared(canary, control, change.measure)
    if found is None:
        return change
    sign = -1.0 if change.crossed_at else 1.0
    before = change.difference_before
    shift = 0.0 if before is None else sign * before.log_ratio
    least = min(canary.judged, control.judged) if change.others else canary.judged
    return replace(change, tally=change.tally.with_interval(found - shift, least, context.now))


def difference_before(context: Context, measure: str, canary: str, controls: frozenset[str]) -> Effect | None:
    """What the arms differ by in the long window before a change; None without controls or without data."""
    if not controls:
        return None
    wanted, seen = context.policy.objectives, context.measured
    one, other = (arm(seen, "long", uids, wanted) for uids in (frozenset({canary}), controls))
    found = compared(one, other, measure)
    least = min(one.judged, other.judged)
    return None if found is None or least <= 0 else Effect(found, 2 * OVERDISPERSION / least)


def judge_measure(context: Context, change: Change) -> Verdict:
    """The verdict by the intervals of a measure."""
    canary, control = arms(context, change)
    effect, failed = _effect(change), error_evidence(canary, control)
    slower = _capacity_lost(context, change)
    evidence = _evidence(change, canary, control, effect, max(failed, slower))
    wanted = context.policy.objectives
    text = format_effect(change, canary, control, wanted)

    def verdict(name: str, *, aborted: bool = False) -> Verdict:
        return Verdict(name, text, evidence, aborted)

    late = overdue(context, change)
    enough = effect is not None and change.tally.count >= MIN_INTERVALS
    worse = mixture_evidence(effect, HARM) if effect is not None and enough else 0.0
    if max(failed, slower, worse) >= HARM_EVIDENCE:
        return verdict(reasons.HARMFUL)
    if effect is None or not enough:
        return verdict(reasons.TOO_FEW_REQUESTS if late else OPEN, aborted=late)
    if change.others and met_by(control, change.objective, wanted) and _verified_long(context, change):
        return verdict(reasons.BREACH_GONE, aborted=True)
    gained = mixture_evidence(effect, BETTER, above=False) >= GAIN_EVIDENCE
    if gained and errors_bounded(canary, control, wanted):
        return verdict(reasons.PROMOTED)
    half = min(BETTER, math.log(max(1e-3, 1 - GAIN_SHARE * change.predicted_gain)))
    if mixture_evidence(effect, half) >= GAIN_EVIDENCE:
        return verdict(reasons.NO_GAIN)
    return verdict(reasons.INCONCLUSIVE if late else OPEN)


def judge_memory(context: Context, change: Change) -> Verdict:
    """The verdict on memory: the canary's against the controls', once it has had time to fall."""
    canary, control = arms(context, change)
    wanted, failed = context.policy.objectives, error_evidence(canary, control)
    fall = relative_fall(canary, control, MEMORY)
    evidence = {
        **format_arms(canary, control),
        "gain": None if fall is None else round(fall, 4),
        "predictedGain": round(change.predicted_gain, 4),
        "predictionError": None if fall is None else round(fall - change.predicted_gain, 4),
        "harmEValue": float(f"{failed:.3g}"),
        "unproven": not change.controls,
    }
    text = format_effect(change, canary, control, wanted)
    if failed >= HARM_EVIDENCE:
        return Verdict(reasons.HARMFUL, text, evidence)
    if fall is not None and fall >= GAIN_SHARE * change.predicted_gain:
        return Verdict(reasons.PROMOTED, text, evidence)
    if _verified_long(context, change):
        return Verdict(reasons.NO_GAIN, text, evidence)
    return Verdict(OPEN, text, evidence)


def _effect(change: Change) -> Effect | None:
    """What the intervals show; the difference before the change is out of each, its variance comes on top."""
    before = change.difference_before
    return effect_of(change.tally, None if before is None else Effect(0.0, before.variance))


def _verified_long(context: Context, change: Change) -> bool:
    return context.now - change.measured_from >= context.policy.pace.verify


def _capacity_lost(context: Context, change: Change) -> float:
    """E-value against "the candidate's replicas do as much work per second as the change leaves"."""
    if not change.others:
        return 0.0
    seen = context.measured
    one, other = (
        step_rate(seen.counts("verify", uids), change.values) for uids in (change.candidates, change.others)
    )
    found = difference(one, other)
    if found is None:
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
