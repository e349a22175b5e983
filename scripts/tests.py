"""Run the tests: those that may share the machine beside each other, then the others one by one.

``make test-unit``, ``test-local`` and ``test-e2e`` call this. End-to-end tests have a real control plane,
which is started for them when it is down, and then stopped again. Where none can be had they are skipped, and
this says why; with ``CI=true`` that is a failure.

    python -m scripts.tests local -k rules
    python -m scripts.tests e2e --durations=20
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from scripts.cluster.layout import REPO, STATE_FILE

TOGETHER = ("-n", "logical", "--dist", "loadfile", "--no-loadscope-reorder")


def _pytest(*arguments: str) -> int:
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    return subprocess.run(command, cwd=REPO, check=False).returncode


def run(selection: str, arguments: list[str]) -> int:
    """Exit code of the tests that a marker expression selects."""
    codes = [
        _pytest("-m", f"{selection} and not alone", *TOGETHER, *arguments),
        _pytest("-m", f"{selection} and alone", *arguments),
    ]
    # With a choice such as `-k`, one of both may have nothing to run.
    ran = [code for code in codes if code != pytest.ExitCode.NO_TESTS_COLLECTED]
    return next(filter(None, ran), 0 if ran else int(pytest.ExitCode.NO_TESTS_COLLECTED))


def _cluster(verb: str) -> int:
    return subprocess.run([sys.executable, "-m", "scripts.cluster", verb], cwd=REPO, check=False).returncode


def end_to_end(arguments: list[str]) -> int:
    """Exit code of the tests on a control plane, or 0 with a sentence when they cannot run here."""
    was_up = STATE_FILE.exists()
    if code := _cluster("up"):
        if not was_up:
            _cluster("down")
        if os.environ.get("CI") == "true":
            print("e2e: no control plane, and CI=true requires one", file=sys.stderr)
            return code
        print("e2e: skipped, no control plane here (reason above); `make cluster-up` starts one")
        return 0
    try:
        return run("e2e", arguments)
    finally:
        if not was_up:
            _cluster("down")


def main(arguments: list[str]) -> int:
    """Exit code of what was asked for."""
    match arguments:
        case ["unit", *rest]:
            return _pytest("-m", "not e2e and not slow", *TOGETHER, *rest)
        case ["local", *rest]:
            return run("not e2e", rest)
        case ["e2e", *rest]:
            return end_to_end(rest)
        case _:
            print(
                f"tests: {' '.join(arguments) or 'nothing'}: allowed are unit, local and e2e", file=sys.stderr
            )
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
