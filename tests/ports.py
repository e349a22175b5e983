"""Ports for the programs that tests start."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A port that nothing listens on at the moment, for a program that must be told one."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
