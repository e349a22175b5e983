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
from tests.e2e.traffic import Users
from tests.ports import free_port
from tests.prometheus import Prometheus

# ruff: noqa: PLR0917 - fixtures are taken by name
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(750)]


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
    idle_s = 120 * 0.4  # idle time of pace Fast, scaled
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
    cluster, namespace, operator, manifest, one_gpu
) -> None:
    document = manifest(scaling={"min": 2, "max": 4}, objectives={"latency": {"p50Ms": 50}})
    (container,) = document["spec"]["template"]["spec"]["containers"]
    container["resources"]["limits"]["nvidia.com/gpu"] = "1"
    cluster.apply(document)

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
    assert len(ready) == 1
    address = cluster.get("service", "chat", namespace)["spec"]["clusterIP"]
    # Users who wait for their answers breach the objective and offer no more than the one replica completes,
    # however slow the machine: the replica that they need is already requested and pending.
    # Four with 8 tokens each were answered within 50 ms, the lowest limit, where nothing else ran.
    waiting = Users(f"http://{address}:8000", 16, 32)
    waiting.start()

    def breached() -> bool:
        assert cluster.replicas(namespace) == 2, "the pending pod counts as capacity"
        objectives = cluster.status(namespace)["objectives"]
        return "p50" in {item["name"] for item in objectives if item["state"] == "Breached"}

    try:
        eventually(breached, 60, "the latency is breached")
        until = time.monotonic() + 28  # a long window and one reconcile
        while time.monotonic() < until:
            breached()
            time.sleep(1)
    finally:
        waiting.stop()
    assert waiting.failures == []
