"""Rules on real engines: something is broken by real load, a rule finds it, and what it does cures it.

No figure of the machine is assumed: limits follow what the engines were measured to do, and where latency is
judged, users who ask again once they are answered keep queues as long on a fast machine as on a slow one.
"""

from __future__ import annotations

import asyncio
import copy
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import pytest

from kvpilot_engine.contract import BLOCK_TOKENS, codec_rung
from kvpilot_engine.contract.metrics import EDGES_S, Stage
from kvpilot_operator.adapters.engine_admin import EngineAdmin
from kvpilot_operator.adapters.scrape_metrics import ScrapeMetrics
from kvpilot_operator.load.client import Client
from kvpilot_operator.load.runner import LoadRun
from kvpilot_operator.load.text import text_of
from kvpilot_operator.load.workload import Arrival, Ask
from kvpilot_operator.local.cluster import LocalCluster
from kvpilot_operator.local.router import Router
from kvpilot_operator.local.state import StateDirectory
from kvpilot_operator.loop import Look, Loop
from kvpilot_operator.spec.resolve import policy_of
from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.decision import Record
from kvpilot_operator.tuning.observation import Gauges

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PACE_SCALE = 0.4
"""Of the fast pace: windows of 4 and 24 s, the shortest that a scrape each second allows."""

LENIENT = {"p50Ms": 30_000, "p95Ms": 30_000, "p99Ms": 30_000}
MIB = 1 << 20
LIMIT = 1 << 30
"""Memory limit of the engines, bytes: about twice what one of the built-in model takes."""


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


def edge_above(seconds: float) -> int:
    """The first published edge at or above ``seconds``, ms."""
    return round(1000 * next(edge for edge in EDGES_S if edge >= seconds))


class Traffic:
    """Poisson arrivals at a rate that may change at any time; every prompt is new from its first token on."""

    title, seconds, probes = "rising", float("inf"), ()

    def __init__(self, prompt_tokens: int, output_tokens: int) -> None:
        self.rate = 0.0
        self._sizes = (prompt_tokens, output_tokens)
        self._sent = 0

    def ask(self) -> Ask:
        """The next request."""
        self._sent += 1
        prompt, output = self._sizes
        text = text_of(f"{self._sent}", prompt)
        return Ask("/v1/completions", {"prompt": text, "max_tokens": output, "temperature": 0})

    def arrivals(self, calm_latency: Callable[[], float | None]) -> Iterator[Arrival]:
        """Without an end."""
        rng, at = random.Random(1), 0.0
        while True:
            at += rng.expovariate(self.rate)
            yield Arrival(at, "rise", self.ask, lambda _: None)


class Deployment:
    """What ``kvpilot up`` wires together, in this process: the loop, real engines, the router before them."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.looks: list[Look] = []
        self.told: list[str] = []
        self._manifest = manifest
        self._state = StateDirectory(manifest["metadata"]["name"], directory)
        self._state.open(fresh=True)
        self._router = Router("127.0.0.1", 0)
        self._cluster = LocalCluster(
            manifest,
            self._state,
            on_event=lambda *event: self.told.append(": ".join(event)),
            on_backends=self._router.use,
            on_refused=self.told.append,
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


HOST_PAGES = 'kvpilot_cached_pages{tier="host"}'


def gauges(look: Look) -> list[Gauges]:
    """Of the ready engines."""
    return [pod.sample.gauges for pod in look.observation.ready if pod.sample is not None]


def latency_met(look: Look) -> bool:
    """Every latency objective holds on the short window."""
    latency = [o for o in look.decision.objectives if o.name.startswith("p")]
    return all(o.measured_short is not None and o.measured_short >= o.target for o in latency)


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
async def sent(client: Client, traffic: Traffic) -> AsyncIterator[LoadRun]:
    """The traffic goes on for as long as the block; nothing of it may fail."""
    run = LoadRun(client, traffic)
    sending = asyncio.create_task(run.run())
    try:
        yield run
    finally:
        run.stop()
        await sending
    assert {result.kind for result in run.tally.results} <= {"ok", "cancelled"}


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


async def test_a_larger_batch_cures_the_wait_for_it(tmp_path: Path) -> None:
    config = {"numWorkers": 64, "batchSize": 1, "maxTokens": 16384}
    deployment = Deployment(tmp_path, manifest_of(config, replicas=2))
    traffic = Traffic(prompt_tokens=32, output_tokens=8)
    async with deployment.running() as client:
        await deployment.until(lambda look: len(look.observation.ready) == 2, 100)
        _, calm = await closed_loop(client, traffic, 2, 10)
        latency = {"p50Ms": edge_above(2 * calm), "p95Ms": edge_above(4 * calm), "p99Ms": 30_000}
        objectives = manifest_of({})["spec"]["objectives"]
        deployment.edit(objectives={**objectives, "latency": latency})
        async with users(client, traffic, 12):
            started = await deployment.recorded("Started", 60)
            before = deployment.looks[-1]
            uids = {pod.uid for pod in before.observation.pods}
            promoted = await deployment.recorded("Promoted", 80)
            # A first step of the batch may be too short for the limit; then another one follows.
            after = await deployment.until(latency_met, 120)

    assert (started.rule, started.changes[0].knob, started.changes[0].before) == ("batch-up", "batchSize", 1)
    assert started.diagnosis is not None
    assert (started.diagnosis.stage, started.diagnosis.reason) == (Stage.BATCH_WAIT, reasons.QUEUE_AT_BATCH)
    assert "waiting for a place in the batch is" in started.diagnosis.message
    assert started.summary.startswith("Batch wait was ")
    assert "with 1 rows for 64 workers; trying batchSize 1 -> " in started.summary
    assert promoted.id == started.id
    assert promoted.evidence["verdict"] == reasons.PROMOTED
    assert f"promoted as generation {promoted.generation}" in promoted.summary
    assert {pod.uid for pod in after.observation.pods} == uids
    assert all(
        pod.engine is not None and pod.engine.config["batchSize"] >= promoted.changes[0].after
        for pod in after.observation.pods
    )
    breached = before.observation.counts("short")
    cured = after.observation.counts("short")
    assert _batch_wait(cured) < _batch_wait(breached) / 2


def _batch_wait(counts: Any) -> float:
    return counts.stage_seconds[Stage.BATCH_WAIT] / counts.judged


async def test_less_budget_and_a_tighter_codec_cure_memory(tmp_path: Path) -> None:
    config = {
        "numWorkers": 4, "batchSize": 2, "maxTokens": 2048, "cacheStrategy": "lru",
        "hostMemoryMb": 200, "useCompression": True, "compressionRatio": 1.0,
    }  # fmt: skip
    tuning = {
        "mode": "Auto", "pace": "Fast", "singleReplica": "BeforeAfter", "disabledRules": ["memory-emergency"],
    }  # fmt: skip
    container = {"name": "engine", "resources": {"limits": {"memory": str(LIMIT)}}}
    manifest = manifest_of(config, replicas=1, tuning=tuning, template={"spec": {"containers": [container]}})
    deployment = Deployment(tmp_path, manifest)
    traffic = Traffic(prompt_tokens=512, output_tokens=2)
    async with deployment.running() as client:
        per_s, _ = await closed_loop(client, traffic, 2, 6)
        look = await deployment.until(lambda look: gauges(look) and gauges(look)[0].memory_ratio, 30)
        [gauge] = gauges(look)
        empty = gauge.memory_ratio * gauge.memory_limit_bytes - gauge.cached_bytes
        # A full cache of 204 MiB is over what is allowed, and the least budget of 100 MiB well under it.
        allowed = f"{100 * (empty + 150 * MIB) / LIMIT:.0f}%"
        deployment.edit(objectives={**manifest["spec"]["objectives"], "memory": allowed})
        traffic.rate = 0.8 * per_s
        async with sent(client, traffic):
            started = await deployment.recorded("Started", 100)
            blocks = await deployment.host_blocks()
            breach = deployment.looks[-1]
            promoted = await deployment.recorded("Promoted", 90)
            kept = await deployment.host_blocks()
            after = await deployment.until(lambda _: True, 10)

    assert started.rule == "memory-relief"
    assert [change.knob for change in started.changes] == ["maxMemoryMb", "compressionRatio"]
    assert started.diagnosis is not None
    assert started.diagnosis.reason == reasons.MEMORY_OVER_LIMIT
    assert started.diagnosis.message.endswith(f"% of its limit, {allowed} is allowed")
    assert "the cache held" in started.summary
    assert "trying maxMemoryMb unset -> " in started.summary
    assert promoted.id == started.id
    assert "memory fell from" in promoted.summary
    assert promoted.evidence["unproven"] is True
    [pod] = after.observation.pods
    assert pod.uid == breach.observation.pods[0].uid
    assert pod.engine is not None and pod.engine.config["maxMemoryMb"] == promoted.changes[0].after
    # Which rung keeps the number of blocks depends on how far the measured budget had to fall.
    assert pod.engine.config["compressionRatio"] == promoted.changes[1].after
    assert codec_rung(True, pod.engine.config["compressionRatio"]).codec in {"int8", "int4"}
    [then], [now] = gauges(breach), gauges(after)
    assert kept >= 0.9 * blocks, "the tighter codec keeps the number of blocks"
    assert then.memory_ratio > float(allowed.rstrip("%")) / 100 > now.memory_ratio
    assert now.cached_bytes <= promoted.changes[0].after * MIB < then.cached_bytes


async def test_a_saturated_device_gets_another_replica_and_no_knob_is_blamed(tmp_path: Path) -> None:
    config = {"numWorkers": 24, "batchSize": 24, "maxTokens": 16384}
    deployment = Deployment(tmp_path, manifest_of(config, scaling={"min": 1, "max": 2}))
    traffic = Traffic(prompt_tokens=32, output_tokens=64)
    at_once = 48  # twice the rows of one engine, and those of two
    async with deployment.running() as client:
        # For a long window, so that it is proven that steps take all the time.
        _, seconds = await closed_loop(client, traffic, at_once, 26)
        edge = max(edge for edge in EDGES_S if edge <= 0.7 * seconds)
        latency = {"p50Ms": round(1000 * edge), "p95Ms": 30_000, "p99Ms": 30_000}
        deployment.edit(objectives={**manifest_of({})["spec"]["objectives"], "latency": latency})
        async with users(client, traffic, at_once):
            scaled = await deployment.recorded("ScaledOut", 30)
            before = deployment.looks[-1]
            wait = _admission_wait(before)
            await deployment.until(lambda look: len(look.observation.ready) == 2, 60)
            after = await deployment.until(lambda look: _admission_wait(look) < wait / 3, 50)

    assert scaled.rule == "replicas-up"
    assert scaled.replicas == (1, 2)
    assert scaled.summary.startswith("The device is saturated (")
    assert scaled.summary.endswith("% of the time in steps, more rows gain little); replicas 1 -> 2.")
    assert scaled.diagnosis is not None
    assert scaled.diagnosis.saturated
    assert scaled.diagnosis.reason == reasons.DEVICE_SATURATED
    assert deployment.records[0] is scaled
    assert wait > 0.2
    ended = [pod.sample.windows["short"].completed for pod in after.observation.ready if pod.sample]
    assert min(ended) > 0.25 * sum(ended) > 0


def _admission_wait(look: Look) -> float:
    """Share of the time of requests that have ended in the short window."""
    stages = look.observation.counts("short").stage_seconds
    return stages[Stage.ADMISSION_WAIT] / sum(stages.values()) if sum(stages.values()) else 1.0
