"""``kvpilot up`` as a user runs it: real engines, one port, edits, signals, invalid input."""

from __future__ import annotations

import json
import re
import signal
import socket
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import yaml
from tests.operator.local.runs import up
from typer.testing import CliRunner

from kvpilot_operator.cli import app
from kvpilot_operator.local.check import CheckResult, CheckStep
from kvpilot_operator.local.command import UpOptions, conclude
from kvpilot_operator.local.session import RunResult
from kvpilot_operator.local.state import StateDirectory
from kvpilot_operator.resource.model import KVCacheDeployment
from kvpilot_operator.resource.resolve import policy_of

MANIFEST: dict[str, Any] = {
    "apiVersion": "kvpilot.io/v1alpha1",
    "kind": "KVCacheDeployment",
    "metadata": {"name": "small"},
    "spec": {
        "profile": "development",
        "engine": {"config": {"dtype": "float32", "maxTokens": 2048, "numWorkers": 2}},
        "tuning": {"mode": "Off", "pace": "Fast"},
        "replicas": 1,
        "rollout": {"drainSeconds": 5},
        "template": {
            "spec": {"containers": [{"name": "engine", "resources": {"limits": {"memory": "2Gi"}}}]}
        },
    },
}


def manifest(path: Path, **spec: Any) -> Path:
    return write(path, yaml.safe_dump({**MANIFEST, "spec": {**MANIFEST["spec"], **spec}}))


def write(path: Path, text: str) -> Path:
    """Write the whole file or nothing: a run that watches it must not see a part."""
    draft = path.with_suffix(".new")
    draft.write_text(text)
    return draft.replace(path)


@pytest.mark.slow
@pytest.mark.timeout(480)
async def test_edits_apply_hot_invalid_ones_are_reported_and_sigint_ends_everything(tmp_path: Path) -> None:
    path = manifest(tmp_path / "small.yaml")
    async with up(tmp_path, str(path)) as run, aiohttp.ClientSession() as session:
        url = (await run.until(r"at (http://\S+) "))[1]
        await run.until("1 replica ready")
        async with session.get(f"{url}/v1/models") as answer:
            model = (await answer.json())["data"][0]["id"]
        body = {"model": model, "prompt": "hello", "max_tokens": 4}
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            assert answer.status == 200
        family = psutil.Process(run.process.pid).children(recursive=True)
        assert len(family) == 2  # front and core

        write(path, path.read_text().replace("numWorkers: 2", "numWorkers: none"))
        reported = await run.until("edit refused")
        assert "spec.engine.config.numWorkers" in reported.string
        assert "the last manifest stays in force" in reported.string

        config = {**MANIFEST["spec"]["engine"]["config"], "numWorkers": 3}
        manifest(path, engine={"config": config})
        await run.until("edit of .* applied")
        await run.until(r"numWorkers 3\b")
        assert psutil.Process(run.process.pid).children(recursive=True) == family

        run.process.send_signal(signal.SIGINT)
        assert await run.ended() == 0
        assert running_still(family) == []
    state = json.loads((tmp_path / ".kvpilot/small/resource.json").read_text())
    assert state["metadata"]["generation"] == 2
    assert state["status"]["observedGeneration"] == 2
    promoted = yaml.safe_load((tmp_path / ".kvpilot/small/config.yaml").read_text())
    assert promoted["config"]["numWorkers"] == 3


@pytest.mark.slow
@pytest.mark.timeout(480)
async def test_second_signal_does_not_wait_and_second_run_is_refused(tmp_path: Path) -> None:
    config = {**MANIFEST["spec"]["engine"]["config"], "maxTokens": 16384}
    path = manifest(tmp_path / "small.yaml", engine={"config": config}, rollout={"drainSeconds": 300})
    async with up(tmp_path, str(path)) as run, aiohttp.ClientSession() as session:
        url = (await run.until(r"at (http://\S+) "))[1]
        await run.until("1 replica ready")
        async with up(tmp_path, str(path)) as second:
            assert await second.ended() == 2
            assert f"small is already up in .kvpilot/small (process {run.process.pid})" in second.lines[-1]
        family = psutil.Process(run.process.pid).children(recursive=True)
        # Answered for longer than the test takes.
        body = {"model": "builtin/tiny-llama", "prompt": "hello", "max_tokens": 12_000, "stream": True}
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            assert await answer.content.readany()
            run.process.send_signal(signal.SIGTERM)
            await run.until("draining")
            run.process.send_signal(signal.SIGTERM)
            assert await run.ended() == 0, "before the end of the drain time"
        assert running_still(family) == []


def running_still(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that do not end within a minute."""
    return list(psutil.wait_procs(processes, 60)[1])


@pytest.mark.slow
@pytest.mark.timeout(480)
async def test_missing_model_ends_the_run_with_the_engines_message(tmp_path: Path) -> None:
    path = manifest(tmp_path / "small.yaml", engine={"model": {"source": "/no/such/model"}})
    async with up(tmp_path, str(path)) as run:
        assert await run.ended() == 2
        assert run.lines[-1].startswith("kvpilot up: ")
        assert "/no/such/model" in run.lines[-1]


@pytest.mark.slow
@pytest.mark.timeout(480)
async def test_trace_is_replayed_and_reported(tmp_path: Path) -> None:
    path = manifest(tmp_path / "small.yaml")
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        "".join(
            json.dumps(
                {
                    "timestamp": index * 400,
                    "input_length": 2048,
                    "output_length": 160,
                    "hash_ids": [1, 2, 3, index % 5],
                }
            )
            + "\n"
            for index in range(40)
        )
    )
    arguments = ("--trace", str(trace), "--speed", "2", "--shrink", "32", "--json", "figures.json")
    async with up(tmp_path, str(path), *arguments, "--report", "report.html") as run:
        assert await run.ended(300) == 0, run.lines
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["load"]["completed"] == 40
    assert figures["load"]["errors"] == {}
    assert figures["load"]["tokens"]["prompt"] == 40 * 64
    assert figures["load"]["hit_rate"] > 0.5
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']?http|@import|url\(""", page)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replicas": -1}, "spec.replicas: Input should be greater than or equal to 0, got -1"),
        ({"tuning": {"mode": "Sometimes"}}, "spec.tuning.mode"),
        ({"engine": {"config": {"numWorkers": 0}}}, "spec.engine.config.numWorkers"),
        ({"objectives": {"latency": {"p50Ms": 120}}}, "must be one of the published edges"),
        (
            {
                "template": {
                    "spec": {"containers": [{"name": "engine", "resources": {"limits": {"memory": "x"}}}]}
                }
            },
            "resources.limits.memory: must be a Kubernetes quantity such as 2Gi, 1.5G or 1e9, got 'x'",
        ),
    ],
)
def test_invalid_manifest_exits_2_with_the_field(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = manifest(tmp_path / "small.yaml", **change)
    result = CliRunner().invoke(app, ["up", str(path)])
    assert result.exit_code == 2
    assert message in result.output
    assert f"kvpilot up: {path}: " in result.output or "spec.template" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--load", "trace"], "--load trace: needs --trace FILE"),
        (["--check"], "--check: needs --load or --trace"),
        (
            ["--load", "chat", "--check", "--tuning", "off"],
            "--check: cannot go with --tuning off, which makes no change",
        ),
        (["--rate", "3"], "--rate: needs --load chat"),
        (["--load", "chat", "--duration", "0"], "--duration: must be above 0 and finite, got 0"),
        (["--duration", "inf"], "--duration: must be above 0 and finite, got inf"),
        (["--trace", "t", "--load", "chat"], "--trace: cannot go with --load chat"),
        (["--trace", "t", "--rate", "3"], "--rate: cannot go with --trace"),
        (["--load", "chat", "--speed", "1"], "--speed: needs --trace FILE"),
        (["--shrink", "1"], "--shrink: needs --trace FILE"),
        (
            ["--json", "out", "--report", "./out"],
            "--report: must be another file than that of --json, got out",
        ),
        (["--json", "small.yaml"], "--json: must be another file than that of MANIFEST, got small.yaml"),
        (["--load", "chat", "--report", "/no/such/report.html"], "--report: must be a file in a directory"),
        (["--trace", "/no/such/trace"], "trace /no/such/trace: cannot be read: No such file"),
    ],
)
def test_invalid_options_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = manifest(tmp_path / "small.yaml")
    result = CliRunner().invoke(app, ["up", str(path), *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / ".kvpilot").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["up", "m", "--port", "70000"],
            "up: --port: Input should be less than or equal to 65535, got 70000",
        ),
        (
            ["up", "m", "--port", "abc"],
            "up: --port: Input should be a valid integer, unable to parse string as an integer, got abc",
        ),
        (["up", "m", "--load", "foo"], "up: --load: 'foo' is not one of 'chat', 'trace'"),
        (["up"], "up: Missing argument 'manifest'"),
        (
            ["explain", "x", "--last", "-1"],
            "explain: --last: Input should be greater than or equal to 0, got -1",
        ),
        (["operator", "--kubeconfig", "/no/such"], "operator: --kubeconfig: file '/no/such' does not exist"),
        (["down"], ": No such command 'down'"),
    ],
)
def test_invalid_command_line_exits_2_with_one_line(arguments: list[str], line: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stderr == f"kvpilot {line}\n".replace("kvpilot :", "kvpilot:")


def test_no_command_shows_the_help() -> None:
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2
    assert "Usage: " in result.output


def test_check_verdict_is_printed_even_if_the_figures_cannot_be_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    resource = KVCacheDeployment.parse(MANIFEST)
    result = RunResult(
        policy=policy_of(resource.spec), check=CheckResult((CheckStep("breach", 1.0, "seen"),) * 3)
    )
    options = UpOptions(
        manifest=Path("small.yaml"), load="chat", trace=None, speed=1, shrink=1, rate=None, duration=None,
        mode=None, tuning=True, check=True, report=None, json_out=Path("/proc/x.json"), port=0, fresh=False,
        pace_scale=1,
    )  # fmt: skip

    assert conclude(options, resource, result, Path()) == 1
    reported = capsys.readouterr()
    assert "check passed: cured: seen" in reported.out
    assert reported.err == "kvpilot up: /proc/x.json: cannot be written: No such file or directory\n"


@pytest.mark.parametrize("option", [["--fresh"], ["--check", "--load", "chat"], []])
def test_run_that_cannot_start_keeps_existing_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = manifest(tmp_path / "small.yaml")
    earlier = tmp_path / ".kvpilot" / "small"
    earlier.mkdir(parents=True)
    kept = {
        name: earlier / name for name in ("resource.json", "config.yaml", "decisions.jsonl", "engine-1.log")
    }
    for name, file in kept.items():
        file.write_text(f"earlier {name}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["up", str(path), "--port", str(port), *option])
    assert result.exit_code == 2
    assert f"kvpilot up: --port: cannot listen on 127.0.0.1:{port}" in result.output
    state = StateDirectory("small")
    state.open()
    result = CliRunner().invoke(app, ["up", str(path), *option])
    state.close()
    assert result.exit_code == 2
    assert "kvpilot up: small is already up in .kvpilot/small" in result.output
    assert {name: file.read_text() for name, file in kept.items()} == {
        name: f"earlier {name}" for name in kept
    }


def test_missing_manifest_exits_2() -> None:
    result = CliRunner().invoke(app, ["up", "/no/such.yaml"])
    assert result.exit_code == 2
    assert "/no/such.yaml: cannot be read: No such file or directory" in result.output
