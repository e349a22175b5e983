"""Run the tests in parallel, then those marked ``alone`` one after another.

``make test`` and its parts call this module. It starts a real control plane for the end-to-end tests if none
is up, and stops it afterwards. If no control plane can run, the last line says that these tests were skipped.
With ``INSTALL=1`` or ``CI=true`` it installs missing system packages, and a skipped test is a failure.

    python -m scripts.tests local -k rules
    python -m scripts.tests e2e --durations=20
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from scripts.cluster.console import ClusterError, MachineNotReadyError
from scripts.cluster.layout import REPO, STATE_FILE
from scripts.cluster.packages import as_root, may_install
from scripts.images import docker_runs

TOGETHER = ("-n", "logical", "--dist", "loadfile", "--no-loadscope-reorder")
SKIPPED_E2E = (
    "NOT EVERYTHING WAS TESTED: the end-to-end tests were SKIPPED, because no Kubernetes control plane "
    "can run here (reason above). To run everything: make test INSTALL=1"
)
PASSED_TO_ROOT = ("PATH", "HOME", "XDG_CACHE_HOME", "KVPILOT_CLUSTER_SLOT", "CI", "INSTALL")


def _run(*command: str) -> int:
    return subprocess.run(command, cwd=REPO, check=False).returncode


def _pytest(*arguments: str) -> int:
    return _run(sys.executable, "-m", "pytest", "-q", *arguments)


def _cluster(verb: str) -> int:
    return _run(sys.executable, "-m", "scripts.cluster", verb)


def run_marked(selection: str, arguments: list[str]) -> int:
    """Exit code of the tests that a marker expression selects."""
    codes = [
        _pytest("-m", f"{selection} and not alone", *TOGETHER, *arguments),
        _pytest("-m", f"{selection} and alone", *arguments),
    ]
    # With a choice such as `-k`, one of the two runs may select no test.
    ran = [code for code in codes if code != pytest.ExitCode.NO_TESTS_COLLECTED]
    return next(filter(None, ran), 0 if ran else int(pytest.ExitCode.NO_TESTS_COLLECTED))


def build_programs() -> int:
    """Build the programs that tests run; exit code of the build if skipping is a failure, else 0."""
    code = _cluster("build")
    return code if may_install(os.environ) else 0


def end_to_end(arguments: list[str]) -> int:
    """Exit code of the tests on a control plane; 0 if they were skipped and skipping is allowed."""
    was_up = STATE_FILE.exists()
    if code := _cluster("up"):
        if not was_up and code != MachineNotReadyError.exit_code:
            _cluster("down")
        if may_install(os.environ):
            print(
                "e2e: no control plane can run here, and CI=true or INSTALL=1 requires one", file=sys.stderr
            )
            return code
        print(SKIPPED_E2E, flush=True)
        return 0
    try:
        return run_marked("e2e", arguments)
    finally:
        if not was_up:
            _cluster("down")


def end_to_end_as_root(arguments: list[str]) -> int:
    """Exit code of the end-to-end tests, run with sudo if the node needs root and INSTALL=1 allows it.

    Raises:
        ClusterError: root is needed, and the machine has no sudo.
    """
    if os.geteuid() == 0 or not may_install(os.environ) or docker_runs():
        return end_to_end(arguments)
    kept = [f"{name}={os.environ[name]}" for name in PASSED_TO_ROOT if name in os.environ]
    tests = ["env", *kept, sys.executable, "-m", "scripts.tests", "e2e", *arguments]
    command = as_root(tests, os.geteuid(), shutil.which("sudo"))
    print("e2e: the cluster's node needs root; running the end-to-end tests with sudo", flush=True)
    return _run(*command)


def main(arguments: list[str]) -> int:
    """Exit code of the requested part of the tests."""
    match arguments:
        case ["programs"]:
            return build_programs()
        case ["unit", *rest]:
            return _pytest("-m", "not e2e and not slow", *TOGETHER, *rest)
        case ["local", *rest]:
            return run_marked("not e2e", rest)
        case ["e2e", *rest]:
            try:
                return end_to_end_as_root(rest)
            except ClusterError as error:
                print(f"error: {error}", file=sys.stderr)
                return error.exit_code
        case _:
            given = " ".join(arguments) or "nothing"
            print(f"tests: {given}: allowed are programs, unit, local and e2e", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
