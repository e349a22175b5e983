"""A local run on disk, as `kvpilot up` leaves it, for the tests of the commands."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from kvpilot_operator.cli import app
from kvpilot_operator.local.state import StateDirectory

RUN = CliRunner()

STATUS: dict[str, Any] = {
    "replicas": 2,
    "readyReplicas": 2,
    "config": {
        "generation": 7,
        "overlay": [{"knob": "numWorkers", "basedOn": "8", "value": "16", "decision": "d-0003"}],
    },
    "objectives": [
        {"name": "p95", "state": "Breached", "since": "2026-11-22T09:30:00Z"},
        {"name": "errors", "state": "Met", "since": "2026-11-22T09:00:00Z"},
        {"name": "hitRate", "state": "Unknown", "since": "2026-11-22T09:00:00Z"},
    ],
    "tuning": {
        "state": "Observe",
        "epoch": 3,
        "lastGeneration": 7,
        "generations": [
            {"number": 5, "at": "2026-11-22T08:00:00Z", "verdict": "Found"},
            {
                "number": 7,
                "at": "2026-11-22T09:40:00Z",
                "decision": "d-0003",
                "verdict": "Promoted",
                "knobs": '{"numWorkers":16}',
            },
        ],
    },
    "decisions": [
        {
            "id": "d-0003",
            "at": "2026-11-22T09:40:00Z",
            "rule": "workers-up",
            "outcome": "Promoted",
            "summary": "numWorkers 8 -> 16; p95 met.",
        }
    ],
}


def manifest(name: str = "chat", status: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "kvpilot.io/v1alpha1",
        "kind": "KVCacheDeployment",
        "metadata": {"name": name, "namespace": "default", "uid": "u", "generation": 3},
        "spec": {"scaling": {"min": 1, "max": 4}, "tuning": {"mode": "Auto"}, **spec},
        "status": STATUS if status is None else status,
    }


def switched_off(why: str) -> dict[str, Any]:
    """The status while the kill switch keeps tuning off."""
    hold = {"reason": "KillSwitch", "message": why, "since": "2026-11-22T09:30:00Z"}
    metrics = {"reason": "MetricsStale", "message": "no scrape", "since": "2026-11-22T09:30:00Z"}
    return {**STATUS, "tuning": {**STATUS["tuning"], "state": "Hold", "holds": [hold, metrics]}}


def records() -> list[dict[str, Any]]:
    """Two decisions: generation 6 was reverted, 7 was promoted."""
    common = {"rule": "workers-up", "objectives": [], "diagnosis": None}
    return [
        {
            **common,
            "id": "d-0002",
            "at": 1_795_339_000.0,
            "outcome": "Reverted",
            "generation": 5,
            "summary": "numWorkers 8 -> 12 did not help.",
        },
        {
            **common,
            "id": "d-0003",
            "at": 1_795_340_400.0,
            "outcome": "Promoted",
            "generation": 7,
            "summary": "numWorkers 8 -> 16; p95 met.",
        },
    ]


@contextmanager
def running(root: Path, document: dict[str, Any]) -> Iterator[StateDirectory]:
    """The directory of a run that is up while the block runs."""
    state = StateDirectory(document["metadata"]["name"], root / ".kvpilot")
    state.open()
    state.write_resource(document)
    (state.path / "decisions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records()))
    try:
        yield state
    finally:
        state.close()


def kvpilot(*arguments: str) -> Result:
    return RUN.invoke(app, list(arguments))


def started(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, for one that starts more of them."""
    command = [sys.executable, "-c", "from kvpilot_operator.cli import app; app()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)


def ok(*arguments: str) -> str:
    """Standard output of a command that must succeed."""
    result = kvpilot(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str) -> str:
    """The one line of a command that must be refused."""
    result = kvpilot(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    return line
