"""The one file that the end-to-end tests read: what is where in the cluster that is up."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from scripts.cluster.layout import REPO, STATE_FILE, Layout


@dataclass(frozen=True)
class EngineEnvironment:
    """What an engine pod mounts in place of a real engine image, several GiB large.

    `mounts` are directories of the node, for hostPath volumes, read-only at the same paths, `python` in them.
    """

    python: str
    mounts: list[str]


@dataclass(frozen=True)
class State:
    """Contents of `.cluster/cluster.json`. Paths are absolute; URLs are reachable from this machine.

    `exec_prefix` runs a command inside the cluster's network (empty on kind), `host_ip` is this machine as
    pods see it. The engine's environment is for pods on `images["engine_host"]`.
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
        """Write the file, whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n")
        partial.rename(file)


def engine_environment() -> EngineEnvironment:
    """The interpreter that runs this, and the directories that it needs to be the same elsewhere."""
    python = Path(sys.executable)
    # The packages and not the whole checkout: its own folder may be closed to the pods' user.
    sources = {REPO / "engine", REPO / "operator"}
    needed = {Path(sys.prefix), Path(sys.base_prefix), python.resolve().parents[1], *sources}
    return EngineEnvironment(str(python), [str(path) for path in outermost(needed)])


def outermost(paths: Iterable[Path]) -> list[Path]:
    """The paths that are not below another one of them, sorted."""
    unique = sorted(set(paths))
    return [path for path in unique if not any(other in path.parents for other in unique)]


def prometheus_entry(layout: Layout, host: str, program: Path) -> dict[str, str]:
    """Where Prometheus is, given the address that it is reached at, and which program it is."""
    return {
        "program": str(program),
        "url": f"http://{host}:9090",
        "config": str(layout.prometheus_file),
        "rules_dir": str(layout.rules),
    }


def alertmanager_entry(layout: Layout, host: str) -> dict[str, str]:
    """Where Alertmanager is, given the address that it is reached at."""
    return {"url": f"http://{host}:9093", "config": str(layout.alertmanager_file)}
