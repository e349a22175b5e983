"""A load is a schedule of arrivals; each request is written when it is due."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class LoadError(ValueError):
    """An invalid load: one line with the parameter or trace line, the value and what is allowed."""


@dataclass(frozen=True)
class LoadRequest:
    """One request of the OpenAI API.

    Attributes:
        path: e.g. ``/v1/chat/completions``.
        body: JSON body without ``model`` and ``stream``.
    """

    path: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Arrival:
    """One request of the schedule.

    Attributes:
        at: when it is sent, s from the start of the load, whatever the server does.
        phase: name of its phase.
        request: writes the request; called when it is due, because a chat turn contains the last answer.
        answered: receives the text of the answer.
    """

    at: float
    phase: str
    request: Callable[[], LoadRequest]
    answered: Callable[[str], None]


class LoadFeedback(Protocol):
    """Measurements of the running load that may size its later phases."""

    def expected_latency(self) -> float:
        """Median latency of the answers so far, s; before the first, of the probes; 1 without either."""

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""


class Workload(Protocol):
    """A source of arrivals in order of time."""

    @property
    def title(self) -> str:
        """One short line that describes the load."""

    @property
    def seconds(self) -> float:
        """How long requests are sent, s."""

    @property
    def probes(self) -> Sequence[LoadRequest]:
        """Requests that are sent one by one before the load, to measure the latency of one answer."""

    def arrivals(self, feedback: LoadFeedback) -> Iterator[Arrival]:
        """The schedule; the feedback may set the rate of a phase or step, never the time of one request."""


MAX_STEP_S = 60.0
"""Arrivals are computed at most this far ahead, s."""


@dataclass(frozen=True)
class LoadPhase:
    """A part of the load with a constant rate.

    Exactly one of ``rate`` (requests/s) and ``in_flight`` is given. ``in_flight`` sizes the rate to the
    machine by Little's law: rate = in_flight / median latency before the phase. It is the number of requests
    in flight as long as the latency stays the same.
    """

    name: str
    seconds: float
    rate: float | None = None
    in_flight: float | None = None

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.in_flight is None):
            raise LoadError(f"phase {self.name}: exactly one of rate and in_flight must be given")
        for name in ("seconds", "rate", "in_flight"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise LoadError(f"phase {self.name}: {name} must be above 0, got {value}")
        for name in ("rate", "in_flight"):
            if getattr(self, name) == math.inf:
                raise LoadError(f"phase {self.name}: {name} must be finite, got inf")

    @property
    def sized(self) -> bool:
        """True if the rate depends on the latency of the machine."""
        return self.in_flight is not None

    def steps(self, feedback: LoadFeedback, before: float = 0.0) -> Iterator[tuple[float, float]]:
        """Length (s) and rate (requests/s) of each step; ``before``, the previous rate, is not used."""
        rate = self.rate if self.in_flight is None else self.in_flight / feedback.expected_latency()
        assert rate is not None
        left = self.seconds
        while left > 0:
            yield min(left, MAX_STEP_S), rate
            left -= MAX_STEP_S


SATURATED_STEPS = 2
"""Steps with a backlog after which the machine counts as saturated; one may be a hiccup."""


@dataclass(frozen=True)
class Rise:
    """A load that rises until the machine is saturated, and then stays constant.

    The first rate is sized as by ``LoadPhase.in_flight``, but is at least the previous rate: a machine that
    has slowed down would otherwise get a rate too low to reach saturation. During ``ramp_s`` the rate grows
    by ``factor`` after each ``step_s`` with fewer than ``backlog`` requests in flight. After
    `SATURATED_STEPS` steps with more it grows once more, by ``overload``.
    """

    name: str
    seconds: float
    in_flight: float
    ramp_s: float = 60.0
    step_s: float = 4.0
    factor: float = 1.15
    backlog: int = 8
    overload: float = 1.2
    sized: bool = True

    def steps(self, feedback: LoadFeedback, before: float = 0.0) -> Iterator[tuple[float, float]]:
        """Length (s) and rate (requests/s) of each step; ``before`` is the previous rate."""
        left = self.seconds
        rate = max(before, self.in_flight / feedback.expected_latency())
        saturated = 0
        while left > self.step_s and self.seconds - left < self.ramp_s:
            yield self.step_s, rate
            left -= self.step_s
            if feedback.in_flight < self.backlog:
                rate *= self.factor
                continue
            saturated += 1
            if saturated == SATURATED_STEPS:
                rate *= self.overload
        while left > 0:
            yield min(left, MAX_STEP_S), rate
            left -= MAX_STEP_S


def poisson(rate: float, seconds: float, rng: random.Random) -> list[float]:
    """Arrival times of a Poisson process with ``rate`` events/s over ``seconds``, s from its start."""
    times: list[float] = []
    at = rng.expovariate(rate)
    while at < seconds:
        times.append(at)
        at += rng.expovariate(rate)
    return times
