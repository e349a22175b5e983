"""Tests that `make test` runs, and its last line if it cannot run all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts import tests
from scripts.cluster.console import ClusterError, MachineNotReadyError


class Commands:
    """Record the commands instead of running them; ``codes`` maps a cluster verb to its exit code."""

    def __init__(self, codes: dict[str, int]) -> None:
        self.codes = codes
        self.ran: list[tuple[str, ...]] = []

    def __call__(self, *command: str) -> int:
        self.ran.append(command)
        return self.codes.get(command[-1], 0)

    @property
    def verbs(self) -> list[str]:
        return [command[-1] for command in self.ran if "scripts.cluster" in command]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Commands:
    """A machine without packages, without Docker and without a running cluster; the user is root."""
    commands = Commands({"up": MachineNotReadyError.exit_code, "build": 0})
    monkeypatch.setattr(tests, "_run", commands)
    monkeypatch.setattr(tests, "STATE_FILE", tmp_path / "absent.json")
    monkeypatch.setattr(tests, "docker_runs", lambda: False)
    monkeypatch.setattr(tests.os, "geteuid", lambda: 0)
    monkeypatch.setattr(tests.shutil, "which", lambda program: None)
    for name in ("CI", "INSTALL"):
        monkeypatch.delenv(name, raising=False)
    return commands


def test_last_line_says_that_end_to_end_tests_were_skipped_and_how_to_run_them(
    machine: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tests.main(["e2e"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("NOT EVERYTHING WAS TESTED: the end-to-end tests were SKIPPED")
    assert last.endswith("To run everything: make test INSTALL=1")
    assert machine.verbs == ["up"]


@pytest.mark.parametrize("variable", [("CI", "true"), ("INSTALL", "1")])
def test_skipping_is_a_failure_where_everything_is_required(
    variable: tuple[str, str],
    machine: Commands,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(*variable)
    assert tests.main(["e2e"]) == 2
    assert "requires one" in capsys.readouterr().err
    machine.codes["build"] = 1
    assert tests.main(["programs"]) == 1


def test_failed_build_of_programs_does_not_stop_a_plain_run(machine: Commands) -> None:
    machine.codes["build"] = 1
    assert tests.main(["programs"]) == 0


def test_cluster_that_failed_half_way_is_taken_down(machine: Commands) -> None:
    machine.codes["up"] = ClusterError.exit_code
    assert tests.main(["e2e"]) == 0
    assert machine.verbs == ["up", "down"]


def test_ordinary_user_with_install_runs_the_end_to_end_tests_with_sudo(
    machine: Commands, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tests.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(tests.shutil, "which", lambda program: f"/usr/bin/{program}")
    monkeypatch.setenv("INSTALL", "1")
    monkeypatch.setenv("HOME", "/home/ana")
    assert tests.main(["e2e", "-k", "alerts"]) == 0
    (command,) = machine.ran
    assert command[:2] == ("/usr/bin/sudo", "env")
    assert {"HOME=/home/ana", "INSTALL=1"} <= set(command)
    assert command[-5:] == ("-m", "scripts.tests", "e2e", "-k", "alerts")
    assert "with sudo" in capsys.readouterr().out


def test_install_without_root_and_without_sudo_is_one_clear_line(
    machine: Commands, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tests.os, "geteuid", lambda: 1000)
    monkeypatch.setenv("INSTALL", "1")
    assert tests.main(["e2e"]) == 2
    assert capsys.readouterr().err == (
        "error: INSTALL=1 needs root or sudo, and this user has neither: run it as root\n"
    )
    assert machine.ran == []
