"""Completion in shells and in kubectl, and colours, in processes of their own as a shell starts them."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.operator.cli.api_server import ApiServer, serving
from tests.operator.cli.runs import RUN, manifest
from tests.operator.cli.test_top import Engine

from kvpilot_operator.cli import app
from kvpilot_operator.local.state import StateDirectory

PENDING = {
    "id": "d-0042",
    "rule": "workers-up",
    "since": "2026-11-22T09:30:00Z",
    "expires": "2026-11-22T10:30:00Z",
}
COMMAND = "from kvpilot_operator.cli import app; app(prog_name='kvpilot')"
KUBECTL = "from kvpilot_operator.cli.completion import kubectl; kubectl()"


def output(code: str, *arguments: str, cwd: Path, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment}, cwd=cwd, capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.split()


def asking(line: str) -> dict[str, str]:
    """The variables by which a shell asks the command to complete the last word of a line."""
    last = str(line.count(" "))
    return {"_KVPILOT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": last}


def completed(line: str) -> list[str]:
    result = RUN.invoke(app, [], prog_name="kvpilot", env=asking(line))
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout.split()


def test_names_of_runs_and_knobs_are_completed(run: StateDirectory, tmp_path: Path) -> None:
    assert output(COMMAND, cwd=tmp_path, **asking("kvpilot pause c")) == ["chat"]
    assert completed("kvpilot pause c") == ["chat"]
    assert completed("kvpilot pin chat num") == ["numWorkers"]
    assert completed("kvpilot rollback chat --to ") == ["5", "7"]
    assert "status" in completed("kvpilot st")
    document = manifest()
    document["status"] = {**document["status"], "tuning": {"state": "Observe", "pending": [PENDING]}}
    run.write_resource(document)
    assert completed("kvpilot approve chat d") == ["d-0042"]


def test_a_name_is_not_completed_where_there_is_nothing_to_ask(run: StateDirectory) -> None:
    assert completed("kvpilot pause -n nowhere c") == []


def test_contexts_and_the_names_in_them_are_completed(api: ApiServer, tmp_path: Path) -> None:
    assert completed("kvpilot pause --context ") == ["here", "nowhere"]
    assert completed("kvpilot status chat --context h") == ["here"]
    path = tmp_path / "kubeconfig"
    path.write_text(path.read_text().replace("current-context: here", "current-context: nowhere"))
    assert completed("kvpilot pause --context here c") == ["chat"]
    assert completed("kvpilot pause c") == []
    path.unlink()
    assert completed("kvpilot pause --context ") == []


def test_kubectl_completes_the_words_that_it_hands_over(run: StateDirectory, tmp_path: Path) -> None:
    assert output(KUBECTL, "pause", "c", cwd=tmp_path) == ["chat", ":4"]
    assert "pause" in output(KUBECTL, "", cwd=tmp_path)


def test_live_figures_refresh_until_they_are_interrupted(run: StateDirectory, tmp_path: Path) -> None:
    engine = Engine()
    with serving(tmp_path / "unused") as server:
        server.pages = {"/metrics": engine.page}
        run.write_replicas({"engine-0": f"{server.url}/metrics"})
        main, other = pty.openpty()
        # The signal is ignored where the tests run in the background of a shell.
        heeding = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {COMMAND}"
        top = subprocess.Popen(
            [sys.executable, "-c", heeding, "top", "chat", "--interval", "0.5"], stdout=other, cwd=tmp_path
        )
        os.close(other)
        try:
            shown = b""
            while engine.reads < 4 or b"engine-0" not in shown:  # the first table needs two
                shown += os.read(main, 65536)
            top.send_signal(signal.SIGINT)
            rest_of(main)  # until it ends it must not wait for a reader
            assert top.wait(60) == 0
        finally:
            top.kill()
            os.close(main)


def rest_of(terminal: int) -> bytes:
    """What a terminal is sent until no program has it open any more."""
    shown = b""
    with contextlib.suppress(OSError):  # at its end
        while part := os.read(terminal, 65536):
            shown += part
    return shown


def on_terminal(cwd: Path, **environment: str) -> str:
    """What a terminal of 120 columns gets from ``kvpilot status``."""
    main, other = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, "status"], stdout=other, check=False, cwd=cwd, timeout=110,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", **environment},
        )  # fmt: skip
        assert done.returncode == 0
    finally:
        os.close(other)
        shown = rest_of(main)
        os.close(main)
    return shown.decode()


@pytest.mark.parametrize(("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_are_for_terminals_that_want_them(
    run: StateDirectory, tmp_path: Path, environment: dict[str, str], coloured: bool
) -> None:
    shown = on_terminal(tmp_path, **environment)
    assert "p95 breached" in shown
    assert ("\x1b[31m" in shown) == coloured, "red"
