"""Rules on real engines: real load breaches an objective, a rule diagnoses it, and its change cures it.

The tests assume no speed of the machine: limits follow from measurements of the engines, and tests of latency
use a closed loop, whose queues are as long on a fast machine as on a slow one.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from tests.operator.local.deployment import PACE_SCALE, Deployment, Traffic, closed_loop, manifest_of, users

from kvpilot_engine.contract import compression_level
from kvpilot_engine.contract.metrics import EDGES_S, Stage
from kvpilot_operator.reconcile.reconciler import Reconciliation
from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.decision import Record
from kvpilot_operator.tuning.observation import Counts, Gauges
from kvpilot_operator.tuning.pace import PACES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MIB = 1 << 20
WINDOW_S = PACE_SCALE * PACES["Fast"].short
LIMIT = 1 << 30
"""Memory limit of the engines, bytes: about twice the memory of an engine with the built-in model."""


def edge_above(seconds: float) -> int:
    """The lowest histogram edge at or above ``seconds``, ms."""
    return round(1000 * next(edge for edge in EDGES_S if edge >= seconds))


def gauges(result: Reconciliation) -> list[Gauges]:
    """Gauges of the ready replicas."""
    return [pod.sample.gauges for pod in result.observation.ready if pod.sample is not None]


def latency_met(result: Reconciliation) -> bool:
    """True if every latency objective is met on the short window."""
    latency = [o for o in result.decision.objectives if o.name.startswith("p")]
    return all(o.measured_short is not None and o.measured_short >= o.target for o in latency)


@pytest.mark.alone
@pytest.mark.flaky(reruns=1)  # docs/decisions/2026-11-23-one-repeat-for-live-tuning.md
async def test_larger_batch_cures_batch_wait(tmp_path: Path) -> None:
    config = {"numWorkers": 64, "batchSize": 1, "maxTokens": 16384}
    deployment = Deployment(tmp_path, manifest_of(config, replicas=2))
    traffic = Traffic(prompt_tokens=32, output_tokens=8)
    async with deployment.running() as client:
        await deployment.until(lambda result: len(result.observation.ready) == 2, 100)
        _, calm = await closed_loop(client, traffic, 2, 10)
        # Twelve users take 10 times as long as two with a batch of one, and 3 times with a larger one.
        latency = {"p50Ms": edge_above(4 * calm), "p95Ms": edge_above(6 * calm), "p99Ms": 30_000}
        objectives = manifest_of({})["spec"]["objectives"]
        deployment.edit(objectives={**objectives, "latency": latency})
        async with users(client, traffic, 12):
            started = await deployment.recorded("Started", 60)
            before = deployment.results[-1]
            uids = {pod.uid for pod in before.observation.replicas}
            promoted = await deployment.recorded("Promoted", 80)
            breached = _counts_with_batch_size_one(deployment.results)
            # The first increase may not suffice; then another change follows.
            after = await deployment.until(latency_met, 120)

    assert (started.rule, started.changes[0].knob, started.changes[0].before) == ("batch-up", "batchSize", 1)
    assert started.diagnosis is not None
    assert (started.diagnosis.stage, started.diagnosis.reason) == (Stage.BATCH_WAIT, reasons.QUEUE_AT_BATCH)
    assert "waiting for a place in the batch is" in started.diagnosis.message
    assert started.summary.startswith("Batch wait was ")
    assert "with 1 row for 64 workers; trying batchSize 1 -> " in started.summary
    assert promoted.id == started.id
    assert promoted.evidence["verdict"] == reasons.PROMOTED
    assert f"promoted as generation {promoted.generation}" in promoted.summary
    assert {pod.uid for pod in after.observation.replicas} == uids
    assert all(
        pod.engine is not None and pod.engine.config["batchSize"] >= promoted.changes[0].after
        for pod in after.observation.replicas
    )
    cured = after.observation.counts("short")
    assert _batch_wait(cured) < _batch_wait(breached) / 4


def _counts_with_batch_size_one(results: list[Reconciliation]) -> Counts:
    """Counts of the controls in the last reconcile that had any; at its start the load is still low."""
    for result in reversed(results):
        pods = [
            pod for pod in result.observation.replicas if pod.engine and pod.engine.config["batchSize"] == 1
        ]
        if pods:
            return result.observation.counts("short", frozenset(pod.uid for pod in pods))
    raise AssertionError("no engine ever ran with a batch of one")


def _batch_wait(counts: Counts) -> float:
    return counts.stage_seconds[Stage.BATCH_WAIT] / counts.judged


@pytest.mark.alone
@pytest.mark.timeout(600)
@pytest.mark.flaky(reruns=1)  # docs/decisions/2026-11-23-one-repeat-for-live-tuning.md
async def test_prefetching_cures_tier_load(tmp_path: Path) -> None:
    """Prompts lie in the host tier. The stage is cured; the limit is only there to be missed."""
    config = {
        "numWorkers": 16, "batchSize": 16, "maxTokens": 20480, "hostMemoryMb": 400, "enablePrefetch": False,
    }  # fmt: skip
    deployment = Deployment(tmp_path, manifest_of(config, replicas=2))
    traffic = Traffic(prompt_tokens=1024, output_tokens=2, prompts=64)  # a pool holds a third of them
    async with deployment.running() as client:
        await deployment.until(lambda result: len(result.observation.ready) == 2, 100)
        async with users(client, traffic, 16):
            await deployment.until(_prompts_are_cached, 120)
        _, seconds = await closed_loop(client, traffic, 16, 26)  # long windows without the misses
        edge = max(edge for edge in EDGES_S if edge < 0.8 * seconds)
        latency = {"p50Ms": round(1000 * edge), "p95Ms": 30_000, "p99Ms": 30_000}
        deployment.edit(objectives={**manifest_of({})["spec"]["objectives"], "latency": latency})
        async with users(client, traffic, 16):
            started = await deployment.recorded("Started", 60)
            before = deployment.results[-1].observation
            promoted = await deployment.recorded("Promoted", 120)
            shown = promoted.at + 2 * WINDOW_S  # by then a short window shows the change alone
            after = (await deployment.until(lambda result: result.observation.at > shown, 60)).observation

    assert started.rule == promoted.rule == "prefetch-up"
    assert [change.knob for change in started.changes] == ["enablePrefetch", "prefetchSize"]
    assert started.diagnosis is not None
    assert (started.diagnosis.stage, started.diagnosis.reason) == (Stage.TIER_LOAD, reasons.TIER_LOAD_SLOW)
    assert started.summary.startswith("Tier load was ")
    assert _tier_load(after.counts("short")) < 0.6 * _tier_load(before.counts("long"))


def _prompts_are_cached(result: Reconciliation) -> bool:
    hits = next(o for o in result.decision.objectives if o.name == "hitRate").measured_short
    return hits is not None and hits > 0.98


def _tier_load(counts: Counts) -> float:
    return counts.stage_seconds[Stage.TIER_LOAD] / counts.judged


@pytest.mark.timeout(750)
async def test_lower_budget_and_higher_compression_level_cure_memory(tmp_path: Path) -> None:
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
        result = await deployment.until(lambda result: gauges(result) and gauges(result)[0].memory_ratio, 60)
        [gauge] = gauges(result)
        empty = gauge.memory_ratio * gauge.memory_limit_bytes - gauge.cached_bytes
        # A full cache of 204 MiB exceeds the objective; the minimum budget of 100 MiB is well below it.
        allowed = f"{100 * (empty + 150 * MIB) / LIMIT:.0f}%"
        deployment.edit(objectives={**manifest["spec"]["objectives"], "memory": allowed})
        async with users(client, traffic, 2):
            started = await deployment.recorded("Started", 240)
            blocks = await deployment.host_blocks()
            promoted = await deployment.recorded("Promoted", 180)
            kept = await deployment.host_blocks()
            after = await deployment.until(lambda _: True, 60)
    # Observed before the change.
    breach = next(result for result in deployment.results if started in result.decision.records)

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
    [pod] = after.observation.replicas
    assert pod.uid == breach.observation.replicas[0].uid
    assert pod.engine is not None and pod.engine.config["maxMemoryMb"] == promoted.changes[0].after
    # The compression level that keeps the number of blocks depends on the measured budget.
    assert pod.engine.config["compressionRatio"] == promoted.changes[1].after
    assert compression_level(True, pod.engine.config["compressionRatio"]).codec in {"int8", "int4"}
    [then], [now] = gauges(breach), gauges(after)
    assert kept >= 0.9 * blocks, "the higher compression level keeps the number of blocks"
    assert then.memory_ratio > float(allowed.rstrip("%")) / 100 > now.memory_ratio
    assert now.cached_bytes <= promoted.changes[0].after * MIB < then.cached_bytes


@pytest.mark.alone
@pytest.mark.timeout(900)
@pytest.mark.flaky(reruns=1)  # docs/decisions/2026-11-23-one-repeat-for-live-tuning.md
async def test_two_causes_at_once_are_cured_in_turn(tmp_path: Path) -> None:
    config = {"numWorkers": 64, "batchSize": 1, "maxTokens": 2048, "hostMemoryMb": 0}
    deployment = Deployment(tmp_path, manifest_of({**config, "cacheStrategy": "adaptive"}, replicas=2))
    traffic = Traffic(prompt_tokens=256, output_tokens=16, prompts=16)  # twice as many as a cache holds
    async with deployment.running() as client:
        await deployment.until(lambda result: len(result.observation.ready) == 2, 100)
        _, calm = await closed_loop(client, traffic, 2, 10)
        latency = {"p50Ms": edge_above(3 * calm), "p95Ms": 30_000, "p99Ms": 30_000}
        objectives = manifest_of({})["spec"]["objectives"]
        deployment.edit(objectives={**objectives, "latency": latency, "hitRate": "80%"})
        async with users(client, traffic, 12):
            await deployment.until(
                lambda _: {"batch-up", "cache-quota-up"} <= promoted_rules(deployment.records),
                400,  # hits on two small caches scatter: a remedy that proves nothing is tried again
            )
            after = await deployment.until(lambda result: latency_met(result) and hits_met(result), 200)

    started = [record for record in deployment.records if record.outcome == "Started"]
    ends = {record.id: record.at for record in deployment.records if record.outcome == "Promoted"}
    assert all(ends[one.id] <= other.at for one, other in itertools.pairwise(started) if one.id in ends)
    applied = [pod.engine.config for pod in after.observation.replicas if pod.engine is not None]
    assert all(item["batchSize"] > 1 and item["maxTokens"] > 2048 for item in applied)


def promoted_rules(records: list[Record]) -> set[str]:
    """Rules whose changes were promoted."""
    return {record.rule for record in records if record.outcome == "Promoted"}


def hits_met(result: Reconciliation) -> bool:
    """True if the hit rate meets its objective."""
    [hits] = [item for item in result.decision.objectives if item.name == "hitRate"]
    return hits.state == "Met"


@pytest.mark.alone
async def test_saturated_device_gets_another_replica_without_a_knob_change(tmp_path: Path) -> None:
    config = {"numWorkers": 24, "batchSize": 24, "maxTokens": 16384}
    # With room for more, the forecast would add a replica before the breach.
    deployment = Deployment(tmp_path, manifest_of(config, scaling={"min": 1, "max": 1}))
    # Long prompts, whose work grows with every row; steps of decoding alone may gain by more rows than these.
    traffic = Traffic(prompt_tokens=256, output_tokens=16)
    at_once = 48  # as many as the rows of two replicas
    async with deployment.running() as client:
        # For a long window, so that the evidence of saturation is complete.
        _, seconds = await closed_loop(client, traffic, at_once, 26)
        edge = max(edge for edge in EDGES_S if edge <= 0.7 * seconds)
        latency = {"p50Ms": round(1000 * edge), "p95Ms": 30_000, "p99Ms": 30_000}
        deployment.edit(objectives={**manifest_of({})["spec"]["objectives"], "latency": latency})
        async with users(client, traffic, at_once):
            await deployment.until(_breached_by_saturation, 60)
            earlier = len(deployment.records)
            deployment.edit(scaling={"min": 1, "max": 2})
            await deployment.until(lambda _: len(deployment.records) > earlier, 30)
            before = deployment.results[-1]
            wait = _admission_wait(before)
            await deployment.until(lambda result: len(result.observation.ready) == 2, 60)
            after = await deployment.until(lambda result: _admission_wait(result) < wait / 3, 50)

    # Before a window shows saturation, the queue alone may have recommended more workers.
    assert {record.outcome for record in deployment.records[:earlier]} <= {"Recommended"}
    scaled = deployment.records[earlier]
    assert (scaled.rule, scaled.outcome) == ("replicas-up", "ScaledOut")
    assert scaled.replicas == (1, 2)
    assert scaled.summary.startswith("The device is saturated (")
    assert "% of the time in steps, more rows gain little)" in scaled.summary
    assert scaled.summary.endswith("; replicas 1 -> 2.")
    assert scaled.diagnosis is not None
    assert scaled.diagnosis.saturated
    assert scaled.diagnosis.reason == reasons.DEVICE_SATURATED
    assert not {record.outcome for record in deployment.records} & {"Started", "Promoted"}
    assert wait > 0.2
    ended = [pod.sample.windows["short"].completed for pod in after.observation.ready if pod.sample]
    assert min(ended) > 0.25 * sum(ended) > 0


def _breached_by_saturation(result: Reconciliation) -> bool:
    breached = any(item.state == "Breached" for item in result.decision.objectives)
    return breached and result.decision.diagnosis is not None and result.decision.diagnosis.saturated


def _admission_wait(result: Reconciliation) -> float:
    """Share of admission wait in the time of requests that ended in the short window; 1.0 without any."""
    stages = result.observation.counts("short").stage_seconds
    return stages[Stage.ADMISSION_WAIT] / sum(stages.values()) if sum(stages.values()) else 1.0
