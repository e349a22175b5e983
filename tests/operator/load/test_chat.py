"""Chat load: seeded, with shared prefixes, and with a schedule that is independent of the server."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from dataclasses import dataclass

import pytest

from kvpilot_operator.load.chat import ChatShape, ChatWorkload
from kvpilot_operator.load.results import RequestResult, Tally
from kvpilot_operator.load.workload import Arrival, LoadError, LoadPhase, Rise, poisson


@dataclass
class Machine:
    """Reports an uncongested latency of ``latency`` s and a number of requests in flight."""

    latency: float = 1.0
    in_flight: int = 0

    def expected_latency(self) -> float:
        return self.latency


def arrivals(seed: int = 1, **shape: float) -> list[Arrival]:
    return list(
        ChatWorkload([LoadPhase("calm", 60, rate=5)], ChatShape(**shape), seed).arrivals(Machine())  # type: ignore[arg-type]
    )


def test_load_depends_only_on_the_seed() -> None:
    def asked(seed: int) -> list[tuple[float, object]]:
        return [(a.at, a.request().body) for a in arrivals(seed)]

    assert asked(3) == asked(3)
    assert asked(3) != asked(4)


def test_poisson_arrivals_have_the_rate_and_variance() -> None:
    times = poisson(20, 500, random.Random(5))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert len(times) == pytest.approx(10_000, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.05)


def test_session_continues_its_conversation() -> None:
    schedule = arrivals(turns=3, system_prompts=2)
    bodies = []
    for arrival in schedule:
        bodies.append(arrival.request().body)
        arrival.answered("said " + bodies[-1]["user"])
    by_session: dict[str, list[list[dict[str, str]]]] = {}
    for body in bodies:
        by_session.setdefault(body["user"], []).append(body["messages"])
    assert max(len(turns) for turns in by_session.values()) == 3
    for session, turns in by_session.items():
        for before, after in itertools.pairwise(turns):
            assert after[: len(before)] == before
            assert after[len(before)] == {"role": "assistant", "content": f"said {session}"}
    prompts = {turns[0][0]["content"] for turns in by_session.values()}
    assert len(prompts) == 2
    assert {len(prompt) for prompt in prompts} == {256}


def test_missing_answer_is_replaced_and_a_late_one_ignored() -> None:
    schedule = arrivals(turns=2, think_s=0)
    first = schedule[0].request().body
    second = next(a for a in schedule[1:] if a.request().body["user"] == first["user"])
    schedule[0].answered("too late")
    roles = [m["role"] for m in second.request().body["messages"]]
    assert roles[:4] == ["system", "user", "assistant", "user"]
    assert "too late" not in str(second.request().body)


def test_rate_of_a_phase_follows_the_measured_latency() -> None:
    workload = ChatWorkload([LoadPhase("calm", 50, rate=2), LoadPhase("rise", 50, in_flight=8)], seed=2)
    machine = Machine(1.0)
    seen: list[Arrival] = []
    for arrival in workload.arrivals(machine):
        seen.append(arrival)
        machine.latency = 0.5  # 8 in flight at 0.5 s each are 16 requests/s
    rise = [a for a in seen if a.phase == "rise"]
    assert len(rise) == pytest.approx(800, rel=0.15)
    assert min(a.at for a in rise) >= 50


def test_endless_load_is_planned_in_pieces() -> None:
    schedule = ChatWorkload([LoadPhase("chat", math.inf, rate=1)]).arrivals(Machine())
    times = [arrival.at for arrival in itertools.islice(schedule, 300)]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(300, rel=0.2)


def test_rise_stops_when_requests_queue_and_keeps_its_rate() -> None:
    rise = Rise("rise", 100, in_flight=1, ramp_s=60, step_s=10, factor=2, backlog=9, overload=1.5)
    machine = Machine(0.5)
    steps = []
    for index, step in enumerate(rise.steps(machine)):
        steps.append(step)
        machine.in_flight = (0, 9, 9, 20, 8, 20)[min(index, 5)]
    assert steps == [(10, 2), (10, 4), (10, 4), (10, 6), (10, 6), (10, 12), (40, 12)]


def test_rise_starts_at_least_at_the_rate_of_the_phase_before() -> None:
    slowed = Machine(1.0)
    phases = [LoadPhase("calm", 50, in_flight=4), Rise("rise", 50, in_flight=4, ramp_s=0)]
    seen: list[Arrival] = []
    for arrival in ChatWorkload(phases, seed=2).arrivals(slowed):
        seen.append(arrival)
        slowed.latency = 20.0  # most of it in a queue: 4 in flight would be a request in 5 s
    assert len([a for a in seen if a.phase == "rise"]) == pytest.approx(200, rel=0.2)
    assert next(Rise("rise", 50, in_flight=4).steps(Machine(0.5), before=4)) == (4, 8)


def test_rise_ends_after_its_duration_if_nothing_queues() -> None:
    rise = Rise("rise", 100, in_flight=1, ramp_s=30, step_s=10, factor=2)
    assert list(rise.steps(Machine(1.0))) == [(10, 1), (10, 2), (10, 4), (60, 8), (10, 8)]
    assert sum(seconds for seconds, _ in rise.steps(Machine(1.0))) == 100


def test_uncongested_latency_comes_from_the_probes_until_there_are_answers() -> None:
    tally = Tally(probed=[3.0, 1.0, 2.0])
    assert tally.expected_latency() == 2
    tally.results.append(RequestResult("calm", 0, 0, 0.5))
    assert tally.expected_latency() == 0.5
    assert Tally().expected_latency() == 1


@pytest.mark.parametrize(
    ("rate", "in_flight", "message"),
    [
        (None, None, "exactly one of rate and in_flight"),
        (1, 1, "exactly one of rate and in_flight"),
        (0, None, "rate must be above 0, got 0"),
        (float("inf"), None, "rate must be finite, got inf"),
    ],
)
def test_invalid_phase_is_refused(rate: float | None, in_flight: float | None, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        LoadPhase("x", 1, rate=rate, in_flight=in_flight)


@pytest.mark.parametrize("think", [-5.0, math.nan])
def test_invalid_think_time_is_refused(think: float) -> None:
    with pytest.raises(LoadError, match=f"think: must be at least 0, got {think:g}"):
        ChatShape(think_s=think)
