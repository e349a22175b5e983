"""Start, drain and the ends of a serving process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import typer
from typer.testing import CliRunner

from kvpilot_engine.__main__ import main

pytestmark = pytest.mark.timeout(300)  # the first test of a session waits until an engine has started

MODEL = "builtin/tiny-llama"


def stream_in_background(engine: Any, tokens: int) -> tuple[threading.Thread, list[str], list[Exception]]:
    text: list[str] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            chunks = engine.openai.completions.create(
                model=MODEL, prompt="A long answer", max_tokens=tokens, stream=True
            )
            text.extend(chunk.choices[0].text for chunk in chunks)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, text, errors


@pytest.mark.slow
def test_sigterm_drains_before_the_exit(victims: list[Any], wait_until: Any) -> None:
    engine = victims[0]
    thread, text, errors = stream_in_background(engine, 600)
    wait_until(lambda: text)
    began = time.monotonic()
    engine.process.send_signal(signal.SIGTERM)
    wait_until(lambda: engine.http.get("/readyz").status_code == 503)
    assert engine.http.get("/readyz").json()["reason"] == "draining"
    assert engine.http.get("/healthz").status_code == 200
    late = engine.http.post(
        "/v1/completions", json={"prompt": "Late, before the door closed", "max_tokens": 2}
    )
    assert late.status_code == 200
    assert late.headers["connection"] == "close"
    thread.join(30)
    assert errors == []
    assert sum(map(len, text)) == 600
    assert engine.process.wait(20) == 0, engine.log
    assert time.monotonic() - began < 20
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{engine.url}/healthz")


@pytest.mark.slow
def test_dead_core_ends_every_request_with_an_error_and_the_process(
    victims: list[Any], wait_until: Any
) -> None:
    engine = victims[1]
    thread, text, errors = stream_in_background(engine, 3000)
    whole: list[httpx.Response] = []

    def ask() -> None:
        body = {"prompt": "Never answered", "max_tokens": 3000}
        whole.append(httpx.post(f"{engine.url}/v1/completions", json=body, timeout=30))

    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: text and engine.metric("kvpilot_requests_running") == 2)
    engine.core.kill()
    thread.join(10)
    asking.join(10)
    assert isinstance(errors[0], openai.APIError)
    assert "core process ended unexpectedly (signal 9)" in str(errors[0])
    assert whole[0].status_code == 503
    assert "core process ended unexpectedly (signal 9)" in whole[0].json()["error"]["message"]
    assert engine.http.get("/healthz").status_code == 503
    assert engine.process.wait(10) == 1
    assert "fatal: the engine's core process ended unexpectedly (signal 9)" in engine.log


@pytest.mark.slow
def test_front_killed_while_the_core_still_loads_leaves_no_orphan(tmp_path: Path, wait_until: Any) -> None:
    command = [sys.executable, "-m", "kvpilot_engine", "--port", "0", "--admin-port", "0"]
    front = psutil.Process(subprocess.Popen(command, stderr=subprocess.DEVNULL).pid)
    core = wait_until(lambda: [child for child in front.children() if child.memory_info().rss > 50e6], 200)[0]
    front.kill()
    front.wait(30)
    wait_until(lambda: not core.is_running() or core.status() == psutil.STATUS_ZOMBIE, 30)


@pytest.mark.slow
def test_sigterm_while_the_core_still_loads_ends_both(tmp_path: Path, wait_until: Any) -> None:
    command = [sys.executable, "-m", "kvpilot_engine", "--port", "0", "--admin-port", "0"]
    front = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    core = wait_until(lambda: psutil.Process(front.pid).children(), 200)[0]
    front.send_signal(signal.SIGTERM)
    assert front.wait(60) == 0
    assert not core.is_running()


def started(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvpilot_engine", "--port", "0", "--admin-port", "0", *options]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ, **environment}, check=False
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"config": {"maxTokens": 5}}, "config.maxTokens: Input should be greater than or equal to 128"),
        ({"config": {"bogus": 5}}, "--config: config.bogus: unknown field"),
        ({"generation": -1}, "--config: generation: Input should be greater than or equal to 0, got -1"),
        ({"generation": 10**24}, "--config: generation: Input should be less than 9223372036854775808"),
        ([1], "must hold a mapping of generation, epoch and config"),
        (b"generation: 2020-13-45", "engine.json is neither YAML nor JSON: month must be in 1..12"),
        (b"\xff\xfe", "engine.json is neither YAML nor JSON: 'utf-8' codec can't decode"),
    ],
)  # fmt: skip
def test_invalid_config_file_is_one_line_and_exit_2(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "engine.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    command = typer.Typer()
    command.command()(main)
    ended = CliRunner().invoke(command, ["--config", str(file)])
    assert ended.exit_code == 2
    assert message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_missing_config_file_unknown_model_and_invalid_limit_are_one_line(tmp_path: Path) -> None:
    missing = started("--config", str(tmp_path / "none.yaml"))
    assert (missing.returncode, "--config: cannot read" in missing.stderr) == (2, True)
    unknown = started("--model", "/no/such/model")
    assert unknown.returncode == 2
    assert "/no/such/model" in unknown.stderr
    limit = started(KVPILOT_MEMORY_LIMIT_BYTES="lots")
    assert limit.returncode == 2
    assert "KVPILOT_MEMORY_LIMIT_BYTES: must be a positive whole number of bytes, got 'lots'" in limit.stderr


def test_invalid_thread_count_and_broken_tokenizer_are_one_line(tmp_path: Path) -> None:
    threads = started(KVPILOT_TORCH_THREADS="abc")
    assert threads.returncode == 2
    assert "error: KVPILOT_TORCH_THREADS: must be a whole number from 1 to 1024, got 'abc'" in threads.stderr
    assert "Traceback" not in threads.stderr
    (tmp_path / "tokenizer.json").write_text("{")
    tokenizer = started("--model", str(tmp_path))
    assert tokenizer.returncode == 2
    assert f"error: model: {tmp_path / 'tokenizer.json'} is no usable tokenizer" in tokenizer.stderr
    assert len(tokenizer.stderr.splitlines()) == 1


def test_port_in_use_is_named(served: Any) -> None:
    port = served.url.rsplit(":", 1)[1]
    ended = started("--port", port)
    assert ended.returncode == 2
    assert f"--port: cannot listen on 127.0.0.1:{port}: Address already in use" in ended.stderr
