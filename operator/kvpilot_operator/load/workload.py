"""What a load is made of: arrivals in time, each with a request that is written when it is due."""

from __future__ import annotations

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

    def arrivals(self, calm_latency: Callable[[], float | None]) -> Iterator[Arrival]:
        """The schedule.

        Args:
            calm_latency: median latency of the answers so far, those of the probes before the first one, s.
        """


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

    def rate_now(self, calm_latency: float | None) -> float:
        """Requests/s, given the median latency so far (s)."""
        if self.rate is not None:
            return self.rate
        assert self.in_flight is not None
        return self.in_flight / max(calm_latency or 1.0, 0.01)


def poisson(rate: float, seconds: float, rng: random.Random) -> list[float]:
    """Arrival times of a Poisson process of ``rate`` per s within ``seconds``, s from its start."""
    times: list[float] = []
    at = rng.expovariate(rate)
    while at < seconds:
        times.append(at)
        at += rng.expovariate(rate)
    return times
