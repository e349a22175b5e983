"""A benchmark that cannot run exits non-zero with one line that says what is missing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from bench import __main__ as bench
from bench import (
    backtest_speed,
    calibration,
    command,
    first_token,
    knob_effects,
    time_to_cure,
    trace_hit_rate,
)
from bench.command import CANNOT_RUN, FAILED, CannotRunError


def cannot_run(argv: list[str], name: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Standard error of a benchmark that cannot run."""
    module = {
        "backtest_speed": backtest_speed,
        "calibration": calibration,
        "first_token": first_token,
        "knob_effects": knob_effects,
        "time_to_cure": time_to_cure,
        "trace_hit_rate": trace_hit_rate,
    }[name]
    assert command.run(name, lambda: module.main(argv)) == CANNOT_RUN
    return capsys.readouterr().err


def test_missing_trace_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KVPILOT_TRACES", raising=False)
    assert cannot_run([], "trace_hit_rate", capsys) == (
        "trace_hit_rate: cannot run: no trace: give --trace FILE, or set KVPILOT_TRACES to the directory of "
        "mooncake_conversation_first_half.jsonl\n"
    )
    monkeypatch.setenv("KVPILOT_TRACES", str(tmp_path))
    said = cannot_run([], "trace_hit_rate", capsys)
    assert (
        said == f"trace_hit_rate: cannot run: no trace: there is no file {tmp_path / trace_hit_rate.TRACE}\n"
    )


@pytest.mark.parametrize("name", ["first_token", "calibration"])
def test_server_that_does_not_answer_is_a_failure(
    name: str, unused_tcp_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    said = cannot_run(["--url", f"http://127.0.0.1:{unused_tcp_port}"], name, capsys)
    assert said.startswith(f"{name}: cannot run: ")
    assert re.search("refused|[Cc]annot connect|cannot reach", said)
    assert said.count("\n") == 1


def test_unknown_knob_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    said = cannot_run(["--knob", "batchsize"], "knob_effects", capsys)
    assert said.startswith("knob_effects: cannot run: --knob: batchsize: unknown, allowed: batchSize, ")


def test_missing_manifest_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = cannot_run(["--manifest", str(tmp_path / "none.yaml")], "time_to_cure", capsys)
    assert said.startswith("time_to_cure: cannot run: ")
    assert "none.yaml" in said


def test_broken_trace_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "broken.csv"
    trace.write_text("nothing\n")
    said = cannot_run(["--trace", str(trace)], "backtest_speed", capsys)
    assert said.startswith(f"backtest_speed: cannot run: trace {trace}:1: must be ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(("target", "code"), [(0.0, 0), (1e9, FAILED)])
def test_backtest_that_is_too_slow_is_a_failure(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    target: float,
    code: int,
) -> None:
    monkeypatch.setattr(backtest_speed, "TARGET", target)
    monkeypatch.setattr(backtest_speed, "prepare", lambda: None)  # it is for a process of its own
    assert backtest_speed.main(["--duration", "60", "--runs", "1", "--output", str(tmp_path)]) == code
    said = capsys.readouterr().out
    assert ("backtest_speed: FAILED: below 1e+09: step " in said) == bool(code)
    assert "| step | " in (tmp_path / "backtest_speed.md").read_text()


@pytest.mark.parametrize(
    ("code", "verdict"),
    [(0, "passed"), (FAILED, "FAILED"), (CANNOT_RUN, "DID NOT RUN"), (-9, "CRASHED with status -9")],
)
def test_summary_shows_the_result_of_each_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int, verdict: str
) -> None:
    def fake(arguments: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        assert arguments[:2] == [sys.executable, "-m"]
        return subprocess.CompletedProcess(arguments, code if arguments[2] == "bench.step_time" else 0)

    monkeypatch.setattr(bench.subprocess, "run", fake)
    assert bench.main(["step_time", "first_token"]) == (FAILED if code else 0)
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"step_time        {verdict}",
        "first_token      passed",
    ]


def test_other_errors_are_not_hidden() -> None:
    def broken() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command.run("step_time", broken)
    with pytest.raises(CannotRunError, match="no file"):
        trace_hit_rate.find_trace("absent.jsonl")
