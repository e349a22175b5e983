"""What ``kvpilot up`` wires together, in the process of a test: loop, real engines, router, and users."""

from __future__ import annotations

import asyncio
import copy
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp

from kvpilot_engine.contract import BLOCK_TOKENS
from kvpilot_operator.adapters.engine_admin import EngineAdmin
from kvpilot_operator.adapters.scrape_metrics import ScrapeMetrics
from kvpilot_operator.load.client import Client
from kvpilot_operator.load.text import text_of
from kvpilot_operator.load.workload import Ask
from kvpilot_operator.local.cluster import LocalCluster
from kvpilot_operator.local.router import Router
from kvpilot_operator.local.state import StateDirectory
from kvpilot_operator.loop import Look, Loop
from kvpilot_operator.spec.resolve import policy_of
from kvpilot_operator.tuning.decision import Record

PACE_SCALE = 0.4
"""Of the fast pace: windows of 4 and 24 s, the shortest that a scrape each second allows."""

LENIENT = {"p50Ms": 30_000, "p95Ms": 30_000, "p99Ms": 30_000}

HOST_PAGES = 'kvpilot_cached_pages{tier="host"}'


def manifest_of(config: Mapping[str, Any], **spec: Any) -> dict[str, Any]:
    """A resource whose objectives nothing breaches yet."""
    return {
        "apiVersion": "kvpilot.io/v1alpha1",
        "kind": "KVCacheDeployment",
        "metadata": {"name": "cured"},
        "spec": {
            "profile": "development",
            "objectives": {
                "latency": LENIENT,
                "throughput": {"target": 0},
                "hitRate": "0%",
                "memory": "99%",
                "errors": "50%",
            },
            "engine": {"config": {"dtype": "float32", "maxQueue": 5000, "requestTimeoutS": 300, **config}},
            "tuning": {"mode": "Auto", "pace": "Fast"},
            "rollout": {"drainSeconds": 1},
            **spec,
        },
    }


class Traffic:
    """Prompts that are new from their first token on, or the same few again and again."""

    def __init__(self, prompt_tokens: int, output_tokens: int, prompts: int | None = None) -> None:
        self._sizes = (prompt_tokens, output_tokens)
        self._prompts = prompts
        self._sent = 0
        self._random = random.Random(1)

    def ask(self) -> Ask:
        """The next request."""
        self._sent += 1
        key = self._sent if self._prompts is None else self._random.randrange(self._prompts)
        prompt, output = self._sizes
        return Ask(
            "/v1/completions", {"prompt": text_of(f"{key}", prompt), "max_tokens": output, "temperature": 0}
        )


class Deployment:
    """What ``kvpilot up`` wires together, in this process: the loop, real engines, the router before them."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.looks: list[Look] = []
        self.told: list[str] = []
        self._manifest = manifest
        self._state = StateDirectory(manifest["metadata"]["name"], directory)
        self._state.open()
        self._router = Router("127.0.0.1", 0)
        self._cluster = LocalCluster(
            manifest,
            self._state,
            on_event=lambda *event: self.told.append(": ".join(event)),
            on_backends=self._router.use,
            on_refused=lambda _, words: self.told.append(words),
            tell=self.told.append,
        )
        self._pace = policy_of(self._cluster.spec, PACE_SCALE).pace
        self._metrics = ScrapeMetrics(lambda: self._cluster.targets, self._pace.scrape)
        self._engines = EngineAdmin()
        self._loop = Loop(self._cluster, self._metrics, self._engines, pace_scale=PACE_SCALE, telemetry=self)
        self._looked = asyncio.Condition()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Client]:
        """With its engines ready, and a client of the router."""
        await self._router.start()
        await self._metrics.start()
        ticking = asyncio.create_task(self._tick())
        try:
            await self.until(lambda look: look.observation.ready, 100)
            async with Client(self._router.url, timeout_s=300) as client:
                await client.find_model()
                yield client
        finally:
            ticking.cancel()
            await asyncio.gather(ticking, return_exceptions=True)
            await self._cluster.replica_set.close(0.1)
            await self._metrics.close()
            await self._engines.close()
            await self._router.close()
            self._state.close()

    async def _tick(self) -> None:
        while True:
            began = time.monotonic()
            await self._loop.run_once(self._cluster.key)
            async with self._looked:
                self._looked.notify_all()
            await asyncio.sleep(max(0.1, self._pace.tick - (time.monotonic() - began)))

    def step(self, name: str, seconds: float) -> None:
        """Telemetry of the loop."""

    def looked(self, look: Look) -> None:
        """Telemetry of the loop."""
        self.looks.append(look)

    @property
    def records(self) -> list[Record]:
        """Everything that was decided."""
        return [record for look in self.looks for record in look.decision.records]

    def edit(self, **spec: Any) -> None:
        """Change the manifest, as a user would."""
        self._manifest = copy.deepcopy(self._manifest)
        self._manifest["spec"].update(spec)
        assert self._cluster.edit(self._manifest)

    async def until(self, true: Callable[[Look], object], seconds: float) -> Look:
        """The first look from now on that shows it."""
        try:
            async with asyncio.timeout(seconds), self._looked:
                while True:
                    await self._looked.wait()
                    if true(self.looks[-1]):
                        return self.looks[-1]
        except TimeoutError:
            raise AssertionError(f"not within {seconds:g} s; {self._account()}") from None

    async def recorded(self, outcome: str, seconds: float) -> Record:
        """The record of that outcome; any other end of a change fails at once."""
        unwanted = {"Reverted", "Aborted", "Recommended"} - {outcome}

        def seen(_: Look) -> bool:
            assert not unwanted & {record.outcome for record in self.records}, self._account()
            return outcome in {record.outcome for record in self.records}

        await self.until(seen, seconds)
        return next(record for record in self.records if record.outcome == outcome)

    async def host_blocks(self) -> int:
        """Blocks in the host tiers of all engines now."""
        blocks = 0.0
        async with aiohttp.ClientSession() as session:
            for target in self._cluster.replica_set.targets:
                async with session.get(target.url) as answer:
                    text = await answer.text()
                line = next(line for line in text.splitlines() if line.startswith(HOST_PAGES))
                blocks += float(line.split()[-1]) / (BLOCK_TOKENS // 16)
        return round(blocks)

    def _account(self) -> str:
        last = self.looks[-1].decision if self.looks else None
        lines = [record.summary for record in self.records] + self.told[-5:]
        if last is not None:
            lines += [f"{o.name} {o.state} {o.measured_short} {o.measured_long}" for o in last.objectives]
            lines += [f"{hold.reason}: {hold.message}" for hold in last.state.holds]
        return "\n".join(lines)


async def closed_loop(client: Client, traffic: Traffic, at_once: int, seconds: float) -> tuple[float, float]:
    """Completions/s and median latency (s) with so many requests in flight at all times."""
    end, taken = time.monotonic() + seconds, list[float]()

    async def one() -> None:
        while (began := time.monotonic()) < end:
            await client.send(traffic.ask())
            taken.append(time.monotonic() - began)

    await asyncio.gather(*(one() for _ in range(at_once)))
    return len(taken) / seconds, median(taken)


@asynccontextmanager
async def users(client: Client, traffic: Traffic, number: int) -> AsyncIterator[None]:
    """So many requests in flight for as long as the block; none may fail."""
    going_on = asyncio.create_task(closed_loop(client, traffic, number, 280))
    try:
        yield
        assert not going_on.done(), "a user has left"
    finally:
        going_on.cancel()
        await asyncio.gather(going_on, return_exceptions=True)
