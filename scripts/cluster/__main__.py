"""Command line: `python -m scripts.cluster build | up | down | status | start NAME | stop NAME | gpu N`."""

from __future__ import annotations

import argparse
import fcntl
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts import images
from scripts.cluster.console import ClusterError, say
from scripts.cluster.kind import KindCluster
from scripts.cluster.layout import STATE_FILE, Layout
from scripts.cluster.local import LocalCluster
from scripts.cluster.process import run


def parser() -> argparse.ArgumentParser:
    """The commands and their arguments."""
    top = argparse.ArgumentParser(
        prog="python -m scripts.cluster", description="A Kubernetes cluster for tests."
    )
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "build", help="build the programs that the cluster and some tests need (minutes, once)"
    )
    commands.add_parser("up", help="start or update the cluster and write .cluster/cluster.json")
    commands.add_parser("down", help="stop the cluster and remove everything that it left on the machine")
    commands.add_parser("status", help="exit code 0 if every process runs")
    for verb in ("start", "stop"):
        commands.add_parser(verb, help=f"{verb} one process, such as prometheus").add_argument("name")
    gpu = commands.add_parser("gpu", help="make the node report this number of nvidia.com/gpu")
    gpu.add_argument("count", type=int)
    return top


@contextmanager
def exclusive(cache: Path) -> Iterator[None]:
    """Lock the cluster, so that only one command at a time changes it; other commands wait."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another command on the cluster")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def gpu_patch(count: int) -> str:
    """The JSON patch that makes a node report GPUs that it does not have."""
    paths = ("/status/capacity/nvidia.com~1gpu", "/status/allocatable/nvidia.com~1gpu")
    return json.dumps([{"op": "add", "path": path, "value": str(count)} for path in paths])


def set_gpus(count: int) -> None:
    """Patch the node of the cluster that is up.

    Raises:
        ClusterError: the count is negative, or no cluster is up.
    """
    if count < 0:
        raise ClusterError(f"gpu count {count} is negative, allowed: 0 or more")
    if not STATE_FILE.exists():
        raise ClusterError("the cluster is not up")
    state = json.loads(STATE_FILE.read_text())
    target = [
        "patch",
        "node",
        state["node"],
        "--subresource=status",
        "--type=json",
        f"--patch={gpu_patch(count)}",
    ]
    run([state["kubectl"], f"--kubeconfig={state['kubeconfig']}", *target])


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0, or the exit code of the `ClusterError` that ended it."""
    options = parser().parse_args(arguments)
    layout = Layout.default()
    cluster = KindCluster(layout) if images.docker_runs() else LocalCluster(layout)
    try:
        with exclusive(layout.cache):
            return _command(cluster, options)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _command(cluster: KindCluster | LocalCluster, options: argparse.Namespace) -> int:
    if options.command == "build":
        cluster.build()
    elif options.command == "up":
        cluster.up()
        say(f"up: {STATE_FILE}")
    elif options.command == "down":
        cluster.down()
        say("down")
    elif options.command == "status":
        status = cluster.status()
        for name, running in status.items():
            print(f"{name:24} {'running' if running else 'stopped'}")
        return 0 if all(status.values()) else 1
    elif options.command == "start":
        cluster.processes.restart(options.name)
    elif options.command == "stop":
        cluster.processes.stop(cluster.processes.require(options.name).name)
    else:
        set_gpus(options.count)
    return 0


if __name__ == "__main__":
    sys.exit(main())
