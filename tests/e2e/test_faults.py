"""No data is not zero: without Prometheus nothing is scaled in. A GPU that is not there is named."""

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
from tests.ports import free_port
from tests.prometheus import Prometheus

# ruff: noqa: PLR0917 - fixtures are taken by name
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(540)]


@pytest.fixture
def prometheus(cluster, tmp_path) -> Iterator[Prometheus]:
    """One that measures what the cluster's does: that one is not ours to stop."""
    state = cluster.state["prometheus"]
    made = Prometheus(Path(state["program"]), Path(state["config"]), tmp_path, free_port())
    made.start()
    yield made
    made.stop()


def test_without_prometheus_it_holds_and_scales_nothing_in(
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
    holds = cluster.get("kvcd", "chat", namespace)["status"]["tuning"]["holds"]
    assert "MetricsUnavailable" in [hold["reason"] for hold in holds]
    idle_s = 120 * 0.4  # of pace Fast, scaled
    until = time.monotonic() + idle_s + 5
    while time.monotonic() < until:
        assert cluster.replicas(namespace) == 2
        time.sleep(1)
    prometheus.start()
    eventually(lambda: cluster.replicas(namespace) == 1, idle_s + 90, "idle and measured: scaled in")


@pytest.fixture
def one_gpu(cluster) -> Iterator[None]:
    """The node has one GPU, as far as Kubernetes knows."""

    def gpus(number: int) -> None:
        subprocess.run([sys.executable, "-m", "scripts.cluster", "gpu", str(number)], cwd=REPO, check=True)

    gpus(1)
    yield
    gpus(0)


def test_a_gpu_that_is_not_there_is_named_and_causes_no_cascade(
    cluster, namespace, operator, manifest, load, one_gpu
) -> None:
    document = manifest(scaling={"min": 2, "max": 4}, objectives={"latency": {"p50Ms": 50}})
    (container,) = document["spec"]["template"]["spec"]["containers"]
    container["resources"]["limits"]["nvidia.com/gpu"] = "1"
    cluster.apply(document)

    def told() -> dict[str, Any]:
        return condition(cluster.get("kvcd", "chat", namespace), "Progressing")

    eventually(lambda: "Insufficient nvidia.com/gpu" in told().get("message", ""), 60, "what a pod waits for")
    assert told()["reason"] == "PodsPending"
    ready = eventually(
        lambda: [
            pod
            for pod in cluster.pods(namespace)
            if any(
                c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", ())
            )
        ],
        120,
        "one engine runs on the GPU that there is",
    )
    assert len(ready) == 1
    address = cluster.get("service", "chat", namespace)["spec"]["clusterIP"]
    load.url = f"http://{address}:8000"
    # More than one engine is meant for, so that a second one is wanted; and that one is asked for already.
    (alone,) = load.one_at_a_time([ready[0]["status"]["podIP"]], 8)
    load.start(rate=0.8 / alone, seconds=28, output_tokens=8)  # a long window, and a look at it
    until = time.monotonic() + 28
    while time.monotonic() < until:
        assert cluster.replicas(namespace) == 2, "the pending pod counts as capacity"
        time.sleep(1)
