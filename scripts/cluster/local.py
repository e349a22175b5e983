"""The cluster without Docker: processes of this machine in one network namespace."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from scripts import images
from scripts.cluster import control_plane, machine, monitoring, node
from scripts.cluster.base_image import Image, base_image, pause_image
from scripts.cluster.build import build_all
from scripts.cluster.console import ClusterError, say
from scripts.cluster.layout import HOST_IP, NODE_IP, NODE_NAME, STATE_FILE, Layout
from scripts.cluster.packages import BUILD_PACKAGES, NODE_PACKAGES, may_install, require
from scripts.cluster.process import Processes, run
from scripts.cluster.state import State, alertmanager_entry, engine_environment, prometheus_entry

# Tests stop and start these; the cluster counts as healthy without them.
OPTIONAL = ("prometheus", "alertmanager")
CORE = (
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "containerd",
    "kubelet",
    "kube-proxy",
    "coredns",
)
PACKAGES = (*BUILD_PACKAGES, *NODE_PACKAGES)
READY_SECONDS = 60.0


class LocalCluster:
    """One cluster per machine and user, shared by all checkouts."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._store = node.ImageStore(layout)
        self.processes = Processes(layout.run / "processes", layout.logs)

    def build(self) -> dict[str, Path]:
        """Install missing packages if that is allowed, build missing programs; program paths by name.

        Raises:
            ClusterError: packages cannot be installed, no Go is available, or a build failed.
        """
        if may_install(os.environ):
            require(PACKAGES)  # before the long build, so that the command fails at once without root
        return build_all(self._layout.cache)

    def up(self) -> State:
        """Start the cluster; restart it if its programs, images or this code changed.

        Raises:
            ClusterError: a step failed; the processes that this call started are stopped.
        """
        machine.require_root()
        require(PACKAGES)
        programs = self.build()
        base = base_image(self._layout.images)
        pause = pause_image(self._layout.images, programs["pause"])
        operator = images.build("operator", self._layout.cache)
        fingerprint = _fingerprint([*map(str, programs.values()), base.reference, pause.reference])
        wanted = [base, pause, operator]
        if self._reusable(fingerprint, programs):
            say("the cluster is up")
            self._store.load(wanted)
            for name in OPTIONAL:
                self.processes.restart(name)
        else:
            self.down()
            try:
                self._start(programs, wanted, pause)
            except BaseException:
                say("stopping the started processes")
                self.down()
                raise
            (self._layout.run / "fingerprint").write_text(fingerprint)
        self._await_monitoring()
        state = self._state(programs, base, operator)
        state.write()
        return state

    def down(self) -> None:
        """Stop the cluster and restore the machine; no error if there is none."""
        machine.require_root()
        STATE_FILE.unlink(missing_ok=True)
        # Stop the API server first, so that the others have nothing left to finish.
        self.processes.stop("kube-apiserver", grace_s=3)
        rest = [name for name in self.processes.names() if name not in ("containerd", machine.HOLDER)]
        self.processes.stop_many(rest, grace_s=3)
        clean = False
        if self.processes.running("containerd"):
            machine.kill_pods()
            self._store.empty_of_containers()
            self.processes.stop("containerd")
            clean = True
        machine.give_back(self._layout, self.processes)
        if clean:
            self._store.mark_clean()

    def status(self) -> dict[str, bool]:
        """True for each of the processes that runs."""
        return {name: self.processes.running(name) for name in (*CORE, *OPTIONAL)}

    def _reusable(self, fingerprint: str, programs: dict[str, Path]) -> bool:
        """True if a healthy cluster runs that this version of the code started."""
        written = self._layout.run / "fingerprint"
        if not written.exists() or written.read_text() != fingerprint:
            return False
        alive = all(map(self.processes.running, (machine.HOLDER, *CORE)))
        return alive and control_plane.api_ready(self._layout) and self._node_ready(programs["kubectl"])

    def _start(self, programs: dict[str, Path], wanted: list[Image], pause: Image) -> None:
        layout = self._layout
        say("starting the control plane and the node")
        machine.borrow(layout)
        machine.create_namespaces(layout, self.processes)
        control_plane.write_identities(layout)
        self._launch("etcd", programs["etcd"], control_plane.etcd(layout))
        self._launch("kube-apiserver", programs["kube-apiserver"], control_plane.kube_apiserver(layout))
        self._launch("containerd", Path("containerd"), node.containerd(layout, pause.reference))
        self._await("containerd answers", self._store.answers, "containerd")
        self._store.load(wanted)
        self._await("the API server is ready", lambda: control_plane.api_ready(layout), "kube-apiserver")
        control_plane.write_kubeconfigs(layout)
        monitor = layout.kubeconfigs / "monitoring"
        for name, arguments in {
            "kube-controller-manager": control_plane.kube_controller_manager(layout),
            "kube-scheduler": control_plane.kube_scheduler(layout),
            "kubelet": node.kubelet(layout),
            "kube-proxy": node.kube_proxy(layout),
            "coredns": control_plane.coredns(layout),
            "prometheus": monitoring.prometheus(layout, monitor),
            "alertmanager": monitoring.alertmanager(layout),
        }.items():
            self._launch(name, programs[name], arguments)
        self._await("the node is Ready", lambda: self._node_ready(programs["kubectl"]), "kubelet")
        self._await("Services are reachable", lambda: control_plane.service_ready(layout), "kube-proxy")
        self._await("DNS answers", self._dns_ready, "coredns")
        accounts = partial(self._accounts_ready, programs["kubectl"])
        self._await("pods can be created", accounts, "kube-controller-manager")

    def _launch(self, name: str, program: Path, arguments: list[str]) -> None:
        self.processes.start(name, [*machine.enter(self.processes), str(program), *arguments])

    def _await(self, what: str, ready: Callable[[], bool], name: str) -> None:
        self.processes.wait(what, ready, READY_SECONDS, name)
        say(f"  {what}")

    def _await_monitoring(self) -> None:
        for name, port in (("prometheus", 9090), ("alertmanager", 9093)):
            ready = partial(control_plane.answers, f"http://{NODE_IP}:{port}/-/ready")
            self._await(f"{name} is ready", ready, name)

    def _kubectl(self, kubectl: Path, *arguments: str) -> str:
        try:
            return run(
                [kubectl, f"--kubeconfig={self._layout.kubeconfigs / 'admin'}", *arguments], timeout_s=20
            )
        except ClusterError:
            return ""

    def _node_ready(self, kubectl: Path) -> bool:
        path = '-o=jsonpath={.status.conditions[?(@.type=="Ready")].status}'
        return self._kubectl(kubectl, "get", "node", NODE_NAME, path) == "True"

    def _accounts_ready(self, kubectl: Path) -> bool:
        """True if the default service account and its certificate authority exist, which every pod needs."""
        found = self._kubectl(
            kubectl, "get", "serviceaccount/default", "configmap/kube-root-ca.crt", "-n=default", "-o=name"
        )
        return len(found.split()) == 2

    def _dns_ready(self) -> bool:
        """True if CoreDNS reports readiness on the loopback address of the network namespace."""
        fetch = "import urllib.request as r; r.urlopen('http://127.0.0.1:8181/ready', timeout=2)"
        try:
            run([*machine.enter_network(self.processes), "python3", "-c", fetch], timeout_s=10)
        except ClusterError:
            return False
        return True

    def _state(self, programs: dict[str, Path], base: Image, operator: Image) -> State:
        return State(
            provider="local",
            kubeconfig=str(self._layout.kubeconfigs / "admin"),
            node=NODE_NAME,
            host_ip=HOST_IP,
            exec_prefix=tuple(machine.enter_network(self.processes)),
            images={"base": base.reference, "operator": operator.reference, "engine_host": base.reference},
            engine=engine_environment(),
            prometheus=prometheus_entry(self._layout, NODE_IP, programs["prometheus"]),
            alertmanager=alertmanager_entry(self._layout, NODE_IP),
            kubectl=str(programs["kubectl"]),
            helm=str(programs["helm"]),
            promtool=str(programs["promtool"]),
            amtool=str(programs["amtool"]),
        )


def _fingerprint(parts: list[str]) -> str:
    """Hash of the inputs of a running cluster: programs, images and the code of this package."""
    digest = hashlib.sha256("\0".join(parts).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()
