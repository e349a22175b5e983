"""Addresses, names and paths of the cluster."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

# A second cluster on the same machine needs another slot and another cache directory.
SLOT = int(os.environ.get("KVPILOT_CLUSTER_SLOT", "0"))
SUFFIX = f"-{SLOT}" if SLOT else ""

REPO = Path(__file__).resolve().parents[2]
STATE_FILE = REPO / ".cluster" / f"cluster{SUFFIX}.json"

# The veth pair between the machine and the cluster's network namespace.
HOST_LINK, NODE_LINK = f"kvp-host{SUFFIX}", f"kvp-node{SUFFIX}"
HOST_IP, NODE_IP, LINK_PREFIX = f"10.98.{SLOT}.1", f"10.98.{SLOT}.2", 30
POD_CIDR = f"10.244.{SLOT}.0/24"
SERVICE_CIDR = f"10.96.{SLOT}.0/24"
API_SERVICE_IP = f"10.96.{SLOT}.1"  # the first of them, always
CLUSTER_DOMAIN = "cluster.local"

NODE_NAME = "kvpilot-node"
API_URL = f"https://{NODE_IP}:6443"

CGROUP_NAME = f"kvpilot{SUFFIX}"  # parent of every pod's cgroup, in each hierarchy
CGROUP_ROOT = Path("/sys/fs/cgroup")


def cache_dir() -> Path:
    """The user's cache directory of this project: builds, images and the running cluster's files."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base).resolve() / "kvpilot"


@dataclass(frozen=True)
class Layout:
    """Paths below one cache directory; `down` removes `run`."""

    cache: Path

    @property
    def run(self) -> Path:
        """State of the running cluster: removed by `down`."""
        return self.cache / "run"

    @property
    def containerd_root(self) -> Path:
        """Image store; survives `down`, because importing the images again takes seconds."""
        return self.cache / "containerd"

    @property
    def containerd_socket(self) -> Path:
        """Socket of this cluster's containerd."""
        return self.run / "containerd.sock"

    @property
    def images(self) -> Path:
        """Image archives."""
        return self.cache / "images"

    @property
    def logs(self) -> Path:
        """One log file per process, overwritten at each start."""
        return self.cache / "logs"

    @property
    def monitoring(self) -> Path:
        """Configuration and data of Prometheus and Alertmanager."""
        return self.run / "monitoring"

    @property
    def rules(self) -> Path:
        """Directory of rule files; Prometheus loads every *.yaml in it."""
        return self.monitoring / "rules"

    @property
    def prometheus_file(self) -> Path:
        """Prometheus' configuration; tests may rewrite it and reload."""
        return self.monitoring / "prometheus.yaml"

    @property
    def alertmanager_file(self) -> Path:
        """Alertmanager's configuration; tests may rewrite it and reload."""
        return self.monitoring / "alertmanager.yaml"

    @property
    def kubeconfigs(self) -> Path:
        """One kubeconfig per component, and `admin` for the tests."""
        return self.run / "kubeconfig"

    @property
    def pki(self) -> Path:
        """The API server's certificate and the service account key."""
        return self.run / "pki"

    @property
    def host_record(self) -> Path:
        """Record of what `up` changed on the machine; `down` restores it."""
        return self.run / "host.json"

    @staticmethod
    def default() -> Layout:
        """The layout in the user's cache directory."""
        return Layout(cache_dir())
