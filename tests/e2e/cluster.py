"""Access to the cluster of `make cluster-up`, and waiting for its state."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar

import pytest
import yaml
from scripts.cluster.layout import STATE_FILE

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

CROWDED = 3.0
"""How much longer a crowded machine may take than the quiet one for which the limits of the tests are."""

T = TypeVar("T")


def cluster_state() -> dict[str, Any]:
    """Content of `.cluster/cluster.json`; without the file the tests are skipped, or fail if CI=true."""
    if not STATE_FILE.exists():
        reason = "no cluster: run `make cluster-up`"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    return json.loads(STATE_FILE.read_text())


def eventually(probe: Callable[[], T], within_s: float, what: str) -> T:
    """The first true value of ``probe``, within ``within_s`` on a quiet machine; a failure shows the last."""
    deadline, last = time.monotonic() + CROWDED * within_s, None
    while time.monotonic() < deadline:
        last = probe()
        if last:
            return last
        time.sleep(0.25)
    return pytest.fail(f"{what}: not within {CROWDED:g} times {within_s:g} s; last: {last!r}")


def http(
    url: str, data: bytes | None = None, headers: dict[str, str] | None = None, timeout_s: float = 10
) -> str:
    """Body of the answer to one request, which ignores the proxies of the environment."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, data, headers or {}), timeout=timeout_s) as answer:
        return answer.read().decode()


@dataclass
class Cluster:
    """The cluster of `.cluster/cluster.json`: writes use kubectl, reads use one ``kubectl proxy``.

    Tests poll for changes, and each call of kubectl costs 0.1 s of CPU time.
    """

    state: dict[str, Any]
    proxy: str = ""

    def command(self, *arguments: str) -> list[str]:
        """Command line of kubectl for the caller to start, such as a watch."""
        return [self.state["kubectl"], f"--kubeconfig={self.state['kubeconfig']}", *arguments]

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        command = self.command(*arguments)
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0 or not check, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def apply(self, *documents: dict[str, Any]) -> None:
        text = yaml.safe_dump_all(documents)
        self.kubectl(
            "apply", "--server-side", "--field-manager=tester", "--force-conflicts", "-f", "-", stdin=text
        )

    def get(self, kind: str, name: str, namespace: str) -> dict[str, Any]:
        """The object; {} if there is none."""
        try:
            return json.loads(http(f"{self._url(kind, namespace)}/{name}"))
        except urllib.error.HTTPError as error:
            if error.code != HTTPStatus.NOT_FOUND:
                raise
            return {}

    def status(self, namespace: str, name: str = "chat") -> dict[str, Any]:
        """Status of a resource; {} until the first one is written, after its objects are made."""
        return self.get("kvcd", name, namespace).get("status", {})

    def list(self, kind: str, namespace: str, selector: str = "") -> list[dict[str, Any]]:
        query = urllib.parse.urlencode({"labelSelector": selector})
        return list(json.loads(http(f"{self._url(kind, namespace)}?{query}"))["items"])

    def _url(self, kind: str, namespace: str) -> str:
        return f"{self.proxy}/{API_PATHS[kind].format(f'namespaces/{namespace}')}"

    def replicas(self, namespace: str) -> int | None:
        """``spec.replicas`` of the Deployment of `chat`; None if there is none."""
        return self.get("deployment", "chat", namespace).get("spec", {}).get("replicas")

    def pods(self, namespace: str, name: str = "chat") -> list[dict[str, Any]]:
        """Engine pods that are not terminating."""
        pods = self.list("pod", namespace, f"kvpilot.io/name={name}")
        return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]

    def engines(self, namespace: str) -> list[tuple[str, int]]:
        """UID and number of restarts of each engine pod."""
        return sorted(
            (pod["metadata"]["uid"], sum(s["restartCount"] for s in pod["status"]["containerStatuses"]))
            for pod in self.pods(namespace)
        )

    def prometheus(self, query: str) -> list[dict[str, Any]]:
        url = f"{self.state['prometheus']['url']}/api/v1/query"
        return json.loads(http(url, urllib.parse.urlencode({"query": query}).encode()))["data"]["result"]


def condition(item: dict[str, Any], name: str) -> dict[str, Any]:
    """A condition of a resource; {} if there is none."""
    found = [c for c in item.get("status", {}).get("conditions", ()) if c["type"] == name]
    return found[0] if found else {}


def trusted(cluster: Cluster, namespace: str, name: str = "chat") -> bool:
    """True if the metrics of every ready replica of the resource are trusted."""
    item = cluster.get("kvcd", name, namespace)
    return (
        condition(item, "MetricsTrusted").get("status") == "True"
        and condition(item, "Ready").get("status") == "True"
    )
