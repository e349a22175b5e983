"""Statistics of two arms: evidence of harm, and bounds of it. Pure functions of counts.

Unit: the request. Requests of one session hang together, so counts are divided by their overdispersion.
"""

from __future__ import annotations

import math

from kvpilot_operator.tuning.state import Effect, Measure, Scatter

OVERDISPERSION = 2.0
"""How much more a count varies than independent requests would, at least."""

FAILING_SESSIONS, PRIOR_CELLS = 6.0, 4.0
"""Overdispersion where whole sessions of a few requests fail, and how many cells weigh as much as it."""

Z95 = 1.645

EFFECT_SCALE = 0.5
"""Scale of the log ratios that are looked for."""


def overdispersion(before: Scatter, since: Scatter) -> float:
    """How much more failed requests vary than independent ones; OVERDISPERSION at least.

    Cells of each of the two should be alike. A few of them show it badly, so what fails without the change
    counts as FAILING_SESSIONS at first.
    """
    known = [group for group in (before, since) if 0 < group.bad < group.of]
    prior = PRIOR_CELLS if before.bad else 0.0
    freedom = prior + sum(group.count - 1 for group in known)
    squares = prior * FAILING_SESSIONS + sum(group.chi_square for group in known)
    return max(OVERDISPERSION, squares / max(freedom, 1.0))


def log_evidence(canary: Measure, control: Measure, dispersion: float = OVERDISPERSION) -> float:
    """Log of the Bayes factor of "bad requests fall on the canary more often than its share of requests".

    With k bad requests on the canary, n in both arms, t0 the canary's share of requests and a = b = 1/2::

        B(a + k, b + n - k) - B(a, b) + ln[P_post(t > t0) / P_prior(t > t0)] - k ln t0 - (n - k) ln(1 - t0)

    B is the log beta function; the prior is cut to t > t0. A one-sided beta-binomial mixture (Howard et al.
    2021, Ann. Statist. 49(2)): valid at any time, however often it is looked at. 0 without two arms.
    """
    if canary.of <= 0 or control.of <= 0:
        return 0.0
    a = b = 0.5
    k = canary.bad / dispersion
    others = control.bad / dispersion
    t0 = canary.of / (canary.of + control.of)
    shift = log_beta_tail(t0, a + k, b + others) - log_beta_tail(t0, a, b)
    return (
        _log_beta(a + k, b + others) - _log_beta(a, b) + shift - k * math.log(t0) - others * math.log(1 - t0)
    )


def mixture_evidence(effect: Effect, bound: float, *, above: bool = True) -> float:
    """E-value against "the log ratio is at most ``bound``" (``above``), or "at least ``bound``" (not above).

    With d the log ratio, v its variance, s = EFFECT_SCALE, S = (d - bound) / v and I = 1 / v::

        E = 2 / sqrt(1 + s^2 I) x exp(s^2 S^2 / (2 (1 + s^2 I))) x Phi(s S / sqrt(1 + s^2 I))

    A one-sided normal mixture (Robbins 1970; Howard et al. 2021, Ann. Statist. 49(2)): it may be computed
    after every scrape, and P(ever E >= 1/a) <= a.
    """
    shift = effect.log_ratio - bound if above else bound - effect.log_ratio
    information = 1 / max(effect.variance, 1e-9)
    spread = 1 + EFFECT_SCALE**2 * information
    score = EFFECT_SCALE * shift * information / math.sqrt(spread)
    tail = 0.5 * math.erfc(-score / math.sqrt(2))
    return 2 / math.sqrt(spread) * math.exp(min(600.0, score * score / 2)) * tail


def harm_bound(canary: Measure, control: Measure, dispersion: float = OVERDISPERSION) -> float:
    """Upper 95% bound of (share of bad requests on the canary - on the controls).

    Normal approximation with one success and one failure added to each arm (Agresti and Caffo 2000).
    """
    (p, n), (q, m) = _smoothed(canary, dispersion), _smoothed(control, dispersion)
    return p - q + Z95 * math.sqrt(p * (1 - p) / n + q * (1 - q) / m)


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


def _smoothed(measure: Measure, dispersion: float) -> tuple[float, float]:
    n = measure.of / dispersion + 2
    return (measure.bad / dispersion + 1) / n, n
