"""Debian packages of the node and the image builds: always checked, installed only on request."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence

from scripts.cluster.console import ClusterError, MachineNotReadyError, say
from scripts.cluster.process import run

BUILD_PACKAGES = ("buildah", "mmdebstrap", "openssl")
NODE_PACKAGES = (
    "containerd",
    "runc",
    "containernetworking-plugins",
    "iptables",
    "nftables",
    "conntrack",
    "iproute2",
    "ethtool",
    "socat",
)


def missing(wanted: Iterable[str]) -> list[str]:
    """The packages of `wanted` that are not installed."""
    if shutil.which("dpkg-query") is None:
        raise ClusterError("no dpkg on this machine: without Docker the cluster needs Debian 12 or newer")
    done = subprocess.run(
        ["dpkg-query", "--show", "--showformat", "${Package} ${db:Status-Status}\n"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    installed = {line.split()[0] for line in done.stdout.splitlines() if line.endswith(" installed")}
    return [name for name in wanted if name not in installed]


def may_install(environment: Mapping[str, str]) -> bool:
    """True if system packages may be installed: only with CI=true or INSTALL=1."""
    return environment.get("CI", "").lower() == "true" or environment.get("INSTALL") == "1"


def as_root(command: Sequence[str], user_id: int, sudo: str | None) -> list[str]:
    """The command as this user runs it with root privileges; ``sudo`` is the path of sudo, if there is one.

    Raises:
        MachineNotReadyError: the user is not root and the machine has no sudo.
    """
    if user_id == 0:
        return list(command)
    if sudo is None:
        raise MachineNotReadyError("INSTALL=1 needs root or sudo, and this user has neither: run it as root")
    return [sudo, *command]


def require(wanted: Iterable[str]) -> None:
    """Ensure that packages are installed; install the missing ones if that is allowed.

    Raises:
        MachineNotReadyError: packages are missing and installing them was not requested or is not possible.
    """
    lacking = missing(wanted)
    if not lacking:
        return
    command = ["apt-get", "install", "-y", "--no-install-recommends", *lacking]
    if not may_install(os.environ):
        raise MachineNotReadyError(
            f"missing system packages; install them with\n  sudo {' '.join(command)}\n"
            "or run this again with INSTALL=1"
        )
    frontend = as_root(["env", "DEBIAN_FRONTEND=noninteractive"], os.geteuid(), shutil.which("sudo"))
    say(f"installing system packages with apt-get: {', '.join(lacking)}")
    run([*frontend, "apt-get", "update", "-qq"], timeout_s=300)
    run([*frontend, *command], timeout_s=900)
