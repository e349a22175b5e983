"""Changes to the machine that the cluster makes and reverts: namespaces, link, cgroups, sysctls."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from scripts.cluster.console import ClusterError, MachineNotReadyError
from scripts.cluster.layout import (
    CGROUP_NAME,
    CGROUP_ROOT,
    CLUSTER_DOMAIN,
    HOST_IP,
    HOST_LINK,
    LINK_PREFIX,
    NODE_IP,
    NODE_LINK,
    POD_CIDR,
    SERVICE_CIDR,
    Layout,
)
from scripts.cluster.process import Processes, born, end, run

HOLDER = "holder"

# CPU weight of all pods together; by default they would share the weight of one process of the machine.
POD_WEIGHT = {"cpu.shares": "8192", "cpu.weight": "800"}

# The kubelet sets these for the whole machine.
KUBELET_SYSCTLS = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)

# Directories that kubelet, containerd and CNI plugins use regardless of their flags. Inside the cluster's
# mount namespace an empty directory of the cluster is mounted over each.
COVERED = ("/var/lib/kubelet", "/var/lib/cni", "/var/log/containers", "/run/containerd")


def require_root() -> None:
    """Check that the user is root, which a kubelet requires.

    Raises:
        MachineNotReadyError: the user is not root.
    """
    if os.geteuid() != 0:
        raise MachineNotReadyError(
            "without a Docker daemon the cluster's node needs root: run this as root, or start Docker"
        )


def borrow(layout: Layout) -> None:
    """Record the present state of everything on the machine that `up` is going to change."""
    record = {
        "sysctls": {name: (Path("/proc/sys") / name).read_text().strip() for name in _present_sysctls()},
        "created": [path for path in COVERED if not Path(path).exists()],
    }
    layout.run.mkdir(parents=True, exist_ok=True)
    layout.host_record.write_text(json.dumps(record))
    for path in COVERED:
        Path(path).mkdir(parents=True, exist_ok=True)
    for parent in _cgroup_parents():
        (parent / CGROUP_NAME).mkdir(exist_ok=True)
        for file, weight in POD_WEIGHT.items():
            if (parent / CGROUP_NAME / file).exists():
                (parent / CGROUP_NAME / file).write_text(weight)


def _present_sysctls() -> list[str]:
    return [name for name in KUBELET_SYSCTLS if (Path("/proc/sys") / name).exists()]


def enter(processes: Processes) -> list[str]:
    """Command prefix that runs a program in the cluster's network and mount namespaces."""
    pid = _holder_pid(processes)
    return ["nsenter", f"--net=/proc/{pid}/ns/net", f"--mount=/proc/{pid}/ns/mnt", "--"]


def enter_network(processes: Processes) -> list[str]:
    """Command prefix that runs a program in the cluster's network with the machine's mounts."""
    return ["nsenter", f"--net=/proc/{_holder_pid(processes)}/ns/net", "--"]


def _holder_pid(processes: Processes) -> int:
    record = processes.record(HOLDER)
    if record is None:
        raise ClusterError("the cluster is not up")
    return record.pid


def create_namespaces(layout: Layout, processes: Processes) -> None:
    """Start the process that holds the namespaces open, and connect them to the machine with a veth pair."""
    _refuse_taken_addresses()
    processes.start(
        HOLDER, ["unshare", "--net", "--mount", "--propagation", "slave", "--", "sleep", "infinity"]
    )
    pid = _holder_pid(processes)
    own = Path("/proc/self/ns/net").readlink()
    processes.wait("separate namespaces", lambda: Path(f"/proc/{pid}/ns/net").readlink() != own, 10, HOLDER)
    _batch_ip(
        [],
        f"link add {HOST_LINK} type veth peer name {NODE_LINK} netns {pid}",
        f"address add {HOST_IP}/{LINK_PREFIX} dev {HOST_LINK}",
        f"link set {HOST_LINK} up",
    )
    # Without a route a local process cannot send to a Service address, which kube-proxy translates later.
    _batch_ip(
        enter(processes),
        "link set lo up",
        f"address add {NODE_IP}/{LINK_PREFIX} dev {NODE_LINK}",
        f"link set {NODE_LINK} up",
        f"route add {SERVICE_CIDR} dev {NODE_LINK} src {NODE_IP}",
    )
    _batch_ip([], f"route add {POD_CIDR} via {NODE_IP}", f"route add {SERVICE_CIDR} via {NODE_IP}")
    run([*enter(processes), "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"])
    _cover_directories(layout, processes)


def _cover_directories(layout: Layout, processes: Processes) -> None:
    resolv = layout.run / "resolv.conf"
    resolv.write_text(
        f"nameserver {NODE_IP}\nsearch svc.{CLUSTER_DOMAIN} {CLUSTER_DOMAIN}\noptions ndots:5\n"
    )
    commands = [f"mount --bind {resolv} /etc/resolv.conf"]
    for path in COVERED:
        own = layout.run / "covered" / path.strip("/").replace("/", "-")
        own.mkdir(parents=True, exist_ok=True)
        commands.append(f"mount --bind {own} {path}")
    run([*enter(processes), "sh", "-ec", "\n".join(commands)])


def _refuse_taken_addresses() -> None:
    routes = json.loads(run(["ip", "-json", "route", "show"]))
    ours = {POD_CIDR, SERVICE_CIDR}
    taken = [route["dst"] for route in routes if route["dst"] in ours or route.get("dev") == HOST_LINK]
    if taken:
        raise ClusterError(f"the machine already has a route to {taken[0]}, an address range of the cluster")


def _batch_ip(prefix: Sequence[str], *commands: str) -> None:
    run([*prefix, "ip", "-batch", "-"], stdin="\n".join(commands) + "\n")


def kill_pods() -> None:
    """Kill every process in the pods' cgroups."""
    for path in _cgroups():
        for pid in _cgroup_pids(path):
            end(pid, signal.SIGKILL)


def give_back(layout: Layout, processes: Processes) -> None:
    """End every process of the cluster and restore the machine; idempotent, works after a crash."""
    _kill_members(layout, processes)
    run(["sh", "-c", f"ip link delete {HOST_LINK} 2>/dev/null || true"])
    _remove_cgroups()
    if layout.host_record.exists():
        record = json.loads(layout.host_record.read_text())
        for name, value in record["sysctls"].items():
            current = Path("/proc/sys") / name
            if current.read_text().strip() != value:
                current.write_text(value)
        for path in record["created"]:
            # Keep a mount point into which others have put files.
            subprocess.run(["rmdir", "--ignore-fail-on-non-empty", path], check=False, capture_output=True)
    shutil.rmtree(layout.run, ignore_errors=True)


def _kill_members(layout: Layout, processes: Processes) -> None:
    """Kill all processes of the pods' cgroups and the cluster's namespaces, and orphaned shims."""
    record = processes.record(HOLDER)
    alive = record is not None and born(record.pid) == record.born
    namespaces = {_namespace(record.pid, kind) for kind in ("net", "mnt")} if alive and record else set()
    deadline = time.monotonic() + 20
    while members := _members(namespaces - {""}) | _shims(layout):
        if time.monotonic() > deadline:
            raise ClusterError(f"processes {sorted(members)} of the cluster did not end 20 s after SIGKILL")
        for pid in members:
            end(pid, signal.SIGKILL)
        time.sleep(0.02)


def _members(namespaces: set[str]) -> set[int]:
    found = {pid for path in _cgroups() for pid in _cgroup_pids(path)}
    for entry in Path("/proc").iterdir() if namespaces else ():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            pid = int(entry.name)
            if {_namespace(pid, "net"), _namespace(pid, "mnt")} & namespaces:
                found.add(pid)
    return {pid for pid in found if born(pid) is not None}


def _shims(layout: Layout) -> set[int]:
    """Process ids of this containerd's shims; they survive containerd and the holder of the namespaces."""
    socket, found = str(layout.containerd_socket).encode(), set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"containerd-shim" in arguments[0] and socket in arguments:
                found.add(int(entry.name))
    return {pid for pid in found if born(pid) is not None}


def _namespace(pid: int, kind: str) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/{kind}").readlink())
    except OSError:
        return ""


def _cgroup_parents() -> list[Path]:
    """Parents of a top-level cgroup: the root on version 2, each controller on version 1."""
    if (CGROUP_ROOT / "cgroup.controllers").exists():
        return [CGROUP_ROOT]
    return [p for p in CGROUP_ROOT.iterdir() if (p / "cgroup.procs").exists() and not p.is_symlink()]


def _cgroups() -> Iterable[Path]:
    """The cluster's cgroups, children before parents."""
    for parent in _cgroup_parents():
        for directory, _, _ in os.walk(parent / CGROUP_NAME, topdown=False):
            yield Path(directory)


def _cgroup_pids(path: Path) -> list[int]:
    try:
        return [int(line) for line in (path / "cgroup.procs").read_text().split()]
    except OSError:
        return []


def _remove_cgroups() -> None:
    deadline = time.monotonic() + 10
    while left := list(_cgroups()):
        for path in left:
            try:
                path.rmdir()
            except OSError:
                continue
        if time.monotonic() > deadline:
            raise ClusterError(f"cgroup {left[0]} cannot be removed")
        time.sleep(0.02)
