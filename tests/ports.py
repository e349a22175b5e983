"""Ports for the programs that tests start."""

from __future__ import annotations

import contextlib
import random
import socket

PORTS = range(20_000, 30_000)
"""Below those of outgoing connections and node ports: one of them could take it before the program does."""


def free_port() -> int:
    """A port that nothing listens on at the moment, for a program that must be told one."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
