"""Ports for the programs that tests start."""

from __future__ import annotations

import contextlib
import os
import random
import socket

PORTS = range(20_000, 30_000)
"""Below the ranges of outgoing connections and node ports, which could take a port meanwhile."""

_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_mine = list(PORTS[_worker :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))])
random.SystemRandom().shuffle(_mine)


def free_port() -> int:
    """A port that is free now, for a program that cannot choose one itself; each is given once in a run."""
    while True:
        port = _mine.pop()
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
