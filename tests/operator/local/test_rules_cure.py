"""Rules on real engines: something is broken by real load, a rule finds it, and what it does cures it.

No figure of the machine is assumed: limits follow what the engines were measured to do, and where latency is
judged, users who ask again once they are answered keep queues as long on a fast machine as on a slow one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.local.deployment import Deployment, Traffic, closed_loop, manifest_of, users

from kvpilot_engine.contract import codec_rung
from kvpilot_engine.contract.metrics import EDGES_S, Stage
from kvpilot_operator.loop import Look
from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.observation import Counts, Gauges

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MIB = 1 << 20
LIMIT = 1 << 30
"""Memory limit of the engines, bytes: about twice what one of the built-in model takes."""


def edge_above(seconds: float) -> int:
    """The first published edge at or above ``seconds``, ms."""
    return round(1000 * next(edge for edge in EDGES_S if edge >= seconds))


def gauges(look: Look) -> list[Gauges]:
    """Of the ready engines."""
    return [pod.sample.gauges for pod in look.observation.ready if pod.sample is not None]


def latency_met(look: Look) -> bool:
    """Every latency objective holds on the short window."""
    latency = [o for o in look.decision.objectives if o.name.startswith("p")]
    return all(o.measured_short is not None and o.measured_short >= o.target for o in latency)


@pytest.mark.alone
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
            breached = _with_a_batch_of_one(deployment.looks)
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
    cured = after.observation.counts("short")
    assert _batch_wait(cured) < _batch_wait(breached) / 4


def _with_a_batch_of_one(looks: list[Look]) -> Counts:
    """Of the control, when there last was one: as the change starts, users have only begun to come."""
    for look in reversed(looks):
        pods = [pod for pod in look.observation.pods if pod.engine and pod.engine.config["batchSize"] == 1]
        if pods:
            return look.observation.counts("short", frozenset(pod.uid for pod in pods))
    raise AssertionError("no engine ever ran with a batch of one")


def _batch_wait(counts: Counts) -> float:
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
    traffic = Traffic(prompt_tokens=256, output_tokens=2)
    async with deployment.running() as client:
        look = await deployment.until(lambda look: gauges(look) and gauges(look)[0].memory_ratio, 30)
        [gauge] = gauges(look)
        empty = gauge.memory_ratio * gauge.memory_limit_bytes - gauge.cached_bytes
        # A full cache of 204 MiB is over what is allowed, and the least budget of 100 MiB well under it.
        allowed = f"{100 * (empty + 150 * MIB) / LIMIT:.0f}%"
        deployment.edit(objectives={**manifest["spec"]["objectives"], "memory": allowed})
        async with users(client, traffic, 2):
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


@pytest.mark.alone
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
