"""What every end-to-end test needs: the cluster of `make cluster-up`, a namespace, an operator, load."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / ".cluster" / "cluster.json"
PACE_SCALE = 0.5
"""Of pace Fast: windows of 5 and 30 s over scrapes of one second, ticks each second."""

ALERTS_TOKEN = "e2e-alerts-token"
JSON = {"Content-Type": "application/json"}

T = TypeVar("T")


def eventually(probe: Callable[[], T], within_s: float, what: str) -> T:
    """The first true value of ``probe``; fails with what it said last."""
    deadline, last = time.monotonic() + within_s, None
    while time.monotonic() < deadline:
        last = probe()
        if last:
            return last
        time.sleep(0.25)
    return pytest.fail(f"{what}: not within {within_s:g} s; last: {last!r}")


def http(url: str, data: bytes | None = None, headers: dict[str, str] | None = None) -> str:
    """One request, without the proxies of the environment."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, data, headers or {}), timeout=10) as answer:
        return answer.read().decode()


@dataclass
class Cluster:
    """The cluster of `.cluster/cluster.json`, by kubectl."""

    state: dict[str, Any]

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        command = [self.state["kubectl"], f"--kubeconfig={self.state['kubeconfig']}", *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0 or not check, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def apply(self, *documents: dict[str, Any]) -> None:
        text = yaml.safe_dump_all(documents)
        self.kubectl(
            "apply", "--server-side", "--field-manager=tester", "--force-conflicts", "-f", "-", stdin=text
        )

    def get(self, kind: str, name: str, namespace: str) -> dict[str, Any]:
        """The object; {} when there is none."""
        text = self.kubectl("get", kind, name, f"--namespace={namespace}", "--ignore-not-found", "-o=json")
        return json.loads(text) if text.strip() else {}

    def list(self, kind: str, namespace: str, selector: str = "") -> list[dict[str, Any]]:
        text = self.kubectl("get", kind, f"--namespace={namespace}", f"--selector={selector}", "-o=json")
        return list(json.loads(text)["items"])

    def pods(self, namespace: str, name: str = "chat") -> list[dict[str, Any]]:
        """Engine pods that are not going."""
        pods = self.list("pods", namespace, f"kvpilot.io/name={name}")
        return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]

    def prometheus(self, query: str) -> list[dict[str, Any]]:
        url = f"{self.state['prometheus']['url']}/api/v1/query"
        return json.loads(http(url, urllib.parse.urlencode({"query": query}).encode()))["data"]["result"]

    def process(self, verb: str, name: str) -> None:
        """Stop or start one process of the cluster, as its own commands do."""
        subprocess.run(
            [sys.executable, "-m", "scripts.cluster", verb, name], cwd=ROOT, check=True, timeout=60,
            capture_output=True,
        )  # fmt: skip


def condition(item: dict[str, Any], name: str) -> dict[str, Any]:
    """A condition of a resource; {} when it is not there."""
    found = [c for c in item.get("status", {}).get("conditions", ()) if c["type"] == name]
    return found[0] if found else {}


@dataclass
class Operator:
    """The operator as a process of this machine, watching one namespace."""

    cluster: Cluster
    namespace: str
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    ports: dict[str, int] = field(default_factory=dict)
    starts: int = 0

    def start(self, **environment: str) -> None:
        self.ports = {"metrics": free_port(), "alerts": free_port()}
        self.starts += 1
        sources = {"default": {"url": self.cluster.state["prometheus"]["url"], "scrapeInterval": "1s"}}
        (self.folder / "sources.yaml").write_text(yaml.safe_dump({"sources": sources}))
        (self.folder / "key").write_text("k" * 32)
        (self.folder / "token").write_text(ALERTS_TOKEN)
        command = [
            str(Path(sys.executable).parent / "kvpilot"), "operator",
            f"--kubeconfig={self.cluster.state['kubeconfig']}",
            f"--sources-file={self.folder / 'sources.yaml'}",
            f"--operator-key-file={self.folder / 'key'}",
            f"--alerts-token-file={self.folder / 'token'}",
            f"--namespaces={self.namespace}",
            f"--pace-scale={PACE_SCALE}",
            f"--metrics-port={self.ports['metrics']}",
            f"--alerts-port={self.ports['alerts']}",
        ]  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stderr=log, stdout=log, env={**os.environ, **environment}
            )
        eventually(self.healthy, 60, f"the operator answers; see {self.log}")

    @property
    def log(self) -> Path:
        return self.folder / "operator.log"

    def healthy(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"the operator ended: {self.log.read_text()[-3000:]}"
        try:
            http(f"http://127.0.0.1:{self.ports['metrics']}/healthz")
        except OSError:
            return False
        return True

    def metrics(self, name: str) -> dict[str, float]:
        """Series of its own page by their labels as text."""
        page = http(f"http://127.0.0.1:{self.ports['metrics']}/metrics")
        found = re.findall(rf"^{name}(\{{[^}}]*\}})? (\S+)$", page, re.MULTILINE)
        return {labels: float(value) for labels, value in found}

    def lines(self) -> list[dict[str, Any]]:
        """What it logged."""
        lines = []
        for line in self.log.read_text().splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        return lines

    def stop(self) -> int:
        """As Kubernetes does: SIGTERM, then wait; its exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(30)

    def kill(self) -> None:
        """As a node that loses power."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@dataclass
class Load:
    """`kvpilot load` as a process."""

    url: str
    folder: Path
    process: subprocess.Popen[bytes] | None = None

    def one_at_a_time(self, hosts: Collection[str], output_tokens: int = 16) -> list[float]:
        """Seconds per request of each engine with one request in it, all engines busy: what it can do now."""

        def ask(host: str) -> float:
            times = []
            for number in range(10):
                prompt = f"{host} asks for the {number}th time: " + f"how is {number} doing? " * 4
                body = {"model": "builtin/tiny-llama", "prompt": prompt, "max_tokens": output_tokens}
                started = time.monotonic()
                http(f"http://{host}:8000/v1/completions", json.dumps(body).encode(), JSON)
                times.append(time.monotonic() - started)
            return sum(times[2:]) / len(times[2:])

        with ThreadPoolExecutor(len(hosts)) as pool:
            return list(pool.map(ask, hosts))

    def start(self, rate: float, seconds: float, output_tokens: int = 16, system_tokens: int = 64) -> None:
        command = [
            str(Path(sys.executable).parent / "kvpilot"), "load", self.url, f"--rate={rate}",
            f"--duration={seconds}", f"--output-tokens={output_tokens}", "--user-tokens=16", "--turns=2",
            f"--system-tokens={system_tokens}", "--think=0.5", f"--json={self.folder / 'load.json'}",
        ]  # fmt: skip
        with (self.folder / "load.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def result(self) -> dict[str, Any]:
        """Wait for its end; its figures."""
        assert self.process is not None
        self.process.wait(180)
        return json.loads((self.folder / "load.json").read_text())

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(5)


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    if not STATE.exists():
        reason = "no cluster: run `make cluster-up`"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    return Cluster(json.loads(STATE.read_text()))


@pytest.fixture(scope="module")
def definitions(cluster: Cluster) -> None:
    """Our kinds, as `crds/` has them."""
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds"))
    cluster.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", str(ROOT / "crds"))


@pytest.fixture
def namespace(cluster: Cluster, definitions: None, tmp_path: Path) -> Iterator[str]:
    """A namespace of one test; what was in it at the end is described in the test's folder."""
    name = f"e2e-{uuid.uuid4().hex[:8]}"
    cluster.kubectl("create", "namespace", name)
    yield name
    told = cluster.kubectl("describe", "kvcd,kvco,deployments,pods", f"--namespace={name}", check=False)
    (tmp_path / "described.txt").write_text(told)
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def operator(cluster: Cluster, namespace: str, tmp_path: Path) -> Iterator[Operator]:
    """An operator that runs, and is stopped in the end whatever a test did to it."""
    made = Operator(cluster, namespace, tmp_path)
    made.start()
    yield made
    if made.process is not None and made.process.poll() is None:
        made.stop()


@pytest.fixture
def manifest(cluster: Cluster, namespace: str) -> Callable[..., dict[str, Any]]:
    """A KVCacheDeployment of the built-in model whose pods use this machine's environment."""
    engine = cluster.state["engine"]
    mounts = [{"name": f"host-{i}", "path": path} for i, path in enumerate(engine["mounts"])]
    container = {
        "name": "engine",
        "command": [engine["python"], "-m", "kvpilot_engine"],
        "env": [
            {"name": "PYTHONDONTWRITEBYTECODE", "value": "1"},
            {"name": "OMP_NUM_THREADS", "value": "1"},
        ],
        "resources": {"requests": {"memory": "64Mi"}, "limits": {"memory": "2Gi"}},
        "volumeMounts": [{"name": m["name"], "mountPath": m["path"], "readOnly": True} for m in mounts],
    }
    volumes = [{"name": m["name"], "hostPath": {"path": m["path"], "type": "Directory"}} for m in mounts]

    def make(name: str = "chat", *, cpu: str = "300m", nowhere: bool = False, **spec: Any) -> dict[str, Any]:
        """``cpu`` is a pod's weight beside the machine's other work; ``nowhere`` leaves pods unscheduled."""
        container["resources"]["requests"]["cpu"] = cpu
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
    """Load on the Service of `chat`; ask for it after the resource is there."""
    made = Load("", tmp_path)
    yield made
    made.stop()


def trusted(cluster: Cluster, namespace: str, name: str = "chat") -> bool:
    """Whether every ready engine of the resource is measured."""
    item = cluster.get("kvcd", name, namespace)
    return (
        condition(item, "MetricsTrusted").get("status") == "True"
        and condition(item, "Ready").get("status") == "True"
    )


@pytest.fixture
def serve(cluster: Cluster, namespace: str, load: Load) -> Callable[[dict[str, Any]], None]:
    """Apply a resource, wait until it serves and is measured, and point the load at its Service."""

    def apply(document: dict[str, Any]) -> None:
        cluster.apply(document)
        eventually(lambda: trusted(cluster, namespace), 150, "its engines serve and are measured")
        address = cluster.get("service", "chat", namespace)["spec"]["clusterIP"]
        load.url = f"http://{address}:8000"

    return apply


@pytest.fixture
def kit() -> dict[str, Any]:
    """Helpers of this file for the test modules, which cannot import it."""
    return {"eventually": eventually, "condition": condition, "http": http, "trusted": trusted}
