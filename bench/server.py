"""The engine that a benchmark measures over HTTP."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.command import CannotRunError


@contextmanager
def served(url: str | None, config: Mapping[str, Any]) -> Iterator[str]:
    """The given URL, or that of an engine with a configuration that runs until the block ends."""
    if url is not None:
        yield url
        return
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        port, admin = one.getsockname()[1], two.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "config.json"
        file.write_text(json.dumps({"config": config}))
        process = subprocess.Popen(
            [
                sys.executable, "-m", "kvpilot_engine", "--config", str(file),
                "--port", str(port), "--admin-port", str(admin),
            ]
        )  # fmt: skip
        try:
            wait_ready(port, process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


def wait_ready(port: int, process: subprocess.Popen[bytes], timeout_s: float = 300.0) -> None:
    """Wait until /readyz answers 200.

    Raises:
        CannotRunError: the engine ended, or is not ready after ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise CannotRunError(f"the engine ended with status {process.returncode}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/readyz")
            if connection.getresponse().status == http.client.OK:
                return
        except OSError:
            time.sleep(0.2)
        finally:
            connection.close()
    raise CannotRunError(f"not ready after {timeout_s:g} s")
