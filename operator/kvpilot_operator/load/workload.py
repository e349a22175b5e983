"""What a load is made of: arrivals in time, each with a request that is written when it is due."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class LoadError(ValueError):
    """A load that cannot be sent: one line naming the option or line, its value and what is allowed."""


@dataclass(frozen=True)
class Ask:
    """One request as it is sent.

    Attributes:
        path: of the OpenAI API, e.g. ``/v1/chat/completions``.
        body: JSON body without ``model`` and ``stream``.
    """

    path: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Arrival:
    """One request of the schedule.

    Attributes:
        at: when it is sent, s from the start of the load; the server has no influence on it.
        phase: name of the phase it belongs to.
        ask: writes the request; called when it is due, since a chat's next turn contains the last answer.
        answered: takes the text of the answer.
    """

    at: float
    phase: str
    ask: Callable[[], Ask]
    answered: Callable[[str], None]


class Seen(Protocol):
    """What the load may know of the answers."""

    def calm(self) -> float:
        """Median latency of the answers so far, s; of the probes before the first one, 1 without any."""

    @property
    def in_flight(self) -> int:
        """Requests without an end yet."""


class Workload(Protocol):
    """A source of arrivals in order of time."""

    @property
    def title(self) -> str:
        """What it is, for people: one short line."""

    @property
    def seconds(self) -> float:
        """How long it sends."""

    @property
    def probes(self) -> Sequence[Ask]:
        """Requests to send one after another before it begins, to learn how long an answer takes."""

    def arrivals(self, seen: Seen) -> Iterator[Arrival]:
        """The schedule; what was seen sizes phases when they begin, never a single request."""


LONGEST_STEP_S = 60.0
"""How far ahead arrivals are computed, s."""


@dataclass(frozen=True)
class Phase:
    """A stretch of the load with one rate.

    Exactly one of ``rate`` (requests/s) and ``in_flight`` is given. ``in_flight`` sizes the rate to the
    machine: by Little's law, rate = in_flight / median latency of the answers before the phase, so it is the
    number of requests that would be in flight if answers went on taking as long as before.
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
        """Whether the rate depends on the machine."""
        return self.in_flight is not None

    def steps(self, seen: Seen, before: float = 0.0) -> Iterator[tuple[float, float]]:
        """Lengths (s) and rate (requests/s) of its steps: an endless phase is planned piece by piece.

        The rate ``before`` makes no difference to it.
        """
        rate = self.rate if self.in_flight is None else self.in_flight / seen.calm()
        assert rate is not None
        left = self.seconds
        while left > 0:
            yield min(left, LONGEST_STEP_S), rate
            left -= LONGEST_STEP_S


LASTING = 2
"""Steps in which requests pile up before that counts as the limit."""


@dataclass(frozen=True)
class Rise:
    """A load that rises until requests pile up, and stays there.

    It begins as ``in_flight`` of a Phase, but never below the rate before it: on a machine that has slowed
    down, answers that waited would size it to a fraction of that, and the limit would be out of reach. During
    ``ramp_s`` the rate grows by ``factor`` every ``step_s`` in which fewer than ``hurts`` requests are in
    flight; when it has hurt for two steps, which is no hiccup, it grows by ``beyond``, once. It thus finds
    the limit of the machine as it is now, and goes on at a constant rate, whatever happens to answers.
    """

    name: str
    seconds: float
    in_flight: float
    ramp_s: float = 60.0
    step_s: float = 4.0
    factor: float = 1.15
    hurts: int = 8
    beyond: float = 1.2
    sized: bool = True

    def steps(self, seen: Seen, before: float = 0.0) -> Iterator[tuple[float, float]]:
        """Lengths (s) and rates (requests/s) of its steps, after a phase that ended with ``before``."""
        left = self.seconds
        rate = max(before, self.in_flight / seen.calm())
        hurt = 0
        while left > self.step_s and self.seconds - left < self.ramp_s:
            yield self.step_s, rate
            left -= self.step_s
            if seen.in_flight < self.hurts:
                rate *= self.factor
                continue
            hurt += 1
            if hurt == LASTING:
                rate *= self.beyond
        while left > 0:
            yield min(left, LONGEST_STEP_S), rate
            left -= LONGEST_STEP_S


def poisson(rate: float, seconds: float, rng: random.Random) -> list[float]:
    """Arrival times of a Poisson process of ``rate`` per s within ``seconds``, s from its start."""
    times: list[float] = []
    at = rng.expovariate(rate)
    while at < seconds:
        times.append(at)
        at += rng.expovariate(rate)
    return times
