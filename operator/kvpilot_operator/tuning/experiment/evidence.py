"""Evidence for and against a change: the measures of two arms, and what they prove.

Unit: the request. Requests of one session hang together, so counts are divided by ``OVERDISPERSION``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvpilot_operator.tuning.diagnosis import stage_shares
from kvpilot_operator.tuning.objectives import FEW
from kvpilot_operator.tuning.observation import Counts, Observation
from kvpilot_operator.tuning.policy import Objectives
from kvpilot_operator.tuning.state import Measure

OVERDISPERSION = 2.0
"""How much more a count varies than independent requests would."""

HARM_EVIDENCE = 50.0
"""E-value at which the null "the canary is no worse" is given up; at most 1 false alarm in 50 (Ville)."""

HARM_ALLOWED = 0.05
"""The one-sided 95% bound of harm must be within 5 points, or a fifth of what the objective lets miss."""

Z95 = 1.645

SECONDS, MEMORY, MISSES, WASTE = "seconds", "memory", "hitRate", "prefetchWaste"


@dataclass(frozen=True)
class Arm:
    """Measures of one side by name, its judged requests, and those that were sent to it."""

    measures: Mapping[str, Measure]
    judged: float
    offered: float = 0.0

    def share(self, name: str) -> float | None:
        """How bad the arm was in that respect."""
        measure = self.measures.get(name)
        return None if measure is None else measure.share


def arm(observation: Observation, window: str, uids: frozenset[str], wanted: Objectives) -> Arm:
    """What a window says about some pods."""
    counts = observation.counts(window, uids)
    gauges = [pod.sample.gauges for pod in observation.ready if pod.sample is not None and pod.uid in uids]
    memory = Measure(MEMORY, sum(gauge.memory_ratio for gauge in gauges), len(gauges))
    measured = {item.name: item for item in (*measures(counts, wanted), memory)}
    return Arm(measured, counts.judged, counts.arrivals)


def arm_of(stored: Sequence[Measure]) -> Arm:
    """The arm that a before/after change remembers."""
    known = {item.name: item for item in stored}
    return Arm(known, known["errors"].of if "errors" in known else 0.0)


def measures(counts: Counts, wanted: Objectives) -> tuple[Measure, ...]:
    """Everything that is compared, lower is better: what objectives judge, then what single rules cure.

    ``seconds``: mean request time over the stages of the signal; shed requests spend none and do not count.
    """
    judged = counts.judged
    within = [
        Measure(name, judged * (1 - (counts.attainment(wanted.signal, edge) or 0.0)), judged)
        for name, (edge, _) in wanted.latency.items()
    ]
    ended = judged - counts.outcomes.get("shed", 0.0)
    seconds = sum(item.seconds for item in stage_shares(counts, wanted.signal)) * judged
    return (
        *within,
        Measure("errors", counts.failed, judged),
        Measure(SECONDS, seconds, ended),
        Measure(MISSES, counts.query_tokens - counts.hit_tokens, counts.query_tokens),
        Measure(WASTE, counts.prefetch_wasted, judged),
    )


def exposed(side: Arm, least: int) -> bool:
    """True when a side has been shown enough requests.

    An overloaded control ends few of the requests that it is sent; that it was sent enough, and that some
    ended, must do, or the worst breaches could never be cured.
    """
    return side.judged >= least or (side.offered >= least and side.judged >= FEW)


def judged_names(wanted: Objectives) -> tuple[str, ...]:
    """Measures that count bad requests, so that harm can be tested on them."""
    return (*wanted.latency, "errors")


def harm_evidence(canary: Arm, control: Arm, wanted: Objectives) -> float:
    """E-value against "the canary is no worse": the mean over all objectives, which is an E-value again."""
    names = [name for name in judged_names(wanted) if name in canary.measures and name in control.measures]
    logs = [log_evidence(canary.measures[name], control.measures[name]) for name in names]
    if not logs:
        return 1.0
    top = max(logs)
    return math.exp(min(700.0, top + math.log(sum(math.exp(item - top) for item in logs) / len(logs))))


def log_evidence(canary: Measure, control: Measure) -> float:
    """Log of the Bayes factor of "bad requests fall on the canary more often than its share of requests".

    With k bad requests on the canary, n in both arms, t0 the canary's share of requests and a = b = 1/2::

        B(a + k, b + n - k) - B(a, b) + ln[P_post(t > t0) / P_prior(t > t0)] - k ln t0 - (n - k) ln(1 - t0)

    B is the log beta function; the prior is cut to t > t0. Source: the tuner's control notes (safe,
    anytime-valid two-sample test by a truncated Beta mixture). 0 without two arms.
    """
    if canary.of <= 0 or control.of <= 0:
        return 0.0
    a = b = 0.5
    k = canary.bad / OVERDISPERSION
    others = control.bad / OVERDISPERSION
    t0 = canary.of / (canary.of + control.of)
    shift = log_beta_tail(t0, a + k, b + others) - log_beta_tail(t0, a, b)
    return (
        _log_beta(a + k, b + others) - _log_beta(a, b) + shift - k * math.log(t0) - others * math.log(1 - t0)
    )


def harmless(canary: Arm, control: Arm, wanted: Objectives) -> bool:
    """True when the one-sided 95% bound of harm is small for every objective."""
    return all(
        harm_bound(canary.measures[name], control.measures[name]) <= allowed
        for name, allowed in _allowances(wanted).items()
        if name in canary.measures and name in control.measures
    )


def harm_bound(canary: Measure, control: Measure) -> float:
    """Upper 95% bound of (share of bad requests on the canary - on the controls).

    Normal approximation with one success and one failure added to each arm (Agresti and Caffo 2000).
    """
    (p, n), (q, m) = _smoothed(canary), _smoothed(control)
    return p - q + Z95 * math.sqrt(p * (1 - p) / n + q * (1 - q) / m)


def gain(canary: Arm, control: Arm, objective: str) -> float | None:
    """Relative fall of what the change shall cure; None without a measurement of both arms.

    For objectives that requests feel: of the share of bad requests, or of mean request time where that fell
    further, since a first step may halve a wait and still miss the edge.
    """
    own = relative_fall(canary, control, objective)
    if objective in {MEMORY, MISSES, WASTE}:
        return own
    found = [item for item in (own, relative_fall(canary, control, SECONDS)) if item is not None]
    return max(found, default=None)


def relative_fall(canary: Arm, control: Arm, name: str) -> float | None:
    """1 - canary / control."""
    now, before = canary.share(name), control.share(name)
    return 1 - now / before if now is not None and before else None


def log_beta_tail(x: float, a: float, b: float) -> float:
    """ln P(t > x) of a Beta(a, b), by its continued fraction (Numerical Recipes, 6.4).

    In logs throughout: with a thousand requests the tail is far below the smallest float.
    """
    if x <= 0.0:
        return 0.0
    if x >= 1.0:
        return -math.inf
    front = a * math.log(x) + b * math.log(1 - x) - _log_beta(a, b)
    if x < (a + 1) / (a + b + 2):
        return math.log1p(-math.exp(front) * _fraction(x, a, b) / a)
    return front + math.log(_fraction(1 - x, b, a) / b)


def _fraction(x: float, a: float, b: float) -> float:
    """Lentz's method for the continued fraction of the incomplete beta function."""
    tiny = 1e-30
    c, d = 1.0, 1 - (a + b) * x / (a + 1)
    d = 1 / (d if abs(d) > tiny else tiny)
    result = d
    for m in range(1, 400):
        for factor in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 + factor * d
            d = 1 / (d if abs(d) > tiny else tiny)
            c = 1 + factor / c
            c = c if abs(c) > tiny else tiny
            result *= d * c
        if abs(d * c - 1) < 1e-10:
            break
    return result


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _smoothed(measure: Measure) -> tuple[float, float]:
    n = measure.of / OVERDISPERSION + 2
    return (measure.bad / OVERDISPERSION + 1) / n, n


def _allowances(wanted: Objectives) -> dict[str, float]:
    misses = {name: 1 - required for name, (_, required) in wanted.latency.items()} | {
        "errors": wanted.errors
    }
    return {name: max(HARM_ALLOWED, missed / 5) for name, missed in misses.items()}
