"""The operator as a process of this machine, and as a pod that the chart installs."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from scripts.manifests import CHART
from tests.e2e.cluster import Cluster, eventually, http
from tests.ports import free_port

PACE_SCALE = 0.4
"""Factor on pace Fast: windows of 4 and 24 s, the shortest with a scrape each second."""

ALERTS_TOKEN = "e2e-alerts-token"

SWITCH = "tuning-switch"
"""ConfigMap in the operator's namespace that switches tuning off."""


@dataclass
class Operator:
    """The operator as a process of this machine, watching one namespace."""

    cluster: Cluster
    namespace: str
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    ports: dict[str, int] = field(default_factory=dict)

    def start(self, prometheus: str | None = None, pace_scale: float = PACE_SCALE) -> None:
        """Start it and wait for /healthz; ``prometheus`` is a URL that replaces the cluster's."""
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
            f"--pace-scale={pace_scale}",
            f"--metrics-port={self.ports['metrics']}",
            f"--alerts-port={self.ports['alerts']}",
            f"--tuning-configmap={self.namespace}/{SWITCH}",
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
        """Values of one metric of the operator by label text."""
        page = http(f"http://127.0.0.1:{self.ports['metrics']}/metrics")
        found = re.findall(rf"^{name}(\{{[^}}]*\}})? (\S+)$", page, re.MULTILINE)
        return {labels: float(value) for labels, value in found}

    def lines(self) -> list[dict[str, Any]]:
        """The parsed log lines."""
        lines = []
        for line in self.log.read_text().splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        return lines

    def stop(self) -> int:
        """Send SIGTERM, as Kubernetes does, and wait; its exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(90)

    def kill(self) -> None:
        """Send SIGKILL, as if the node lost power."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(60)


@dataclass
class Release:
    """The operator, installed by Helm in its own namespace."""

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
        self._deploy("install", *arguments)

    def upgrade(self, *arguments: str) -> None:
        self._deploy("upgrade", *arguments)

    def _deploy(self, verb: str, *arguments: str) -> None:
        self.helm(
            verb, "kvpilot", str(CHART), f"--values={self.values}", "--wait", "--timeout=120s", *arguments
        )

    def uninstall(self) -> None:
        self.helm("uninstall", "kvpilot", "--wait", "--timeout=60s")

    def pods(self) -> list[dict[str, Any]]:
        selector = "app.kubernetes.io/component=operator"
        return list(self.cluster.list("pod", self.namespace, selector))
