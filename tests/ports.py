"""Ports for the programs that tests start."""

from __future__ import annotations

import contextlib
import random
import socket

PORTS = range(20_000, 30_000)
"""Below the ranges of outgoing connections and node ports, which could take a port meanwhile."""


def free_port() -> int:
    """A port that is free now, for a program that cannot choose one itself."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
