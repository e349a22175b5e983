"""Loads: arrivals with their requests, in s since the start of a run."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvpilot_operator.backtest.model import SimulatedRequest

Rate = Callable[[float], float]
"""Requests/s by seconds since the start."""

MEMORY_S = 60.0
"""A synthetic rate wanders, and forgets within this time, s."""

OPEN_SESSIONS = 256
"""Sessions that may go on at a time."""

POOL = 4096
"""Drawn sizes of requests, relative to their session."""

SHUFFLE = 1 << 40
"""Its multiple of a uniform number chooses from the pool, whatever its leading digits have chosen."""

MIN_PROMPT, MIN_OUT = 16.0, 2.0
"""Tokens."""


@dataclass(frozen=True)
class Mix:
    """What requests are: log-normal sizes that belong to a session, and to the request itself.

    Attributes:
        prompt, out: mean tokens.
        cached: share of the prompt that an infinite cache would serve.
        turns: mean requests of a session.
        session_sigma, own_sigma: standard deviation of the log of a session's and of a request's size.
    """

    prompt: float = 256.0
    out: float = 16.0
    cached: float = 0.8
    turns: float = 4.0
    session_sigma: float = 0.3
    own_sigma: float = 0.25


def step(low: float, high: float, at: float) -> Rate:
    """``low``, and ``high`` from ``at`` s on."""
    return lambda t: low if t < at else high


def ramp(low: float, high: float, start: float, length: float) -> Rate:
    """A straight line from ``low`` to ``high`` within ``length`` s."""
    return lambda t: low + (high - low) * min(1.0, max(0.0, (t - start) / length))


def spike(low: float, high: float, at: float, length: float) -> Rate:
    """``high`` for ``length`` s."""
    return lambda t: high if at <= t < at + length else low


def sine(mean: float, swing: float, period: float) -> Rate:
    """A wave around ``mean`` that begins at its lowest; ``swing`` is a share of the mean."""
    return lambda t: mean * (1 - swing * math.cos(2 * math.pi * t / period))


def synthetic(
    rate: Rate, seconds: float, mix: Mix, seed: int, *, noise: float = 0.1
) -> Iterator[SimulatedRequest]:
    """Poisson arrivals at ``rate`` times a slow log-normal noise of standard deviation ``noise``."""
    draw = random.Random(f"{seed} arrivals")
    uniform, log, request = draw.random, math.log, _Sizes(mix, random.Random(f"{seed} sizes")).request
    keep = math.exp(-1 / MEMORY_S)
    wander = 0.0
    fresh = math.sqrt(1 - keep**2)
    for second in range(math.ceil(seconds)):
        wander = keep * wander + fresh * draw.gauss(0.0, 1.0)
        expected = max(0.0, rate(float(second))) * math.exp(noise * wander - noise**2 / 2)
        at, end = float(second), min(second + 1.0, seconds)
        while expected > 0:
            at -= log(1.0 - uniform()) / expected
            if at >= end:
                break
            yield request(at)


class _Sizes:
    """Draws requests: one opens a session with probability 1 / turns, else it goes on with an open one.

    Sizes come from a pool that is drawn once, and one number chooses all: a request must cost less to draw
    than to serve.
    """

    def __init__(self, mix: Mix, draw: random.Random) -> None:
        self._draw, self._opens = draw.random, 1 / mix.turns
        self._pool = [_own(mix, draw.gauss) for _ in range(POOL)]
        sigma = mix.session_sigma
        self._sizes = [math.exp(draw.gauss(-(sigma**2) / 2, sigma)) for _ in range(POOL)]
        self._open = list(enumerate(self._sizes[:OPEN_SESSIONS]))
        self._made = OPEN_SESSIONS

    def request(self, at: float) -> SimulatedRequest:
        number = self._draw()
        scaled = number * OPEN_SESSIONS
        place = int(scaled)
        other = int(number * SHUFFLE) % POOL
        if scaled - place < self._opens:
            self._open[place] = self._made, self._sizes[(other + self._made) % POOL]
            self._made += 1
        session, factor = self._open[place]
        prompt, out, cached = self._pool[other]
        prompt *= factor
        prompt = prompt if prompt > MIN_PROMPT else MIN_PROMPT
        out = float(int(out * factor + 0.5))
        return SimulatedRequest(at, prompt, prompt * cached, out if out > MIN_OUT else MIN_OUT, session)


def _own(mix: Mix, gauss: Callable[[float, float], float]) -> tuple[float, float, float]:
    """Prompt and answer of a request with a session of mean size, and the share that is cached."""
    sigma, shift = mix.own_sigma, mix.own_sigma**2 / 2
    cached = min(0.98, mix.cached * math.exp(gauss(0.0, 0.1)))
    prompt, out = (math.exp(gauss(-shift, sigma)) for _ in range(2))
    return mix.prompt * prompt, mix.out * out, cached
