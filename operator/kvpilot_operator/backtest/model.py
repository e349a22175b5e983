"""What a simulated device, its cache and one request cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvpilot_engine.contract.metrics import ROW_BUCKETS
from kvpilot_operator.tuning.configuration import value


@dataclass(slots=True)
class SimulatedRequest:
    """One request, and where it is.

    Attributes:
        at: arrival, s since the epoch.
        prompt, cached: prompt tokens, and those of them that an infinite cache would serve.
        out: tokens of the answer.
        session: requests of one session go to one replica where the router is sticky.
        context: tokens that its row attends to in a step, in the mean over its steps.
        attending: time for what its prompt attends to, spread over its steps, s in each.
        admitted, rowed, first, ended: when it got a worker slot, a row, its first and its last token, s since
            the epoch.
    """

    at: float
    prompt: float
    cached: float
    out: float
    session: int = 0
    context: float = field(init=False, repr=False, compare=False)
    attending: float = field(init=False, repr=False, compare=False, default=0.0)
    admitted: float = field(init=False, repr=False, compare=False)
    rowed: float = field(init=False, repr=False, compare=False)
    first: float = field(init=False, repr=False, compare=False)
    ended: float = field(init=False, repr=False, compare=False)


@dataclass(frozen=True)
class Fault:
    """What a configuration really does, beyond what one expects of it.

    Attributes:
        above: it bites while one of these knobs (camelCase) is above its value here.
        slower: a step takes so many times as long.
        errors: share of the requests that fail.
        inert: what is above these values has no effect at all.
        broken_sessions: share of the sessions whose requests all fail, under any configuration.
    """

    above: Mapping[str, float] = field(default_factory=dict)
    slower: float = 1.0
    errors: float = 0.0
    inert: bool = False
    broken_sessions: float = 0.0

    def bites(self, config: Mapping[str, Any]) -> bool:
        """True if it does something under this configuration."""
        return any(value(config, knob) > limit for knob, limit in self.above.items())

    def breaks(self, session: int) -> bool:
        """True if all requests of that session fail."""
        return (session * 2246822519 + 374761393) % 2**32 < self.broken_sessions * 2**32

    def used(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration as the device really uses it."""
        if not self.inert:
            return dict(config)
        return {**config, **{knob: min(value(config, knob), limit) for knob, limit in self.above.items()}}


@dataclass(frozen=True)
class EngineModel:
    """What device and cache cost, by configuration (camelCase).

    Attributes:
        step_s: duration of a decode step by its rows, s.
        prefill_s: a prompt token that is not in the cache adds this to its step, s.
        context_s: each token that a decoding row attends to adds this to a step, s.
        attend_s: each token that a computed prompt token attends to adds this to its step, s.
        tokens, prompt: tokens of the answer and of the prompt, for a load that does not say them.
        marginal_gain: relative gain of throughput by one more row, by rows; None takes it from the curve.
        tax: added to each step, s.
        memory: share of the memory limit in use.
        tier_s: loading from slower tiers per request, s; ``decoding`` is the share of it in the codec.
        prefetched: blocks used and wasted per request.
        hits: share of the prompt tokens served from the cache; ``ceiling`` is that of an infinite cache.
        queue: requests that wait at most, more are shed; None takes ``maxQueue``.
        timeout: after which a request counts as timed out, s; None takes ``requestTimeoutS``.
        noise: standard deviation of the log of a replica's speed, which wanders within a minute.
        warm_requests: a replica's cache is cold until it has served so many requests.
        start_slope: the start-up measurement of the curve sees this share of the slope over rows.
        fault: planted into every engine.
    """

    step_s: Callable[[int], float] = lambda rows: 0.016 + 0.0008 * rows
    prefill_s: float = 0.0
    context_s: float = 0.0
    attend_s: float = 0.0
    tokens: float = 4.0
    prompt: float = 100.0
    marginal_gain: Callable[[int], float] | None = lambda rows: 0.9 if rows < 16 else 0.05
    tax: Callable[[Mapping[str, Any]], float] = lambda config: 0.0
    memory: Callable[[Mapping[str, Any]], float] = lambda config: 0.3
    tier_s: Callable[[Mapping[str, Any]], float] = lambda config: 0.0
    decoding: float = 0.0
    prefetched: Callable[[Mapping[str, Any]], tuple[float, float]] = lambda config: (0.0, 0.0)
    hits: Callable[[Mapping[str, Any]], float] = lambda config: 0.5
    ceiling: float = 0.8
    queue: int | None = None
    timeout: float | None = None
    noise: float = 0.0
    warm_requests: int = 0
    start_slope: float = 1.0
    fault: Fault = Fault()

    def request(self, at: float, session: int = 0) -> SimulatedRequest:
        """The request of a load that gives arrival times only."""
        return SimulatedRequest(at, self.prompt, self.prompt * self.ceiling, self.tokens, session)

    def started_curve(self) -> dict[int, float]:
        """The curve as it is measured at start-up, s by rows."""
        one = self.step_s(1)
        measured = ROW_BUCKETS[:6]
        return {rows: one + (self.step_s(rows) - one) * self.start_slope for rows in measured}
