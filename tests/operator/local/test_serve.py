"""``kvpilot serve`` runs the engine's command line."""

from __future__ import annotations

import subprocess
import sys

import pytest

KVPILOT = ["-c", "from kvpilot_operator.cli import app; app()", "serve"]
ENGINE = ["-m", "kvpilot_engine"]


@pytest.mark.parametrize(
    ("command", "name"), [(KVPILOT, "kvpilot serve"), (ENGINE, "python -m kvpilot_engine")]
)
@pytest.mark.parametrize(("option", "code"), [("--help", 0), ("--no-such", 2)])
def test_usage_names_the_command(command: list[str], name: str, option: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, *command, option], capture_output=True, text=True, check=False, timeout=110
    )
    assert done.returncode == code
    assert f"Usage: {name} [OPTIONS]" in done.stdout + done.stderr
