"""Without Prometheus the operator does not scale in; a missing GPU is reported by name."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripts.cluster.layout import REPO
from tests.e2e.cluster import condition, eventually
from tests.e2e.operators import PACE_SCALE
from tests.e2e.traffic import Users, limit_ms
from tests.ports import free_port
from tests.prometheus import Prometheus

# ruff: noqa: PLR0917 - fixtures are taken by name
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(750)]

LONG_S = 60 * PACE_SCALE + 4
"""A long window of pace Fast and one reconcile, s."""

TOKENS = 64
"""Of an answer: behind 15 others it takes longer than the lowest limit where a token takes 0.1 ms."""


@pytest.fixture
def prometheus(cluster, tmp_path) -> Iterator[Prometheus]:
    """A second Prometheus with the cluster's configuration, which a test may stop."""
    state = cluster.state["prometheus"]
    made = Prometheus(Path(state["program"]), Path(state["config"]), tmp_path, free_port())
    made.start()
    yield made
    made.stop()


def test_without_prometheus_the_operator_holds_and_does_not_scale_in(
    cluster, namespace, operator, manifest, serve, prometheus
) -> None:
    operator.stop()
    operator.start(prometheus.url)
    serve(manifest(scaling={"min": 2, "max": 3}))
    prometheus.stop()
    cluster.apply(manifest(scaling={"min": 1, "max": 3}))
    untrusted = eventually(
        lambda: (
            found
            if (found := condition(cluster.get("kvcd", "chat", namespace), "MetricsTrusted")).get("status")
            == "False"
            else None
        ),
        30,
        "MetricsTrusted is False",
    )
    assert "metrics source default" in untrusted["message"]
    holds = cluster.status(namespace)["tuning"]["holds"]
    assert "MetricsUnavailable" in [hold["reason"] for hold in holds]
    idle_s = 2 * 60 * PACE_SCALE  # twice the look-back of a scale-in at pace Fast
    until = time.monotonic() + idle_s + 5
    while time.monotonic() < until:
        assert cluster.replicas(namespace) == 2
        time.sleep(1)
    prometheus.start()
    eventually(
        lambda: cluster.replicas(namespace) == 1, idle_s + 90, "scaled in after idle time with metrics"
    )


@pytest.fixture
def one_gpu(cluster) -> Iterator[None]:
    """Make the node report one GPU."""

    def gpus(number: int) -> None:
        subprocess.run([sys.executable, "-m", "scripts.cluster", "gpu", str(number)], cwd=REPO, check=True)

    gpus(1)
    yield
    gpus(0)


def test_missing_gpu_is_named_and_no_further_replica_is_added(
    cluster, namespace, operator, manifest, one_gpu, load
) -> None:
    def document(**spec: Any) -> dict[str, Any]:
        # One slot, which no rule may change: a breach can be cured by replicas alone.
        made = manifest(scaling={"min": 2, "max": 12}, config={"numWorkers": 1, "batchSize": 1}, **spec)
        (container,) = made["spec"]["template"]["spec"]["containers"]
        container["resources"]["limits"]["nvidia.com/gpu"] = "1"
        return made

    cluster.apply(document(tuning={"mode": "Off"}))

    def reported() -> dict[str, Any]:
        return condition(cluster.get("kvcd", "chat", namespace), "Progressing")

    eventually(
        lambda: "Insufficient nvidia.com/gpu" in reported().get("message", ""),
        60,
        "the pending pod's missing resource",
    )
    assert reported()["reason"] == "ReplicasPending"
    ready = eventually(
        lambda: [
            pod
            for pod in cluster.pods(namespace)
            if any(
                c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", ())
            )
        ],
        120,
        "one replica runs on the only GPU",
    )
    (host,) = [pod["status"]["podIP"] for pod in ready]
    # Users who wait for their answers need 1 / 0.8 replicas, on a machine of any speed, and these see about
    # 16 times the latency of one; the objective is three to five times that. They come a long window before
    # tuning begins: until then more arrives than is completed, which rightly asks for a third replica. A
    # replica that is slower beside other work does so too, but no such reason asks for more than six.
    (alone_s,) = load.one_at_a_time([host], TOKENS)
    waiting = Users(f"http://{host}:8000", 16, TOKENS)
    waiting.start()
    try:
        time.sleep(LONG_S)
        objectives = {"latency": {"p50Ms": limit_ms(3 * alone_s)}, "hitRate": "0%"}
        knobs = [{"name": name, "tune": False} for name in ("numWorkers", "batchSize", "maxStepTokens")]
        cluster.apply(document(objectives=objectives, tuning={"knobs": knobs}))

        def pending_is_enough() -> bool:
            asked = cluster.replicas(namespace)
            assert asked is not None and 2 <= asked <= 6, "pending pods are forgotten, and asked for again"
            holds = cluster.status(namespace)["tuning"].get("holds", ())
            return any("replicas-up: ReplicasPending" in hold["message"] for hold in holds)

        eventually(pending_is_enough, 60, "the breach needs what is pending already")
        until = time.monotonic() + LONG_S
        while time.monotonic() < until:
            pending_is_enough()
            time.sleep(1)
    finally:
        waiting.stop()
    assert waiting.failures == []
