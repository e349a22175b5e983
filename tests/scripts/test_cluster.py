"""Properties of the cluster of `make cluster-up` on which end-to-end tests rely, and its clean removal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scripts.cluster.layout import REPO, cache_dir
from scripts.cluster.machine import COVERED, KUBELET_SYSCTLS
from tests.e2e.cluster import cluster_state, eventually, http

# Alone: these tests stop processes that others need and change the resources of the node.
pytestmark = [pytest.mark.e2e, pytest.mark.alone]
ENGINE_LABELS = {
    "app.kubernetes.io/part-of": "kvpilot",
    "app.kubernetes.io/component": "engine",
    "kvpilot.io/name": "probe",
}
# Replaces an engine: imports torch from the machine's environment, serves metrics on the engine's port.
PROBE = (
    "import torch, kvpilot_engine, prometheus_client, threading; "
    "print('imported', torch.__version__, flush=True); "
    "prometheus_client.start_http_server(8000); threading.Event().wait()"
)


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return cluster_state()


@pytest.fixture(scope="module")
def kubectl(cluster: dict[str, Any]) -> Callable[..., str]:
    def call(*arguments: str, stdin: str | None = None) -> str:
        command = [cluster["kubectl"], f"--kubeconfig={cluster['kubeconfig']}", *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=90)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


@pytest.fixture
def namespace(kubectl: Callable[..., str]) -> Iterator[str]:
    name = f"cluster-test-{uuid.uuid4().hex[:8]}"
    kubectl("create", "namespace", name)
    yield name
    kubectl("delete", "namespace", name, "--wait=false")


def samples(cluster: dict[str, Any], query: str) -> list[dict[str, Any]]:
    url = f"{cluster['prometheus']['url']}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    return json.loads(http(url))["data"]["result"]


def engine_pod(cluster: dict[str, Any]) -> str:
    mounts = [{"name": f"host-{i}", "path": path} for i, path in enumerate(cluster["engine"]["mounts"])]
    container = {
        "name": "engine",
        "image": cluster["images"]["engine_host"],
        "imagePullPolicy": "Never",
        "command": [cluster["engine"]["python"], "-c", PROBE],
        "ports": [{"name": "http", "containerPort": 8000}],
        "env": [{"name": "HOME", "value": "/tmp"}, {"name": "PYTHONDONTWRITEBYTECODE", "value": "1"}],
        "readinessProbe": {"httpGet": {"path": "/metrics", "port": "http"}, "periodSeconds": 1},
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": [{"name": m["name"], "mountPath": m["path"], "readOnly": True} for m in mounts],
    }
    volumes = [{"name": m["name"], "hostPath": {"path": m["path"], "type": "Directory"}} for m in mounts]
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "probe", "labels": ENGINE_LABELS},
            "spec": {"containers": [container], "volumes": volumes, "terminationGracePeriodSeconds": 1},
        }
    )


def test_engine_pod_uses_the_machines_environment_and_is_scraped(cluster, kubectl, namespace):
    kubectl("apply", f"--namespace={namespace}", "-f", "-", stdin=engine_pod(cluster))
    kubectl("wait", f"--namespace={namespace}", "pod/probe", "--for=condition=Ready", "--timeout=60s")
    assert "imported" in kubectl("logs", f"--namespace={namespace}", "probe")
    pod = json.loads(kubectl("get", f"--namespace={namespace}", "pod/probe", "-o=json"))
    assert "python_info" in http(f"http://{pod['status']['podIP']}:8000/metrics")
    query = f'up{{namespace="{namespace}"}}'
    eventually(lambda: [s["value"][1] for s in samples(cluster, query)] == ["1"], 15, "the pod is scraped")
    labels = samples(cluster, query)[0]["metric"]
    assert labels["pod_uid"] == pod["metadata"]["uid"]
    assert (labels["pod"], labels["kvpilot_name"], labels["component"]) == ("probe", "probe", "engine")


def test_no_packet_of_a_pod_leaves_the_machine(cluster, kubectl, namespace):
    connect = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"
    pod = json.loads(engine_pod(cluster))
    pod["spec"]["restartPolicy"] = "Never"
    pod["spec"]["containers"][0] |= {"command": ["python3", "-c", connect], "readinessProbe": None}
    kubectl("apply", f"--namespace={namespace}", "-f", "-", stdin=json.dumps(pod))
    kubectl(
        "wait",
        f"--namespace={namespace}",
        "pod/probe",
        "--for=jsonpath={.status.phase}=Failed",
        "--timeout=60s",
    )
    assert "Network is unreachable" in kubectl("logs", f"--namespace={namespace}", "probe")


def test_node_reports_the_configured_gpus(cluster, kubectl):
    def allocatable() -> str | None:
        node = json.loads(kubectl("get", "node", cluster["node"], "-o=json"))
        return node["status"]["allocatable"].get("nvidia.com/gpu")

    for count in ("2", "0"):
        subprocess.run(
            [sys.executable, "-m", "scripts.cluster", "gpu", count], cwd=REPO, check=True, timeout=60
        )
        eventually(lambda count=count: allocatable() == count, 5, f"{count} GPUs")


def test_prometheus_stops_and_starts_again(cluster):
    def ready() -> bool:
        try:
            return "Ready" in http(f"{cluster['prometheus']['url']}/-/ready")
        except OSError:
            return False

    for verb, answers in (("stop", False), ("start", True)):
        subprocess.run(
            [sys.executable, "-m", "scripts.cluster", verb, "prometheus"], cwd=REPO, check=True, timeout=60
        )
        eventually(lambda answers=answers: ready() is answers, 20, f"Prometheus after {verb}")
    config = subprocess.run(
        [cluster["promtool"], "check", "config", cluster["prometheus"]["config"]],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert config.returncode == 0, config.stdout + config.stderr


def machine() -> dict[str, Any]:
    """State of the machine that a cluster may change, without that of the first cluster."""
    return {
        "mounts": sorted(line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()),
        "links": sorted(path.name for path in Path("/sys/class/net").iterdir()),
        "routes": Path("/proc/net/route").read_text(),
        "sysctls": {name: (Path("/proc/sys") / name).read_text() for name in KUBELET_SYSCTLS},
        "directories": [path for path in (*COVERED, "/opt/containerd", "/run/netns") if Path(path).exists()],
        "cgroups": sorted(str(path) for path in Path("/sys/fs/cgroup").glob("**/kvpilot*")),
    }


def processes_of(marker: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if marker in line:
                found.append(line)
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_cluster_leaves_nothing_behind(cluster, tmp_path):
    """A second cluster starts next to the first, runs a pod, and is removed without traces."""
    if cluster["provider"] != "local":
        pytest.skip("kind removes its own containers")
    cache = tmp_path / "kvpilot"
    cache.mkdir()
    for shared in ("go", "images", "buildah"):
        (cache / shared).symlink_to(cache_dir() / shared)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "KVPILOT_CLUSTER_SLOT": "7"}

    def call(verb: str) -> None:
        command = [sys.executable, "-m", "scripts.cluster", verb]
        done = subprocess.run(
            command, cwd=REPO, env=environment, capture_output=True, text=True, check=False, timeout=240
        )
        assert done.returncode == 0, done.stderr

    before = machine()
    try:
        call("up")
        second = json.loads((REPO / ".cluster" / "cluster-7.json").read_text())
        tool = [second["kubectl"], f"--kubeconfig={second['kubeconfig']}"]
        subprocess.run(
            [*tool, "apply", "-f", "-"], input=engine_pod(second), text=True, check=True, timeout=60
        )
        ready = ["wait", "pod/probe", "--for=condition=Ready", "--timeout=60s"]
        subprocess.run([*tool, *ready], check=True, timeout=90)
        assert machine() != before
        assert processes_of(str(cache))
    finally:
        call("down")
    assert machine() == before
    assert processes_of(str(cache)) == []
    assert not (cache / "run").exists()
    assert not (REPO / ".cluster" / "cluster-7.json").exists()
