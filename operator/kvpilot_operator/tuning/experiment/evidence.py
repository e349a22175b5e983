"""Measures of the two arms of an experiment, and the effect of a change on them.

What is compared has no memory of the load: errors, step rates, the time that single stages of work take, and
shares of tokens and blocks. Latencies are not compared: in a queue they are the sum of what came before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvpilot_engine.contract.metrics import Stage
from kvpilot_operator.tuning.configuration import LIMITS_LENGTH
from kvpilot_operator.tuning.experiment.statistics import OVERDISPERSION, harm_bound, log_evidence
from kvpilot_operator.tuning.observation import Counts, Observation, gauges_of
from kvpilot_operator.tuning.policy import Objectives
from kvpilot_operator.tuning.state import Effect, KnobChange, Measure, Tally

HARM_EVIDENCE = 50.0
"""E-value that rejects "the canary is no worse": at most 1 false alarm in 50 (Ville's inequality)."""

GAIN_EVIDENCE = 20.0
"""E-value that proves a gain, or that there is none worth having: at most 1 in 20 is wrong."""

HARM_ALLOWED = 0.05
"""Errors that the 95% bound leaves possible on the canary, in points, or a fifth of the objective if more."""

ERRORS, FAULTS, SECONDS, WORK, TIER_LOAD = "errors", "faults", "seconds", "work", "tierLoad"
MEMORY, MISSES, WASTE = "memory", "hitRate", "prefetchWaste"
CAPACITY = "capacity"

WORK_STAGES = (Stage.TIER_LOAD, Stage.PREFILL, Stage.DECODE, Stage.PREEMPTED)
"""Stages in which a request is in work; the others are waits, which the load makes."""

MIN_RATIO = 0.02
"""Floor of a ratio of two measures in logs: a complete cure must not be infinitely good."""

PRIOR_INTERVALS = 4.0
"""Weight, in intervals, of the variance that the counts alone imply against the one that is measured."""


@dataclass(frozen=True)
class Arm:
    """Measures of one arm by name, its judged requests, and the requests that were sent to it.

    ``dispersion``: how much more its failed requests vary than independent ones.
    """

    measures: Mapping[str, Measure]
    judged: float
    offered: float = 0.0
    dispersion: float = OVERDISPERSION

    def share(self, name: str) -> float | None:
        """Share of bad in that measure; None without it."""
        measure = self.measures.get(name)
        return None if measure is None else measure.share


def counts_for(
    values: Sequence[KnobChange], observation: Observation, window: str, uids: frozenset[str] | None = None
) -> Counts:
    """Counts of all ready replicas, or of those of ``uids``, as far as a change of ``values`` can alter them.

    Requests that are too large belong to it only if it changes how large they may be: else they are those of
    one client, whom a sticky router sends to one arm.
    """
    counts = observation.counts(window, uids)
    return counts if any(item.knob in LIMITS_LENGTH for item in values) else counts.of_any_length()


def arm(
    observation: Observation,
    window: str,
    uids: frozenset[str],
    wanted: Objectives,
    values: Sequence[KnobChange],
) -> Arm:
    """The arm that a window shows of some replicas, in an experiment with ``values``."""
    counts = counts_for(values, observation, window, uids)
    gauges = gauges_of(replica for replica in observation.ready if replica.uid in uids)
    memory = Measure(MEMORY, sum(gauge.memory_ratio for gauge in gauges), len(gauges))
    measured = {item.name: item for item in (*measures(counts, wanted), memory)}
    return Arm(measured, counts.judged, counts.arrivals)


def arm_of(stored: Sequence[Measure]) -> Arm:
    """The arm that a change without controls remembers."""
    known = {item.name: item for item in stored}
    return Arm(known, known[ERRORS].of if ERRORS in known else 0.0)


def measures(counts: Counts, wanted: Objectives) -> tuple[Measure, ...]:
    """Everything that is reported of an arm, lower is better; not what its runtime does not export.

    ``errors``: failed requests, as the objective counts them; ``faults``: those that failed by a fault of the
    engine, of the ones that were not shed, since an arm must not look better by what it refused.
    ``seconds``: mean time of successful requests; ``work``: the part of it in work.
    """
    judged = counts.judged
    within = [
        Measure(name, judged * (1 - (counts.attainment(wanted.signal, edge) or 0.0)), judged)
        for name, (edge, _) in wanted.latency.items()
        if counts.within(wanted.signal) is not None
    ]
    computed, looked_up, wasted = counts.computed, counts.query_tokens, counts.prefetch_wasted
    completed = counts.completed
    spent = counts.stage_seconds
    return (
        *within,
        Measure(ERRORS, counts.failed, judged),
        Measure(FAULTS, counts.errors, counts.admitted),
        Measure(SECONDS, sum(spent.values()), completed),
        Measure(WORK, sum(spent.get(stage, 0.0) for stage in WORK_STAGES), completed),
        Measure(TIER_LOAD, spent.get(Stage.TIER_LOAD, 0.0), completed),
        *([] if computed is None or looked_up is None else [Measure(MISSES, computed, looked_up)]),
        *([] if wasted is None else [Measure(WASTE, wasted, counts.ended)]),
    )


def compared(one: Arm, other: Arm, name: str) -> float | None:
    """ln(one / other) of a measure; None where an arm has nothing of it to divide by."""
    now, before = one.share(name), other.share(name)
    if now is None or not before:
        return None
    return math.log(max(now / before, MIN_RATIO))


def effect_of(
    tally: Tally, before: Effect | None, *, alone: bool = False, implied: float | None = None
) -> Effect | None:
    """The mean effect of the intervals, without what the arms differed by before; None without an interval.

    Its variance is that of the intervals about their mean, drawn with the weight of PRIOR_INTERVALS towards
    what independent but overdispersed requests would give.

    Args:
        alone: no controls: all intervals are compared with one that was before them, and scatters like them.
        implied: variance of one interval of what is no count of requests.
    """
    if not tally.count:
        return None
    if implied is None:
        implied = 2 * OVERDISPERSION * tally.count / max(tally.requests, 1.0)
    freedom = PRIOR_INTERVALS + tally.count - 1
    each = (PRIOR_INTERVALS * implied + tally.squares) / freedom
    found = Effect(tally.mean, each / tally.count + each * alone)
    if before is None:
        return found
    return Effect(found.log_ratio - before.log_ratio, found.variance + before.variance)


def error_evidence(canary: Arm, control: Arm) -> float:
    """E-value against "no more fail by a fault of the canary"; shed and late requests are the load's."""
    if FAULTS not in canary.measures or FAULTS not in control.measures:
        return 1.0
    one, other = canary.measures[FAULTS], control.measures[FAULTS]
    return math.exp(min(700.0, log_evidence(one, other, canary.dispersion)))


def errors_bounded(
    canary: Arm, control: Arm, wanted: Objectives, allowed: float = HARM_ALLOWED, measure: str = FAULTS
) -> bool:
    """True if the one-sided 95% bound of additional faults, or of all additional errors, is small."""
    if measure not in canary.measures or measure not in control.measures:
        return False
    bound = harm_bound(canary.measures[measure], control.measures[measure], canary.dispersion)
    return bound <= max(allowed, wanted.errors / 5)
