"""Run the end-to-end tests on a real control plane: start it when it is down, stop it when it was.

``make test-e2e`` calls this. Where no control plane can be had the tests are skipped, and this says why; with
``CI=true`` that is a failure.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / ".cluster" / "cluster.json"


def _cluster(verb: str) -> int:
    return subprocess.run([sys.executable, "-m", "scripts.cluster", verb], cwd=ROOT, check=False).returncode


def _pytest(*arguments: str) -> int:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *arguments], cwd=ROOT, check=False
    ).returncode


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
        # Most of the time they wait, so two run beside each other where the cluster's state allows it.
        codes = [
            _pytest("-m", "e2e and not alone", "-n", "2", "--dist", "loadfile", *arguments),
            _pytest("-m", "e2e and alone", *arguments),
        ]
        # With a selection such as `-k`, one of both may have nothing to run.
        ran = [code for code in codes if code != pytest.ExitCode.NO_TESTS_COLLECTED]
        return next(filter(None, ran), 0 if ran else int(pytest.ExitCode.NO_TESTS_COLLECTED))
    finally:
        if not was_up:
            _cluster("down")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
