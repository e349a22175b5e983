"""Starts the core process of a front, with one end of a socket pair."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import msgspec

from kvpilot_engine.errors import StartError
from kvpilot_engine.ipc.messages import CoreStart

THREADS_VARIABLE = "KVPILOT_TORCH_THREADS"
"""Environment variable with the number of torch threads of a core on a CPU; 1 without it."""

_MAX_THREADS = 1024

_SOCKET_BYTES = 1 << 20


def _threads() -> str:
    """The number of torch threads, checked here so that the error names the variable."""
    threads = os.environ.get(THREADS_VARIABLE, "1")
    if not threads.isdecimal() or not 1 <= int(threads) <= _MAX_THREADS:
        raise StartError(
            f"{THREADS_VARIABLE}: must be a whole number from 1 to {_MAX_THREADS}, got {threads!r:.80}"
        )
    return threads


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """The front's end and the core's end of a new socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
    return ours, theirs


class CoreProcess:
    """A spawned core process and the front's end of its socket.

    Spawn it from a thread that lives as long as the front does: the parent-death signal follows the thread.
    """

    def __init__(self, start: CoreStart) -> None:
        threads = _threads()
        self.socket, theirs = socket_pair()
        environment = {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
        }
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "kvpilot_engine.core.process",
                    str(theirs.fileno()),
                    str(os.getpid()),
                ],
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                env={**environment, **os.environ},
            )
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(start))
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it died at once, which the client notices by the closed socket

    @property
    def pid(self) -> int:
        """Process id of the core."""
        return self._process.pid

    def end(self, timeout_s: float) -> str:
        """Wait for its end, kill it after ``timeout_s``; how it ended, in words."""
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        return f"signal {-status}" if status < 0 else f"exit status {status}"
