"""Progress lines with elapsed time, and the exceptions that end a command with one line of error."""

from __future__ import annotations

import sys
import time

_started = time.monotonic()


class ClusterError(Exception):
    """An operation on the cluster failed. The user sees only the message."""

    exit_code = 1


class MachineNotReadyError(ClusterError):
    """Root privileges or system packages are missing; nothing has been changed."""

    exit_code = 2


def say(message: str) -> None:
    """Print one progress line, with the seconds since the command began."""
    print(f"[{time.monotonic() - _started:6.1f} s] {message}", file=sys.stderr, flush=True)
