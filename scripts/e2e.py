"""Run the end-to-end tests on a real control plane: start it when it is down, stop it when it was.

``make test-e2e`` calls this. Where no control plane can be had the tests are skipped, and this says why; with
``CI=true`` that is a failure.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / ".cluster" / "cluster.json"


def _cluster(verb: str) -> int:
    return subprocess.run([sys.executable, "-m", "scripts.cluster", verb], cwd=ROOT, check=False).returncode


def main(arguments: list[str]) -> int:
    """Exit code of the tests, or 0 with a sentence when they cannot run here."""
    was_up = STATE.exists()
    if code := _cluster("up"):
        if not was_up:
            _cluster("down")
        if os.environ.get("CI") == "true":
            print("e2e: no control plane, and CI=true requires one", file=sys.stderr)
            return code
        print("e2e: skipped, no control plane here (reason above); `make cluster-up` starts one")
        return 0
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "e2e", *arguments]
        return subprocess.run(command, cwd=ROOT, check=False).returncode
    finally:
        if not was_up:
            _cluster("down")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
