"""The parts of ``kvpilot up`` in the process of a test (reconciler, engines, router), and users."""

from __future__ import annotations

import asyncio
import copy
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp

from kvpilot_engine.contract import BLOCK_TOKENS
from kvpilot_operator.adapters.engines.kvpilot import EngineAdmin
from kvpilot_operator.adapters.metrics.scrape import ScrapeMetrics
from kvpilot_operator.load.client import Client
from kvpilot_operator.load.text import text_of
from kvpilot_operator.load.workload import LoadRequest
from kvpilot_operator.local.cluster import LocalCluster
from kvpilot_operator.local.state import StateDirectory
from kvpilot_operator.reconcile.reconciler import Reconciler, Reconciliation
from kvpilot_operator.resource.resolve import policy_of
from kvpilot_operator.router.proxy import Router
from kvpilot_operator.tuning.decision import Record

PACE_SCALE = 0.4
"""Factor on pace Fast: windows of 4 and 24 s, the shortest with a scrape each second."""

LENIENT = {"p50Ms": 30_000, "p95Ms": 30_000, "p99Ms": 30_000}

HOST_PAGES = 'kvpilot_cached_pages{tier="host"}'


def manifest_of(config: Mapping[str, Any], **spec: Any) -> dict[str, Any]:
    """A resource with objectives that no load breaches."""
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
    """Requests whose prompts share no prefix, or random ones of ``prompts`` fixed prompts."""

    def __init__(self, prompt_tokens: int, output_tokens: int, prompts: int | None = None) -> None:
        self._sizes = (prompt_tokens, output_tokens)
        self._prompts = prompts
        self._sent = 0
        self._random = random.Random(1)

    def request(self) -> LoadRequest:
        """The next request; deterministic."""
        self._sent += 1
        key = self._sent if self._prompts is None else self._random.randrange(self._prompts)
        prompt, output = self._sizes
        return LoadRequest(
            "/v1/completions", {"prompt": text_of(f"{key}", prompt), "max_tokens": output, "temperature": 0}
        )


class Deployment:
    """The parts of ``kvpilot up`` in this process: reconciler, engines and router."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.results: list[Reconciliation] = []
        self.reported: list[str] = []
        self._manifest = manifest
        self._state = StateDirectory(manifest["metadata"]["name"], directory)
        self._state.open()
        self._router = Router("127.0.0.1", 0)
        self._cluster = LocalCluster(
            manifest,
            self._state,
            on_event=lambda *event: self.reported.append(": ".join(event)),
            on_backends=self._router.use,
            on_refused=lambda _, words: self.reported.append(words),
            notify=self.reported.append,
        )
        self._pace = policy_of(self._cluster.spec, PACE_SCALE).pace
        self._metrics = ScrapeMetrics(lambda: self._cluster.targets, self._pace.scrape)
        self._engines = EngineAdmin()
        self._reconciler = Reconciler(
            self._cluster, self._metrics, self._engines, pace_scale=PACE_SCALE, telemetry=self
        )
        self._reconciled = asyncio.Condition()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Client]:
        """Run until the block ends; yields a client of the router once a replica is ready."""
        await self._router.start()
        await self._metrics.start()
        ticking = asyncio.create_task(self._tick())
        try:
            await self.until(lambda result: result.observation.ready, 200)
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
            await self._reconciler.run_once(self._cluster.key)
            async with self._reconciled:
                self._reconciled.notify_all()
            await asyncio.sleep(max(0.1, self._pace.tick - (time.monotonic() - began)))

    def step(self, name: str, seconds: float) -> None:
        """Ignore the duration of a step."""

    def reconciled(self, result: Reconciliation) -> None:
        """Keep the result of a reconcile."""
        self.results.append(result)

    @property
    def records(self) -> list[Record]:
        """All decision records, oldest first."""
        return [record for result in self.results for record in result.decision.records]

    def edit(self, **spec: Any) -> None:
        """Change the manifest, as a user would."""
        self._manifest = copy.deepcopy(self._manifest)
        self._manifest["spec"].update(spec)
        assert self._cluster.edit(self._manifest)

    async def until(self, condition: Callable[[Reconciliation], object], seconds: float) -> Reconciliation:
        """The first reconcile from now on for which ``condition`` holds; fails after ``seconds``."""
        try:
            async with asyncio.timeout(seconds), self._reconciled:
                while True:
                    await self._reconciled.wait()
                    if condition(self.results[-1]):
                        return self.results[-1]
        except TimeoutError:
            raise AssertionError(f"not within {seconds:g} s; {self._describe()}") from None

    async def recorded(self, outcome: str, seconds: float) -> Record:
        """The first record with that outcome; another end of a change fails at once."""
        unwanted = {"Reverted", "Aborted", "Recommended"} - {outcome}

        def seen(_: Reconciliation) -> bool:
            assert not unwanted & {record.outcome for record in self.records}, self._describe()
            return outcome in {record.outcome for record in self.records}

        await self.until(seen, seconds)
        return next(record for record in self.records if record.outcome == outcome)

    async def host_blocks(self) -> int:
        """Number of blocks in the host tiers of all replicas."""
        blocks = 0.0
        async with aiohttp.ClientSession() as session:
            for target in self._cluster.replica_set.targets:
                async with session.get(target.url) as answer:
                    text = await answer.text()
                line = next(line for line in text.splitlines() if line.startswith(HOST_PAGES))
                blocks += float(line.split()[-1]) / (BLOCK_TOKENS // 16)
        return round(blocks)

    def _describe(self) -> str:
        last = self.results[-1].decision if self.results else None
        lines = [f"{record.summary} {dict(record.evidence)}" for record in self.records]
        lines += self.reported[-5:]
        if last is not None:
            lines += [f"{o.name} {o.state} {o.measured_short} {o.measured_long}" for o in last.objectives]
            lines += [f"{hold.reason}: {hold.message}" for hold in last.state.holds]
        return "\n".join(lines)


async def closed_loop(client: Client, traffic: Traffic, at_once: int, seconds: float) -> tuple[float, float]:
    """Completions/s and median latency (s) with ``at_once`` requests in flight for ``seconds``."""
    end, taken = time.monotonic() + seconds, list[float]()

    async def one() -> None:
        while (began := time.monotonic()) < end:
            await client.send(traffic.request())
            taken.append(time.monotonic() - began)

    await asyncio.gather(*(one() for _ in range(at_once)))
    return len(taken) / seconds, median(taken)


@asynccontextmanager
async def users(client: Client, traffic: Traffic, number: int) -> AsyncIterator[None]:
    """``number`` requests in flight until the block ends; fails if a request fails."""
    loop = asyncio.create_task(closed_loop(client, traffic, number, math.inf))
    try:
        yield
        assert not loop.done(), "a request of a user failed"
    finally:
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)
