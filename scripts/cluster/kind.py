"""The cluster with Docker: kind, with Prometheus and Alertmanager as processes of this machine.

Routes to pods and Services go through the kind node, so that URLs are the same as without Docker.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

from scripts import images
from scripts.cluster import control_plane, monitoring
from scripts.cluster.base_image import Image
from scripts.cluster.build import KIND, WITH_DOCKER, build_all
from scripts.cluster.console import say
from scripts.cluster.layout import POD_CIDR, SERVICE_CIDR, STATE_FILE, Layout
from scripts.cluster.process import Processes, run
from scripts.cluster.state import State, alertmanager_entry, engine_environment, prometheus_entry

NAME = "kvpilot"
NODE = f"{NAME}-control-plane"
READY_SECONDS = 60.0


def kind_config(mounts: list[str]) -> str:
    """kind's configuration: one node, with the engine environment mounted at the same paths."""
    extra = [{"hostPath": path, "containerPath": path, "readOnly": True} for path in mounts]
    return json.dumps(
        {
            "apiVersion": "kind.x-k8s.io/v1alpha4",
            "kind": "Cluster",
            "networking": {"podSubnet": POD_CIDR, "serviceSubnet": SERVICE_CIDR},
            "nodes": [{"role": "control-plane", "extraMounts": extra}],
        },
        indent=1,
    )


class KindCluster:
    """The same commands as `local.LocalCluster`, and the same state file."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.processes = Processes(layout.run / "processes", layout.logs)

    @property
    def _kubeconfig(self) -> Path:
        return self._layout.kubeconfigs / "admin"

    def build(self) -> dict[str, Path]:
        """Like `local.LocalCluster.build`, with fewer programs: kind's image contains the control plane."""
        return build_all(self._layout.cache, WITH_DOCKER)

    def up(self) -> State:
        """Start the cluster, or update its images if it runs.

        Raises:
            ClusterError: a program or an image cannot be downloaded, built or started.
        """
        programs = self.build()
        operator = images.build("operator", self._layout.cache)
        environment = engine_environment()
        kind = str(programs["kind"])
        if NODE not in _docker("ps --format={{.Names}}").split():
            say("creating the kind cluster")
            file = self._layout.run / "kind.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            self._layout.kubeconfigs.mkdir(parents=True, exist_ok=True)
            file.write_text(kind_config(environment.mounts))
            options = [f"--name={NAME}", f"--config={file}", f"--kubeconfig={self._kubeconfig}"]
            run([kind, "create", "cluster", *options, "--wait=180s"], timeout_s=900)
        self._load(kind, operator)
        self._add_routes()
        self._start_monitoring(programs)
        state = State(
            provider="kind",
            kubeconfig=str(self._kubeconfig),
            node=NODE,
            host_ip=_docker(f"inspect --format={_NETWORK % 'Gateway'} {NODE}"),
            exec_prefix=(),
            images={
                "base": images.DOCKER_BASE,
                "operator": operator.reference,
                "engine_host": images.DOCKER_BASE,
            },
            engine=environment,
            prometheus=prometheus_entry(self._layout, "127.0.0.1", programs["prometheus"]),
            alertmanager=alertmanager_entry(self._layout, "127.0.0.1"),
            kubectl=str(programs["kubectl"]),
            helm=str(programs["helm"]),
            promtool=str(programs["promtool"]),
            amtool=str(programs["amtool"]),
        )
        state.write()
        return state

    def down(self) -> None:
        """Delete the cluster, its routes and its processes; no error if there is none."""
        STATE_FILE.unlink(missing_ok=True)
        self.processes.stop_many(self.processes.names())
        if NODE in _docker("ps --all --format={{.Names}}").split():
            self._route("del", POD_CIDR, SERVICE_CIDR)
            (kind,) = build_all(self._layout.cache, [KIND]).values()
            run([kind, "delete", "cluster", f"--name={NAME}"], timeout_s=180)
        shutil.rmtree(self._layout.run, ignore_errors=True)

    def status(self) -> dict[str, bool]:
        """True for each of the node and the monitoring processes that runs."""
        node = NODE in _docker("ps --format={{.Names}}").split()
        return {NODE: node} | {name: self.processes.running(name) for name in ("prometheus", "alertmanager")}

    def _load(self, kind: str, operator: Image) -> None:
        present = _docker(f"exec {NODE} crictl images --output=json")
        if operator.reference not in present:
            say(f"importing {operator.reference}")
            run([kind, "load", "image-archive", f"--name={NAME}", operator.archive], timeout_s=600)
        if images.DOCKER_BASE not in present:
            say(f"importing {images.DOCKER_BASE}")
            run(["docker", "pull", "--quiet", images.DOCKER_BASE], timeout_s=600)
            run([kind, "load", "docker-image", f"--name={NAME}", images.DOCKER_BASE], timeout_s=600)

    def _add_routes(self) -> None:
        address = _docker(f"inspect --format={_NETWORK % 'IPAddress'} {NODE}")
        self._route("replace", f"{POD_CIDR} via {address}", f"{SERVICE_CIDR} via {address}")

    def _route(self, verb: str, *routes: str) -> None:
        """Change the machine's routes in a privileged container, which needs no root on the host."""
        image = _docker(f"inspect --format={{{{.Config.Image}}}} {NODE}")
        for route in routes:
            _docker(f"run --rm --privileged --network=host --entrypoint=ip {image} route {verb} {route}")

    def _start_monitoring(self, programs: dict[str, Path]) -> None:
        arguments = {
            "prometheus": lambda: monitoring.prometheus(self._layout, self._kubeconfig),
            "alertmanager": lambda: monitoring.alertmanager(self._layout),
        }
        for name, port in (("prometheus", 9090), ("alertmanager", 9093)):
            if not self.processes.running(name):
                self.processes.start(name, [str(programs[name]), *arguments[name]()])
            ready = partial(control_plane.answers, f"http://127.0.0.1:{port}/-/ready")
            self.processes.wait(f"{name} is ready", ready, READY_SECONDS, name)


_NETWORK = "{{.NetworkSettings.Networks.kind.%s}}"


def _docker(command: str) -> str:
    return run(["docker", *command.split()], timeout_s=180).strip()
