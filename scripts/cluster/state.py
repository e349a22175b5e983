"""`.cluster/cluster.json`, the file that describes the running cluster to the end-to-end tests."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from scripts.cluster.layout import REPO, STATE_FILE, Layout


@dataclass(frozen=True)
class EngineEnvironment:
    """Mounts of an engine pod that replace a real engine image, which would have several GiB.

    `mounts` are directories of the node, for hostPath volumes, read-only at the same paths, `python` in them.
    """

    python: str
    mounts: list[str]


@dataclass(frozen=True)
class State:
    """Contents of `.cluster/cluster.json`. Paths are absolute; URLs are reachable from this machine.

    `exec_prefix` runs a command inside the cluster's network (empty on kind); pods reach this machine at
    `host_ip`. The engine environment is for pods with the image `images["engine_host"]`.
    """

    provider: str
    kubeconfig: str
    node: str
    host_ip: str
    exec_prefix: tuple[str, ...]
    images: Mapping[str, str]
    engine: EngineEnvironment
    prometheus: Mapping[str, str]
    alertmanager: Mapping[str, str]
    kubectl: str
    helm: str
    promtool: str
    amtool: str

    def write(self, file: Path = STATE_FILE) -> None:
        """Write the file atomically."""
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n")
        partial.rename(file)


def engine_environment() -> EngineEnvironment:
    """The running interpreter and the directories that it needs on the node."""
    python = Path(sys.executable)
    # Mount the packages, not the checkout: the pods' user may have no access to its parent directory.
    sources = {REPO / "engine", REPO / "operator"}
    needed = {Path(sys.prefix), Path(sys.base_prefix), python.resolve().parents[1], *sources}
    return EngineEnvironment(str(python), [str(path) for path in outermost(needed)])


def outermost(paths: Iterable[Path]) -> list[Path]:
    """The sorted paths without those below another one of them."""
    unique = sorted(set(paths))
    return [path for path in unique if not any(other in path.parents for other in unique)]


def prometheus_entry(layout: Layout, host: str, program: Path) -> dict[str, str]:
    """Entry of Prometheus in the state file: URL at `address`, files and program."""
    return {
        "program": str(program),
        "url": f"http://{host}:9090",
        "config": str(layout.prometheus_file),
        "rules_dir": str(layout.rules),
    }


def alertmanager_entry(layout: Layout, host: str) -> dict[str, str]:
    """Entry of Alertmanager in the state file: URL at `address` and files."""
    return {"url": f"http://{host}:9093", "config": str(layout.alertmanager_file)}
