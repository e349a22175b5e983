"""Progress lines with elapsed time, and the one exception that ends a command with a clear line."""

from __future__ import annotations

import sys
import time

_started = time.monotonic()


class ClusterError(Exception):
    """Something of the cluster failed; the message is all that the user reads."""

    exit_code = 1


class MissingPackagesError(ClusterError):
    """The machine lacks packages that are not installed without being asked to."""

    exit_code = 2


def say(message: str) -> None:
    """Print one progress line, with the seconds since the command began."""
    print(f"[{time.monotonic() - _started:6.1f} s] {message}", file=sys.stderr, flush=True)
