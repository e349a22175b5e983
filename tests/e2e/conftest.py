"""Fixtures of the end-to-end tests: the cluster of `make cluster-up`, a namespace, an operator, load."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from scripts.cluster.layout import REPO
from tests.e2e.cluster import Cluster, cluster_state, eventually, trusted
from tests.e2e.operators import PACE_SCALE, Operator, Release
from tests.e2e.traffic import Load, Scene, Users, limit_ms

from kvpilot_operator.resource.fields import EDGES_MS

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    made = Cluster(cluster_state())
    command = made.command("proxy", "--port=0")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as proxy:
        try:
            assert proxy.stdout is not None
            made.proxy = f"http://{proxy.stdout.readline().split()[-1]}"
            yield made
        finally:
            proxy.kill()


@pytest.fixture(scope="module")
def definitions(cluster: Cluster) -> None:
    """The CustomResourceDefinitions of `crds/`."""
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(REPO / "crds"))
    cluster.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", str(REPO / "crds"))


@pytest.fixture
def namespace(cluster: Cluster, definitions: None, tmp_path: Path) -> Iterator[str]:
    """A namespace for one test; its final content is described in the test's folder."""
    name = f"e2e-{uuid.uuid4().hex[:8]}"
    cluster.kubectl("create", "namespace", name)
    yield name
    reported = cluster.kubectl("describe", "kvcd,kvco,deployments,pods", f"--namespace={name}", check=False)
    (tmp_path / "described.txt").write_text(reported)
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def operator(cluster: Cluster, namespace: str, tmp_path: Path) -> Iterator[Operator]:
    """A running operator, stopped after the test."""
    made = Operator(cluster, namespace, tmp_path)
    made.start()
    yield made
    if made.process is not None and made.process.poll() is None:
        made.stop()


@pytest.fixture
def kvpilot(cluster: Cluster, namespace: str, tmp_path: Path) -> Command:
    """Runs a command as a user of the cluster; ``fails`` is its expected exit code."""
    program = str(Path(sys.executable).parent / "kvpilot")
    environment = {**os.environ, "KUBECONFIG": str(cluster.state["kubeconfig"])}

    def run(verb: str, *arguments: str, fails: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [program, verb, *arguments, "-n", namespace],
            env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == fails, f"{verb}: {done.stdout}{done.stderr}"
        return done

    return run


@pytest.fixture
def chart_values(cluster: Cluster) -> dict[str, Any]:
    """Chart values: the operator image in the cluster, and the URL of Prometheus for pods."""
    repository, _, tag = cluster.state["images"]["operator"].rpartition(":")
    return {
        "image": {"repository": repository, "tag": tag, "pullPolicy": "Never"},
        "sources": {"default": {"url": cluster.state["prometheus"]["url"], "scrapeInterval": "1s"}},
        "paceScale": PACE_SCALE,
    }


@pytest.fixture
def release(cluster: Cluster, chart_values: dict[str, Any], tmp_path: Path) -> Iterator[Release]:
    """The chart in a namespace that is deleted afterwards; logs of its pods go to the test's folder."""
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump(chart_values))
    made = Release(cluster, f"kvpilot-{uuid.uuid4().hex[:6]}", values)
    cluster.kubectl("create", "namespace", made.namespace)
    yield made
    reported = cluster.kubectl("describe", "pods", f"--namespace={made.namespace}", check=False)
    (tmp_path / "operator.txt").write_text(reported)
    for pod in made.pods():
        log = cluster.kubectl("logs", f"--namespace={made.namespace}", pod["metadata"]["name"], check=False)
        (tmp_path / f"{pod['metadata']['name']}.log").write_text(log)
    cluster.kubectl("delete", "namespace", made.namespace, "--timeout=60s")


@pytest.fixture
def manifest(cluster: Cluster, namespace: str) -> Callable[..., dict[str, Any]]:
    """Makes KVCacheDeployments of the built-in model, whose pods use this machine's environment."""
    engine = cluster.state["engine"]
    mounts = [{"name": f"host-{i}", "path": path} for i, path in enumerate(engine["mounts"])]
    container = {
        "name": "engine",
        "command": [engine["python"], "-m", "kvpilot_engine"],
        "env": [
            {"name": "PYTHONDONTWRITEBYTECODE", "value": "1"},
            {"name": "OMP_NUM_THREADS", "value": "1"},
        ],
        # Small, so that pods of an earlier test, even terminating ones, do not fill the node.
        "resources": {"requests": {"memory": "64Mi", "cpu": "50m"}, "limits": {"memory": "2Gi"}},
        "volumeMounts": [{"name": m["name"], "mountPath": m["path"], "readOnly": True} for m in mounts],
    }
    volumes = [{"name": m["name"], "hostPath": {"path": m["path"], "type": "Directory"}} for m in mounts]

    def make(name: str = "chat", *, nowhere: bool = False, **spec: Any) -> dict[str, Any]:
        """A resource; with ``nowhere`` no node matches its pods, so they stay unscheduled."""
        placed = {"nodeSelector": {"kvpilot.io/no-such-node": "true"}} if nowhere else {}
        tuning = {"pace": "Fast", **spec.pop("tuning", {})}
        config = {"dtype": "float32", "device": "cpu", "cacheStrategy": "lru", **spec.pop("config", {})}
        whole: dict[str, Any] = {
            "profile": "development",
            "engine": {
                "image": cluster.state["images"]["engine_host"],
                "imagePullPolicy": "Never",
                "config": config,
            },
            "tuning": tuning,
            "rollout": {"maxSurge": 0, "maxUnavailable": 1, "drainSeconds": 5},
            "template": {"spec": {"containers": [copy.deepcopy(container)], "volumes": volumes, **placed}},
            **spec,
        }
        if "replicas" not in whole:
            whole.setdefault("scaling", {"min": 1, "max": 3})
        return {
            "apiVersion": "kvpilot.io/v1alpha1",
            "kind": "KVCacheDeployment",
            "metadata": {"name": name, "namespace": namespace},
            "spec": whole,
        }

    return make


@pytest.fixture
def load(cluster: Cluster, namespace: str, tmp_path: Path) -> Iterator[Load]:
    """Load on the Service of `chat`, whose URL must be set after the resource exists."""
    made = Load("", tmp_path)
    yield made
    made.stop()


@pytest.fixture
def serve(cluster: Cluster, namespace: str, load: Load) -> Callable[[dict[str, Any]], None]:
    """Apply a resource, wait until its metrics are trusted, and point the load at its Service."""

    def apply(document: dict[str, Any]) -> None:
        cluster.apply(document)
        eventually(
            lambda: trusted(cluster, namespace), 150, "its replicas serve and their metrics are trusted"
        )
        address = cluster.get("service", "chat", namespace)["spec"]["clusterIP"]
        load.url = f"http://{address}:8000"

    return apply


ANSWER_TOKENS, USERS = 8, 16
"""Few tokens: even a busy machine completes enough requests for a verdict. More where an answer takes less
than half of the lowest limit. Eight users per replica, so that an answer takes about four times the
objective's limit, or twice."""


@pytest.fixture
def overload(
    cluster: Cluster, namespace: str, manifest: Callable[..., dict[str, Any]], serve: Any, load: Load
) -> Iterator[Callable[[], Scene]]:
    """Makes the scene of an overload that a knob cures; the users stop after the test."""
    made: list[Scene] = []

    def begin() -> Scene:
        config = {"numWorkers": 1, "batchSize": 16, "maxTokens": 16384, "maxQueue": 10000}
        quiet = {"config": config, "replicas": 2}
        serve(manifest(tuning={"mode": "Off"}, **quiet))
        hosts, tokens = [pod["status"]["podIP"] for pod in cluster.pods(namespace)], ANSWER_TOKENS
        while (alone := max(load.one_at_a_time(hosts, tokens))) * 2000 < EDGES_MS[0] and tokens < 512:
            tokens *= 2
        edge = limit_ms(2 * alone)
        limits = {
            "latency": {"p50Ms": edge, "p95Ms": EDGES_MS[min(EDGES_MS.index(edge) + 3, 15)]},
            "throughput": {"target": 0},
            "hitRate": "0%",
            "errors": "20%",
        }
        cluster.apply(manifest(objectives=limits, **quiet))
        uids = sorted(pod["metadata"]["uid"] for pod in cluster.pods(namespace))
        made.append(Scene(cluster, namespace, uids, Users(load.url, USERS, tokens)))
        made[0].users.start()
        return made[0]

    yield begin
    for scene in made:
        scene.users.stop()
