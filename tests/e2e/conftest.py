"""What every end-to-end test needs: the cluster of `make cluster-up`, a namespace, an operator, load."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / ".cluster" / "cluster.json"
CHART = ROOT / "charts" / "kvpilot"
PACE_SCALE = 0.4
"""Of pace Fast: windows of 4 and 24 s, the shortest that a scrape each second allows."""

API_PATHS = {
    "kvcd": "apis/kvpilot.io/v1alpha1/{}/kvcachedeployments",
    "kvco": "apis/kvpilot.io/v1alpha1/{}/kvcacheoverrides",
    "pod": "api/v1/{}/pods",
    "service": "api/v1/{}/services",
    "configmap": "api/v1/{}/configmaps",
    "secret": "api/v1/{}/secrets",
    "serviceaccount": "api/v1/{}/serviceaccounts",
    "deployment": "apis/apps/v1/{}/deployments",
    "poddisruptionbudget": "apis/policy/v1/{}/poddisruptionbudgets",
    "event": "apis/events.k8s.io/v1/{}/events",
}

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


def http(
    url: str, data: bytes | None = None, headers: dict[str, str] | None = None, timeout_s: float = 10
) -> str:
    """One request, without the proxies of the environment."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, data, headers or {}), timeout=timeout_s) as answer:
        return answer.read().decode()


def complete(url: str, prompt: str, output_tokens: int) -> float:
    """One completion by an engine; the seconds it took."""
    body = {"model": "builtin/tiny-llama", "prompt": prompt, "max_tokens": output_tokens}
    started = time.monotonic()
    http(f"{url}/v1/completions", json.dumps(body).encode(), JSON, timeout_s=120)
    return time.monotonic() - started


@dataclass
class Cluster:
    """The cluster of `.cluster/cluster.json`: written to by kubectl, read through one ``kubectl proxy``.

    What tests wait for they ask for again and again, and each kubectl takes a tenth of a second of a CPU.
    """

    state: dict[str, Any]
    proxy: str

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
        try:
            return json.loads(http(f"{self._url(kind, namespace)}/{name}"))
        except urllib.error.HTTPError as error:
            if error.code != HTTPStatus.NOT_FOUND:
                raise
            return {}

    def list(self, kind: str, namespace: str, selector: str = "") -> list[dict[str, Any]]:
        query = urllib.parse.urlencode({"labelSelector": selector})
        return list(json.loads(http(f"{self._url(kind, namespace)}?{query}"))["items"])

    def _url(self, kind: str, namespace: str) -> str:
        return f"{self.proxy}/{API_PATHS[kind].format(f'namespaces/{namespace}')}"

    def pods(self, namespace: str, name: str = "chat") -> list[dict[str, Any]]:
        """Engine pods that are not going."""
        pods = self.list("pod", namespace, f"kvpilot.io/name={name}")
        return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]

    def prometheus(self, query: str) -> list[dict[str, Any]]:
        url = f"{self.state['prometheus']['url']}/api/v1/query"
        return json.loads(http(url, urllib.parse.urlencode({"query": query}).encode()))["data"]["result"]


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

    def start(self, prometheus: str | None = None) -> None:
        """``prometheus`` is the URL of another one than the cluster's."""
        self.ports = {"metrics": free_port(), "alerts": free_port()}
        url = prometheus or self.cluster.state["prometheus"]["url"]
        sources = {"default": {"url": url, "scrapeInterval": "1s"}}
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
            self.process = subprocess.Popen(command, stderr=log, stdout=log)
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


@dataclass
class Release:
    """The operator by Helm in a namespace of its own."""

    cluster: Cluster
    namespace: str
    values: Path

    def helm(self, *arguments: str) -> str:
        state = self.cluster.state
        command = [
            state["helm"],
            f"--kubeconfig={state['kubeconfig']}",
            f"--namespace={self.namespace}",
            *arguments,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
        assert done.returncode == 0, f"helm {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout

    def install(self, *arguments: str) -> None:
        self.helm(
            "install",
            "kvpilot",
            str(CHART),
            f"--values={self.values}",
            "--wait",
            "--timeout=120s",
            *arguments,
        )

    def upgrade(self, *arguments: str) -> None:
        self.helm(
            "upgrade",
            "kvpilot",
            str(CHART),
            f"--values={self.values}",
            "--wait",
            "--timeout=120s",
            *arguments,
        )

    def uninstall(self) -> None:
        self.helm("uninstall", "kvpilot", "--wait", "--timeout=60s")

    def pods(self) -> list[dict[str, Any]]:
        selector = "app.kubernetes.io/component=operator"
        return list(self.cluster.list("pod", self.namespace, selector))


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
            times = [
                complete(
                    f"http://{host}:8000", f"{host}, {number}: " + f"how is {number}? " * 6, output_tokens
                )
                for number in range(10)
            ]
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


@dataclass
class Users:
    """A closed loop: users who ask again as soon as they have their answer.

    However fast the machine is at the moment, queues are as long as there are users: no load is too light to
    breach an objective or too heavy to be cured, and both arms of a comparison see the same.
    """

    url: str
    number: int
    output_tokens: int
    failures: list[str] = field(default_factory=list)
    _leaving: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(self.number)]
        for thread in self._threads:
            thread.start()

    def _ask(self, user: int) -> None:
        for number in itertools.count():
            if self._leaving.is_set():
                return
            try:
                complete(self.url, f"User {user} asks for the {number}th time. " * 3, self.output_tokens)
            except OSError as error:
                self.failures.append(f"user {user}, request {number}: {error}")

    def stop(self) -> None:
        self._leaving.set()
        for thread in self._threads:
            thread.join()


@dataclass
class Scene:
    """Two engines with one worker each, and more users than they serve in time."""

    cluster: Cluster
    namespace: str
    uids: list[str]
    users: Users

    @property
    def status(self) -> dict[str, Any]:
        return self.cluster.get("kvcd", "chat", self.namespace).get("status", {})

    def outcomes(self) -> list[str]:
        return [f"{item['rule']}: {item['outcome']}" for item in self.status.get("decisions", ())]

    def generation(self, uid: str) -> float:
        """Of the configuration that an engine runs, as it says itself."""
        rows = self.cluster.prometheus(f'kvpilot_config_generation{{pod_uid="{uid}"}}')
        return float(rows[0]["value"][1])

    def wait_for(self, state: str) -> None:
        """Until the status says that state of the tuner, as soon as it is written."""
        watch = subprocess.Popen(
            [
                self.cluster.state["kubectl"], f"--kubeconfig={self.cluster.state['kubeconfig']}", "get",
                "kvcd", "chat", f"--namespace={self.namespace}", "--watch",
                "-o=jsonpath={.status.tuning.state}{'\\n'}",
            ],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        too_late = threading.Timer(150, watch.kill)
        too_late.start()
        assert watch.stdout is not None
        seen = []
        for line in watch.stdout:
            seen.append(line.strip())
            if seen[-1] == state:
                break
        too_late.cancel()
        watch.kill()
        watch.wait()
        assert seen[-1:] == [state], f"the change never came to {state}: {seen}; {self.outcomes()}"

    def ended(self) -> bool:
        """No change is in flight, and every engine runs the last known good configuration."""
        held = yaml.safe_load(
            self.cluster.get("configmap", "chat-config", self.namespace)["data"]["config.yaml"]
        )
        running = {self.generation(uid) for uid in self.uids}
        return "change" not in self.status["tuning"] and running == {float(held["generation"])}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if not STATE.exists():
        reason = "no cluster: run `make cluster-up`"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    state = json.loads(STATE.read_text())
    command = [state["kubectl"], f"--kubeconfig={state['kubeconfig']}", "proxy", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as proxy:
        try:
            assert proxy.stdout is not None
            address = proxy.stdout.readline().split()[-1]
            yield Cluster(state, f"http://{address}")
        finally:
            proxy.kill()


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
def chart_values(cluster: Cluster) -> dict[str, Any]:
    """The operator's image as it was built for the cluster, and Prometheus as pods reach it."""
    repository, _, tag = cluster.state["images"]["operator"].rpartition(":")
    return {
        "image": {"repository": repository, "tag": tag, "pullPolicy": "Never"},
        "sources": {"default": {"url": cluster.state["prometheus"]["url"], "scrapeInterval": "1s"}},
        "paceScale": PACE_SCALE,
    }


@pytest.fixture
def release(cluster: Cluster, chart_values: dict[str, Any], tmp_path: Path) -> Iterator[Release]:
    """The chart in a namespace that is deleted afterwards; its pods' logs are kept in the test's folder."""
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump(chart_values))
    made = Release(cluster, f"kvpilot-{uuid.uuid4().hex[:6]}", values)
    cluster.kubectl("create", "namespace", made.namespace)
    yield made
    told = cluster.kubectl("describe", "pods", f"--namespace={made.namespace}", check=False)
    (tmp_path / "operator.txt").write_text(told)
    for pod in made.pods():
        log = cluster.kubectl("logs", f"--namespace={made.namespace}", pod["metadata"]["name"], check=False)
        (tmp_path / f"{pod['metadata']['name']}.log").write_text(log)
    cluster.kubectl("delete", "namespace", made.namespace, "--timeout=60s")


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


def engines(cluster: Cluster, namespace: str) -> list[tuple[str, int]]:
    """UIDs and restarts of the engine pods."""
    return sorted(
        (pod["metadata"]["uid"], sum(s["restartCount"] for s in pod["status"]["containerStatuses"]))
        for pod in cluster.pods(namespace)
    )


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


SHORT, USERS = 8, 16
"""Tokens of an answer: few, so that even a busy machine serves enough requests to judge by. Users: eight for
each engine, so that an answer takes four times what the objective allows, or twice on a faster machine."""

EDGES_MS = (50, 100, 150, 200, 250, 300, 400, 500, 750, 1000, 1500, 2000, 3000, 5000, 10000, 30000)


@pytest.fixture
def overload(
    cluster: Cluster, namespace: str, manifest: Callable[..., dict[str, Any]], serve: Any, load: Load
) -> Iterator[Callable[[], Scene]]:
    """Makes the scene, once an operator runs; the users leave in the end."""
    made: list[Scene] = []

    def begin() -> Scene:
        config = {"numWorkers": 1, "batchSize": 16, "maxTokens": 16384, "maxQueue": 10000}
        quiet = {"config": config, "replicas": 2, "cpu": "400m"}
        serve(manifest(tuning={"mode": "Off"}, **quiet))
        alone = max(load.one_at_a_time([pod["status"]["podIP"] for pod in cluster.pods(namespace)], SHORT))
        edge = next(edge for edge in EDGES_MS if edge >= alone * 2000)
        limits = {
            "latency": {"p50Ms": edge, "p95Ms": EDGES_MS[min(EDGES_MS.index(edge) + 3, 15)]},
            "throughput": {"target": 0},
            "hitRate": "0%",
            "errors": "20%",
        }
        cluster.apply(manifest(objectives=limits, **quiet))
        uids = sorted(pod["metadata"]["uid"] for pod in cluster.pods(namespace))
        made.append(Scene(cluster, namespace, uids, Users(load.url, USERS, SHORT)))
        made[0].users.start()
        return made[0]

    yield begin
    for scene in made:
        scene.users.stop()


@pytest.fixture
def kit() -> dict[str, Any]:
    """Helpers of this file for the test modules, which cannot import it."""
    return {
        "eventually": eventually,
        "condition": condition,
        "http": http,
        "trusted": trusted,
        "free_port": free_port,
        "engines": engines,
    }
