"""The node: containerd, kubelet and kube-proxy on this machine, with all their paths below the cache."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from scripts.cluster.base_image import Image
from scripts.cluster.console import say
from scripts.cluster.layout import CGROUP_NAME, CLUSTER_DOMAIN, NODE_IP, NODE_NAME, POD_CIDR, Layout
from scripts.cluster.process import run

CNI_PLUGINS = "/usr/lib/cni"
# A marker in the image store after a clean shutdown; without it the store is deleted and filled again.
CLEAN_MARK = "kvpilot-clean"


def containerd_config(layout: Layout, pause: str) -> str:
    """containerd's configuration: the CRI plugin with runc and cgroupfs, all paths below the cache."""
    return f"""version = 2
root = "{layout.containerd_root}"
state = "{layout.run / "containerd"}"
disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
  "io.containerd.internal.v1.tracing",
  "io.containerd.tracing.processor.v1.otlp",
]
[grpc]
address = "{layout.containerd_socket}"
[plugins."io.containerd.internal.v1.opt"]
path = "{layout.run / "opt"}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
restrict_oom_score_adj = true
disable_apparmor = true
netns_mounts_under_state_dir = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{CNI_PLUGINS}"
conf_dir = "{layout.run / "cni"}"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = false
"""


def cni_config(layout: Layout) -> str:
    """A bridge for the pod network; no masquerading, because nothing outside is reachable."""
    bridge = {
        "type": "bridge",
        "bridge": "kvpilot-pods",
        "isGateway": True,
        "ipMasq": False,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "dataDir": str(layout.run / "cni-addresses"),
            "ranges": [[{"subnet": POD_CIDR}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    return json.dumps({"cniVersion": "1.0.0", "name": "kvpilot", "plugins": [bridge]}, indent=1)


def kubelet_config(layout: Layout) -> str:
    """The kubelet's configuration; a full disk of the machine evicts no pod and deletes no image."""
    return json.dumps(
        {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "containerRuntimeEndpoint": f"unix://{layout.containerd_socket}",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{CGROUP_NAME}",
            "failCgroupV1": False,
            "enforceNodeAllocatable": [],
            "failSwapOn": False,
            "makeIPTablesUtilChains": False,
            "clusterDNS": [NODE_IP],
            "clusterDomain": CLUSTER_DOMAIN,
            "resolvConf": "",
            "podLogsDir": str(layout.run / "pod-logs"),
            "volumePluginDir": str(layout.run / "volume-plugins"),
            "syncFrequency": "5s",
            "nodeStatusUpdateFrequency": "5s",
            "kubeAPIQPS": 500,
            "kubeAPIBurst": 1000,
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "evictionHard": {
                "memory.available": "0%",
                "nodefs.available": "0%",
                "nodefs.inodesFree": "0%",
                "imagefs.available": "0%",
                "imagefs.inodesFree": "0%",
            },
            # No authentication: only the API server and this machine can reach the kubelet.
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
        },
        indent=1,
    )


def kube_proxy_config(layout: Layout) -> str:
    """kube-proxy's configuration: nftables; with masquerading a pod can reach itself through its Service."""
    return json.dumps(
        {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "clientConnection": {"kubeconfig": str(layout.kubeconfigs / "kube-proxy")},
            "clusterCIDR": POD_CIDR,
            "hostnameOverride": NODE_NAME,
            "nftables": {"masqueradeAll": True, "minSyncPeriod": "100ms"},
            "conntrack": {
                "maxPerCore": 0,
                "min": 0,
                "tcpEstablishedTimeout": "0s",
                "tcpCloseWaitTimeout": "0s",
            },
        },
        indent=1,
    )


def containerd(layout: Layout, pause: str) -> list[str]:
    """Write containerd's files; return its arguments. Delete an image store without a clean shutdown."""
    mark = layout.containerd_root / CLEAN_MARK
    if layout.containerd_root.exists() and not mark.exists():
        say("the last run did not shut the image store down cleanly: filling it again")
        shutil.rmtree(layout.containerd_root)
    mark.unlink(missing_ok=True)
    (layout.run / "cni").mkdir(parents=True, exist_ok=True)
    (layout.run / "cni" / "kvpilot.conflist").write_text(cni_config(layout))
    file = layout.run / "containerd.toml"
    file.write_text(containerd_config(layout, pause))
    return ["--config", str(file)]


def kubelet(layout: Layout) -> list[str]:
    """Write the kubelet's configuration; return its arguments."""
    file = layout.run / "kubelet.json"
    file.write_text(kubelet_config(layout))
    return [
        f"--config={file}",
        f"--kubeconfig={layout.kubeconfigs / 'kubelet'}",
        f"--root-dir={layout.run / 'kubelet'}",
        f"--cert-dir={layout.run / 'kubelet-pki'}",
        f"--hostname-override={NODE_NAME}",
        f"--node-ip={NODE_IP}",
    ]


def kube_proxy(layout: Layout) -> list[str]:
    """Write kube-proxy's configuration; return its arguments."""
    file = layout.run / "kube-proxy.json"
    file.write_text(kube_proxy_config(layout))
    return [f"--config={file}"]


class ImageStore:
    """The node's images, managed with containerd's client."""

    def __init__(self, layout: Layout) -> None:
        self._ctr = ["ctr", "--address", str(layout.containerd_socket), "--namespace", "k8s.io"]
        self._layout = layout

    def answers(self) -> bool:
        """True if containerd answers."""
        done = subprocess.run([*self._ctr, "version"], capture_output=True, check=False, timeout=20)
        return done.returncode == 0

    def references(self) -> set[str]:
        """Names of the images in the store."""
        return set(run([*self._ctr, "images", "list", "--quiet"]).split())

    def load(self, images: Iterable[Image]) -> None:
        """Import missing images and remove earlier versions of them."""
        known = self.references()
        wanted = {image.reference: image for image in images}
        for reference, image in wanted.items():
            if reference not in known:
                say(f"importing {reference}")
                run([*self._ctr, "images", "import", image.archive], timeout_s=300)
        repositories = {reference.rpartition(":")[0] for reference in wanted}
        if old := [r for r in known if r.rpartition(":")[0] in repositories and r not in wanted]:
            run([*self._ctr, "images", "remove", *old])

    def empty_of_containers(self) -> None:
        """Remove all remaining containers; the images stay for the next start."""
        if tasks := run([*self._ctr, "tasks", "list", "--quiet"]).split():
            # Errors are ignored: a task whose shim has ended cannot be removed and needs no removal.
            subprocess.run(
                [*self._ctr, "tasks", "remove", "--force", *tasks],
                capture_output=True,
                check=False,
                timeout=60,
            )
        if containers := run([*self._ctr, "containers", "list", "--quiet"]).split():
            run([*self._ctr, "containers", "remove", *containers])

    def mark_clean(self) -> None:
        """Mark the store as reusable; containerd must have ended."""
        (Path(self._layout.containerd_root) / CLEAN_MARK).touch()
