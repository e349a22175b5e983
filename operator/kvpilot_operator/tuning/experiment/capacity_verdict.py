"""Verdicts on changes of capacity (workers, batch, step tokens): as soon as the step rates prove them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.assess.objectives import MIN_JUDGED, backlog_gone
from kvpilot_operator.tuning.configuration import candidate, value
from kvpilot_operator.tuning.context import Context
from kvpilot_operator.tuning.experiment.evidence import (
    GAIN_EVIDENCE,
    HARM_ALLOWED,
    HARM_EVIDENCE,
    WORK,
    Arm,
    arm,
    error_evidence,
    errors_bounded,
)
from kvpilot_operator.tuning.experiment.statistics import Z95, mixture_evidence
from kvpilot_operator.tuning.experiment.step_rate import (
    as_loaded,
    corrected,
    difference,
    of_equal_prompts,
    of_other_times,
    step_rate,
)
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
from kvpilot_operator.tuning.observation import gauges_of
from kvpilot_operator.tuning.state import Change, Effect, KnobChange, StepRate

BETTER, WORSE = math.log(1.05), math.log(0.95)
"""Log ratios of step rates that a gain must exceed, and that harm falls below."""

LIKELY = 3.0
"""E-value of a gain that suffices once the verify time has shown the cure itself."""

SPARED = 0.15
"""Errors that are not excluded yet may be this share of the requests that miss the objective now."""

LONGER = 1.5
"""Work that takes so many times as long as on the controls, and exceeds its share of the limits, is harm."""


def judge_capacity(context: Context, change: Change) -> Verdict:
    """The verdict on a change of capacity."""
    elapsed = context.now - change.measured_from
    canary, control = arms(context, change)
    rates = step_rates(context, change)
    effect, real = _at_equal_prompts(change, rates), _as_it_is(change, rates)
    failed = error_evidence(canary, control)
    slower = 0.0
    if real is not None and as_loaded(*rates, change.values):
        slower = mixture_evidence(real, harm_below(change.ratio), above=False)
    evidence = _evidence(change, canary, control, effect, max(failed, slower))
    text = format_effect(change, canary, control, context.policy.objectives)

    def verdict(name: str, *, aborted: bool = False) -> Verdict:
        return Verdict(name, text, evidence, aborted)

    if max(failed, slower) >= HARM_EVIDENCE or _works_too_long(context, canary, control):
        return verdict(reasons.HARMFUL)
    if effect is not None and real is not None:
        if real.log_ratio >= BETTER and _proven(context, change, effect, (canary, control), elapsed):
            return verdict(reasons.PROMOTED)
        half = max(BETTER, GAIN_SHARE * _log(change.ratio))
        if not change.drained and mixture_evidence(effect, half, above=False) >= GAIN_EVIDENCE:
            return verdict(reasons.NO_GAIN)
    if (
        change.others
        and change.drained
        and elapsed >= context.policy.pace.long
        and _controls_well(context, change)
    ):
        return verdict(reasons.BREACH_GONE, aborted=True)
    return verdict(reasons.INCONCLUSIVE if overdue(context, change) else OPEN)


def harm_below(ratio: float) -> float:
    """Log ratio of step rates below which a change does harm: less than it leaves by its own prediction."""
    return WORSE + min(0.0, _log(ratio))


def capacity_effect(context: Context, change: Change) -> Effect | None:
    """Log ratio of the capacities that both arms showed for equal prompts, as far as the change makes it."""
    return _at_equal_prompts(change, step_rates(context, change))


def _at_equal_prompts(change: Change, rates: tuple[StepRate, StepRate]) -> Effect | None:
    found = of_equal_prompts(*rates)
    if found is None:
        return None
    return corrected(found, change.difference_before) if change.others else of_other_times(found)


def _as_it_is(change: Change, rates: tuple[StepRate, StepRate]) -> Effect | None:
    """The same with the prompts that each arm really computed: a change may cost hits, which is its harm."""
    found = difference(*rates)
    return None if found is None else corrected(found, change.difference_before if change.others else None)


def step_rates(context: Context, change: Change) -> tuple[StepRate, StepRate]:
    """Step rates of candidate and controls, or of what was before where there are none."""

    def rate(uids: frozenset[str]) -> StepRate:
        return step_rate(context.measured.counts("verify", uids), change.values, _curve(context))

    return rate(change.candidates), rate(change.others) if change.others else change.rate_before


def _curve(context: Context) -> Mapping[int, float] | None:
    return None if context.capacity is None else context.capacity.curve


def rates_before(
    context: Context, values: Sequence[KnobChange], canary: str, controls: frozenset[str]
) -> tuple[StepRate, Effect | None]:
    """Step rate of all replicas before a change, and what the two arms differ by; over the long window."""
    seen, curve = context.measured, _curve(context)
    one, other = (
        step_rate(seen.counts("long", uids), values, curve) for uids in (frozenset({canary}), controls)
    )
    return step_rate(seen.counts("long"), values, curve), of_equal_prompts(one, other) if controls else None


def load_is_elsewhere(context: Context, change: Change) -> bool:
    """True if the canary can show no more, since requests wait on the controls alone.

    This is the rule where clients wait for their answers and take turns among the replicas: the slower ones
    hold all of them, and the canary meets every objective with one request at a time.
    """
    late = context.now - change.measured_from >= context.policy.pace.verify
    if not (change.drained and late):
        return False
    canary, control = arms(context, change)
    effect = capacity_effect(context, change)
    not_slower = effect is not None and effect.log_ratio >= 0
    return (
        not_slower and _cured(context, change) and errors_bounded(canary, control, context.policy.objectives)
    )


def is_calm(context: Context, change: Change) -> bool:
    """True if the backlog of the candidate's replicas is gone: from then on demand limits their rate."""
    workers = value(candidate(context.config, change.values), "numWorkers")
    return _queues_short(context, change.candidates, workers)


def _proven(context: Context, change: Change, effect: Effect, sides: tuple[Arm, Arm], elapsed: float) -> bool:
    canary, control = sides
    wanted, verify = context.policy.objectives, context.policy.pace.verify
    allowed = max(HARM_ALLOWED, SPARED * (control.share(change.objective) or 0.0))
    if not errors_bounded(canary, control, wanted, allowed):
        return False
    gained = mixture_evidence(effect, BETTER)
    if gained >= GAIN_EVIDENCE:
        return True
    return gained >= LIKELY and elapsed >= verify and _cured(context, change)


def _cured(context: Context, change: Change) -> bool:
    """True if the short window shows the breach on the controls, and every objective met on the canary."""
    if not change.others:
        return False
    wanted = context.policy.objectives
    one = arm(context.measured, "short", change.candidates, wanted, change.values)
    other = arm(context.measured, "short", change.others, wanted, change.values)
    required = wanted.latency.get(change.objective)
    missed = required is not None and (other.share(change.objective) or 0.0) > 1 - required[1]
    return missed and one.judged >= MIN_JUDGED and met_by(one, change.objective, wanted)


def _controls_well(context: Context, change: Change) -> bool:
    """True if the controls meet every latency objective without the change, with nothing left to drain."""
    wanted = context.policy.objectives
    met = all(
        met_by(arm(context.measured, window, change.others, wanted, change.values), change.objective, wanted)
        for window in ("short", "long")
    )
    return met and _queues_short(context, change.others, value(context.config, "numWorkers"))


def _queues_short(context: Context, uids: frozenset[str], workers: int) -> bool:
    replicas = [replica for replica in context.ready if replica.uid in uids]
    waiting = sum(item.waiting for item in gauges_of(replicas))
    return backlog_gone(waiting, len(replicas), workers)


def _works_too_long(context: Context, canary: Arm, control: Arm) -> bool:
    now, before = canary.share(WORK), control.share(WORK)
    if now is None or before is None or canary.judged < MIN_JUDGED:
        return False
    return now > 2 * context.max_work_s and now > LONGER * before


def _log(ratio: float) -> float:
    return math.log(ratio) if ratio > 0 else 0.0


def _evidence(
    change: Change, canary: Arm, control: Arm, effect: Effect | None, harm: float
) -> dict[str, Any]:
    found: dict[str, Any] = {
        **format_arms(canary, control),
        "predictedRatio": round(change.ratio, 3),
        "ratio": None,
        "unproven": not change.controls,
    }
    if effect is None:
        return found
    reach = Z95 * math.sqrt(effect.variance)
    return found | {
        "ratio": round(math.exp(effect.log_ratio), 3),
        "ratioLow": round(math.exp(effect.log_ratio - reach), 3),
        "ratioHigh": round(math.exp(effect.log_ratio + reach), 3),
        "predictionError": round(math.exp(effect.log_ratio) / change.ratio - 1, 3) if change.ratio else None,
        "gainEValue": float(f"{mixture_evidence(effect, BETTER):.3g}"),
        "harmEValue": float(f"{harm:.3g}"),
    }
