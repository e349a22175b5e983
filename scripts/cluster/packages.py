"""The Debian packages that the node and the image builds need: checked always, installed only when asked."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping

from scripts.cluster.console import ClusterError, MissingPackagesError, say
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
    """Those of the wanted packages that are not installed."""
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
    """System packages are the user's business: only CI=true or INSTALL=1 allows to install them."""
    return environment.get("CI", "").lower() == "true" or environment.get("INSTALL") == "1"


def require(wanted: Iterable[str]) -> None:
    """Make sure that packages are there.

    Raises:
        MissingPackagesError: some are missing and installing was not asked for; names the exact command.
    """
    lacking = missing(wanted)
    if not lacking:
        return
    command = ["apt-get", "install", "-y", "--no-install-recommends", *lacking]
    if not may_install(os.environ):
        raise MissingPackagesError(
            f"missing system packages; install them with\n  sudo {' '.join(command)}\n"
            "or run this again with INSTALL=1"
        )
    say(f"installing {', '.join(lacking)}")
    frontend = ["env", "DEBIAN_FRONTEND=noninteractive"]
    run([*frontend, "apt-get", "update", "-qq"], timeout_s=300)
    run([*frontend, *command], timeout_s=900)
