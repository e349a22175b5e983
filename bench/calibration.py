"""Error of the simulated engine: its device is calibrated on some loads of a real engine, and plays others.

For the fit a few clients send their next request after each answer; the counters of the engine are read
before and after. The other loads come at random times, at shares of the capacity that the first fit says,
and the simulated engine plays the same requests at the same times. A shared machine is not as fast now as it
was a minute ago, so all loads take turns in many short rounds: the costs are fitted to all rounds together,
the speed of each round is that of its own fit, and latencies are pooled. Beside each error stands the noise
of the real engine itself: the same figure of its even rounds against that of its odd ones, which got the
same requests.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import itertools
import random
import sys
import time
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench import command, results, server
from bench.command import FAILED, CannotRunError
from kvpilot_engine.contract.metrics import EDGES_S
from kvpilot_operator.adapters.metrics.scrape import History, PageReader
from kvpilot_operator.adapters.metrics.series import sample_from
from kvpilot_operator.backtest.calibration import busy_of, calibrated
from kvpilot_operator.backtest.devices import Device, Work
from kvpilot_operator.backtest.engine import SimulatedEngine
from kvpilot_operator.backtest.model import SimulatedRequest
from kvpilot_operator.load.client import Client, RequestError
from kvpilot_operator.load.text import text_of
from kvpilot_operator.load.workload import LoadRequest, poisson
from kvpilot_operator.tuning.observation import Counts, Promoted

TARGET = 0.1
"""Largest error of p95, and of the share of requests within an edge."""

CONFIG: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "maxTokens": 32768,
    "maxStepTokens": 512,
    "numWorkers": 16,
    "batchSize": 16,
    "maxQueue": 5000,
    "requestTimeoutS": 300,
    "cacheStrategy": "lru",
    "hostMemoryMb": 0,
}
SIGMA = 0.4
"""Standard deviation of the log of the sizes of prompts and answers."""


@dataclass(frozen=True)
class Load:
    """Requests with so many own and shared prompt tokens and tokens of the answer, in the mean.

    ``use`` is the share of the capacity at which they come.
    """

    name: str
    use: float
    own: int
    out: int
    shared: int = 0

    def requests(self, device: Device, seconds: float, seed: int) -> list[SimulatedRequest]:
        """Poisson arrivals, in s from the start."""
        draw = random.Random(f"{seed} {self.name}")
        rate = self.use * device.capacity(Work(self.own, self.out, self.shared), CONFIG)
        return [self.request(draw, at) for at in poisson(rate, seconds, draw)]

    def request(self, draw: random.Random, at: float = 0.0) -> SimulatedRequest:
        """One with sizes at random."""
        own, out = (
            round(size * draw.lognormvariate(-(SIGMA**2) / 2, SIGMA)) for size in (self.own, self.out)
        )
        return SimulatedRequest(at, self.shared + max(8, own), self.shared, max(2, out))


FITTED: tuple[tuple[int, Load], ...] = (
    (1, Load("fit 1", 0.0, 64, 32)),
    (3, Load("fit 3", 0.0, 96, 24)),
    (6, Load("fit 6", 0.0, 48, 48)),
    (10, Load("fit 10", 0.0, 160, 24)),
    (2, Load("fit long", 0.0, 480, 8)),
    (4, Load("fit cached", 0.0, 32, 40, shared=160)),
)
"""Clients at a time, and what they send."""

HELD_OUT = (
    Load("half", 0.5, 96, 24),
    Load("70%", 0.7, 96, 24),
    Load("90%", 0.9, 96, 24),
    Load("cached", 0.7, 64, 24, shared=256),
)


class Server:
    """A running engine: requests in, counters out."""

    def __init__(self, url: str, client: Client) -> None:
        self._address, self._client = urlsplit(url), client
        self._reader, self._history = PageReader(), History()
        self._texts = itertools.count()

    def counters(self) -> None:
        """Read the metrics page."""
        connection = http.client.HTTPConnection(self._address.hostname or "", self._address.port, timeout=30)
        connection.request("GET", "/metrics")
        values = self._reader.read(connection.getresponse().read().decode())
        self._history.add(time.monotonic(), values)
        connection.close()

    def increase(self) -> Counts:
        """Of the counters between the last two readings."""
        seconds = self._history.times[-1] - self._history.times[-2]
        increases, covered = self._history.increase(seconds)
        found = sample_from({"w": increases}, self._history.gauges, {"w": covered}, 0.0, covered)
        return found.windows["w"]

    async def send(self, request: SimulatedRequest, prefix: str = "shared") -> SimulatedRequest:
        """Send one; returns it with the answer's length."""
        shared = int(request.cached)
        own = text_of(f"{random.random()} {next(self._texts)}", int(request.prompt) - shared)
        body = {"prompt": text_of(prefix, shared) + own, "max_tokens": int(request.out), "temperature": 0}
        try:
            answer = await self._client.send(LoadRequest("/v1/completions", body))
        except RequestError as error:
            raise CannotRunError(f"a request failed: {error}") from error
        return replace(request, out=float(max(1, answer.output_tokens)))

    async def fit(self, seconds: float, seed: int) -> list[Counts]:
        """What the engine counted in each load of the fit, of ``seconds`` each."""
        return [await self._closed(clients, load, seconds, seed) for clients, load in FITTED]

    async def _closed(self, clients: int, load: Load, seconds: float, seed: int) -> Counts:
        ends = time.monotonic() + seconds

        async def client(number: int) -> None:
            draw = random.Random(f"{seed} {load.name} {number}")
            while time.monotonic() < ends:
                await self.send(load.request(draw))

        self.counters()
        await asyncio.gather(*(client(number) for number in range(clients)))
        self.counters()
        return self.increase()

    async def play(
        self, requests: Sequence[SimulatedRequest]
    ) -> tuple[list[SimulatedRequest], list[float], Counts]:
        """The requests as they were sent and answered, their latencies (s), and what the engine counted."""
        self.counters()
        began = time.monotonic()

        async def one(request: SimulatedRequest) -> tuple[SimulatedRequest, float]:
            await asyncio.sleep(max(0.0, began + request.at - time.monotonic()))
            sent = time.monotonic()
            answered = await self.send(replace(request, at=sent - began))
            return answered, time.monotonic() - sent

        found = await asyncio.gather(*map(one, requests))
        self.counters()
        return [request for request, _ in found], [took for _, took in found], self.increase()


@dataclass(frozen=True)
class Round:
    """What was counted in the loads of the fit, and by load its requests, latencies (s) and counts."""

    fit: Sequence[Counts]
    played: Mapping[str, tuple[Sequence[SimulatedRequest], Sequence[float], Counts]]


async def measure(url: str, rounds: int, seconds: float, seed: int) -> list[Round]:
    """Play all loads in each round; the requests of two rounds in a row are the same.

    Raises:
        CannotRunError: a request failed, or the counters do not tell a device.
    """
    found = []
    async with Client(url) as client:
        try:
            await client.find_model()
        except RequestError as error:
            raise CannotRunError(str(error)) from error
        server = Server(url, client)
        await server.fit(seconds / 3, seed - 1)  # warms up what runs for the first time
        try:
            first = calibrated([window for part in "ab" for window in await server.fit(seconds / 3, seed)])
        except ValueError as error:
            raise CannotRunError(str(error)) from error
        for number in range(rounds):
            fit = await server.fit(seconds / 3, seed + number)
            played = {}
            for load in HELD_OUT:
                requests = load.requests(first, seconds, seed + number // 2)
                if load.shared:
                    await server.send(replace(requests[0], out=2.0))
                played[load.name] = await server.play(requests)
            found.append(Round(fit, played))
            print(f"round {number + 1} of {rounds}", flush=True)
    return found


def simulated(device: Device, slow: float, requests: Sequence[SimulatedRequest]) -> list[float]:
    """Latencies of a simulated engine whose steps take ``slow`` times those of the device, s."""
    engine = SimulatedEngine("u0", "chat-0", Promoted(1, CONFIG), device.model(), 0.0)
    engine.slow = slow
    engine.warm()
    engine.run(1e6, [replace(request) for request in sorted(requests, key=lambda request: request.at)])
    engine.meter()
    return [took for _, took, _ in engine.ended]


@dataclass(frozen=True)
class Latencies:
    """Of all requests, s in order."""

    ordered: Sequence[float]

    def at(self, share: float) -> float:
        """A percentile, s."""
        return results.percentile(self.ordered, share)

    def error(self, other: Latencies, share: float) -> float:
        """By how much a percentile is above that of others, as a share of theirs."""
        return self.at(share) / other.at(share) - 1.0

    def attainment_error(self, other: Latencies) -> float:
        """The largest difference of the share of requests within a published edge."""
        return max(abs(self._within(edge) - other._within(edge)) for edge in EDGES_S)

    def _within(self, edge: float) -> float:
        return bisect_right(self.ordered, edge) / len(self.ordered)


def figures_of(rounds: Sequence[Round]) -> dict[str, Any]:
    """Costs, and for each load latencies, errors and noise.

    Raises:
        CannotRunError: the counters do not tell a device.
    """
    try:
        device = calibrated([window for item in rounds for window in item.fit])
    except ValueError as error:
        raise CannotRunError(str(error)) from error
    speeds = [
        sum(window.busy_seconds for window in item.fit) / sum(busy_of(device, window) for window in item.fit)
        for item in rounds
    ]
    figures: dict[str, Any] = {
        "rounds": len(rounds),
        "step_ms": round(1e3 * device.base_s, 3),
        "row_ms": round(1e3 * device.row_s, 4),
        "prompt_token_ms": round(1e3 * device.prefill_s, 4),
        "attended_token_us": round(1e6 * device.context_s, 3),
        "attended_by_prompt_token_us": round(1e6 * device.attend_s, 4),
        "slowest_round": round(max(speeds), 2),
        "fastest_round": round(min(speeds), 2),
    }
    for name in rounds[0].played:
        played = [item.played[name] for item in rounds]
        real = [latencies for _, latencies, _ in played]
        pairs = zip(speeds, played, strict=True)
        model = _pooled(simulated(device, slow, requests) for slow, (requests, _, _) in pairs)
        measured, odd, even = _pooled(real), _pooled(real[::2]), _pooled(real[1::2])
        busy = sum(counts.busy_seconds for _, _, counts in played)
        wanted = sum(
            slow * busy_of(device, counts) for slow, (_, _, counts) in zip(speeds, played, strict=True)
        )
        figures[f"{name}: requests"] = len(measured.ordered)
        for share, title in ((0.5, "p50"), (0.95, "p95")):
            figures[f"{name}: {title}_ms"] = round(1e3 * measured.at(share), 1)
            figures[f"{name}: {title}_error"] = round(model.error(measured, share), 3)
            figures[f"{name}: {title}_noise"] = round(abs(even.error(odd, share)), 3)
        figures[f"{name}: attainment_error"] = round(model.attainment_error(measured), 3)
        figures[f"{name}: attainment_noise"] = round(even.attainment_error(odd), 3)
        figures[f"{name}: time_in_steps_error"] = round(wanted / busy - 1.0, 3)
    return figures


def _pooled(parts: Iterable[Sequence[float]]) -> Latencies:
    return Latencies(sorted(took for part in parts for took in part))


def main(argv: list[str] | None = None) -> int:
    """Write the figures; exit status 1 if an error of p95 or of attainment is above the target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="of a running server that does nothing else; default: start one")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load; a third for each fit")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=results.DIRECTORY)
    options = parser.parse_args(argv)
    if options.rounds < 2 or options.rounds % 2 or options.seconds < 3:
        parser.error("an even number of rounds and 3 s at least")
    with server.served(options.url, CONFIG) as url:
        rounds = asyncio.run(measure(url, options.rounds, options.seconds, options.seed))
    figures = figures_of(rounds)
    print(results.write("calibration", "Error of the simulated engine", figures, options.output).read_text())
    missed = [
        f"{name} {figures[name]:+.1%}"
        for name in figures
        if name.endswith(("p95_error", "attainment_error")) and abs(figures[name]) > TARGET
    ]
    if missed:
        print(f"calibration: FAILED: at most {TARGET:.0%} wanted: {', '.join(missed)}")
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(command.run("calibration", main))
