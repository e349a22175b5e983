"""Start, drain and the ends of a serving process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import psutil
import pytest
import typer
from tests.waiting import eventually
from typer.testing import CliRunner

from kvpilot_engine.__main__ import main
from kvpilot_engine.contract import KVCacheConfig
from kvpilot_engine.frontend.session import Session
from kvpilot_engine.frontend.tokenizer import load_tokenizer
from kvpilot_engine.server.app import build_app

pytestmark = pytest.mark.timeout(300)  # the first test of a session waits until an engine has started

MODEL = "builtin/tiny-llama"
LONG = 30_000
"""Tokens of an answer that is under way whenever its test ends it."""


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
def test_draining_engine_serves_until_a_second_signal_ends_it_at_once(victims: Any) -> None:
    engine = victims.lagging
    thread, text, errors = stream_in_background(engine, LONG)
    eventually(lambda: text)
    engine.process.send_signal(signal.SIGTERM)
    eventually(lambda: engine.http.get("/readyz").status_code == 503)
    assert engine.http.get("/readyz").json()["reason"] == "draining"
    assert engine.http.get("/healthz").status_code == 200
    late = engine.http.post(
        "/v1/completions", json={"prompt": "Late, before the door closed", "max_tokens": 2}
    )
    assert late.status_code == 200
    assert late.headers["connection"] == "close"
    engine.process.send_signal(signal.SIGTERM)
    thread.join(60)
    assert "a second signal ended the server at once" in str(errors[0])
    assert engine.process.wait(60) == 0, engine.log


@pytest.mark.slow
def test_sigterm_finishes_open_requests_before_the_exit(victims: Any) -> None:
    """Long before the 600 s that they may take."""
    engine = victims.draining
    thread, text, errors = stream_in_background(engine, 600)
    eventually(lambda: text)
    engine.process.send_signal(signal.SIGTERM)
    thread.join(60)
    assert errors == []
    assert sum(map(len, text)) == 600
    assert engine.process.wait(60) == 0, engine.log
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{engine.url}/healthz")


@pytest.mark.slow
def test_dead_core_ends_every_request_with_an_error_and_the_process(victims: Any) -> None:
    engine = victims.orphan
    thread, text, errors = stream_in_background(engine, LONG)
    whole: list[httpx.Response] = []

    def ask() -> None:
        body = {"prompt": "Never answered", "max_tokens": LONG}
        whole.append(httpx.post(f"{engine.url}/v1/completions", json=body, timeout=200))

    asking = threading.Thread(target=ask)
    asking.start()
    eventually(lambda: text and engine.metric("kvpilot_requests_running") == 2)
    engine.core.kill()
    thread.join(60)
    asking.join(60)
    assert isinstance(errors[0], openai.APIError)
    assert "core process ended unexpectedly (signal 9)" in str(errors[0])
    assert whole[0].status_code == 503
    assert "core process ended unexpectedly (signal 9)" in whole[0].json()["error"]["message"]
    assert engine.process.wait(60) == 1
    assert "fatal: the engine's core process ended unexpectedly (signal 9)" in engine.log


async def test_engine_whose_core_is_gone_fails_its_probes() -> None:
    """A served one does so for a second, and then ends."""
    session = Session(MODEL, KVCacheConfig(), load_tokenizer(MODEL))
    session.client = SimpleNamespace(loss="the core died")  # type: ignore[assignment]
    transport = httpx.ASGITransport(build_app(session))
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
        for probe in ("/healthz", "/readyz"):
            answer = await client.get(probe)
            assert answer.status_code == 503
            assert answer.json() == {"status": "unavailable", "reason": "the core died"}


def ended(process: psutil.Process) -> bool:
    """Whether it runs no more, reaped or not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


@pytest.mark.slow
def test_front_killed_while_the_core_still_loads_leaves_no_orphan() -> None:
    command = [sys.executable, "-m", "kvpilot_engine", "--port", "0", "--admin-port", "0"]
    front = psutil.Process(subprocess.Popen(command, stderr=subprocess.DEVNULL).pid)
    core = eventually(lambda: [child for child in front.children() if child.memory_info().rss > 50e6], 200)[0]
    front.kill()
    front.wait(60)
    eventually(lambda: ended(core))


@pytest.mark.slow
def test_sigterm_while_the_core_still_loads_ends_both() -> None:
    command = [sys.executable, "-m", "kvpilot_engine", "--port", "0", "--admin-port", "0"]
    front = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    core = eventually(lambda: psutil.Process(front.pid).children(), 200)[0]
    front.send_signal(signal.SIGTERM)
    assert front.wait(60) == 0
    eventually(lambda: ended(core))


def started(*options: str, **environment: str) -> tuple[int, str]:
    """Exit status and standard error of a process that ends by itself."""
    command = [sys.executable, "-m", "kvpilot_engine", "--port", "0", "--admin-port", "0", *options]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ, **environment}, check=False
    )
    return ended.returncode, ended.stderr


def refused(*options: str) -> tuple[int, str]:
    """The same, where it ends before it listens: in this process, whose imports are done."""
    command = typer.Typer()
    command.command()(main)
    ended = CliRunner().invoke(command, ["--port", "0", "--admin-port", "0", *options])
    return ended.exit_code, ended.stderr


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
    status, line = refused("--config", str(file))
    assert status == 2
    assert message in line
    assert len(line.splitlines()) == 1


def test_missing_config_file_unknown_model_and_invalid_limit_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, line = refused("--config", str(tmp_path / "none.yaml"))
    assert (status, "--config: cannot read" in line) == (2, True)
    status, line = refused("--model", "/no/such/model")
    assert (status, "/no/such/model" in line) == (2, True)
    monkeypatch.setenv("KVPILOT_MEMORY_LIMIT_BYTES", "lots")
    status, line = refused()
    assert status == 2
    assert "KVPILOT_MEMORY_LIMIT_BYTES: must be a positive whole number of bytes, got 'lots'" in line


def test_invalid_thread_count_and_broken_tokenizer_are_one_line(tmp_path: Path) -> None:
    status, line = started(KVPILOT_TORCH_THREADS="abc")
    assert status == 2
    assert "error: KVPILOT_TORCH_THREADS: must be a whole number from 1 to 1024, got 'abc'" in line
    assert "Traceback" not in line
    (tmp_path / "tokenizer.json").write_text("{")
    status, line = refused("--model", str(tmp_path))
    assert status == 2
    assert f"error: model: {tmp_path / 'tokenizer.json'} is no usable tokenizer" in line
    assert len(line.splitlines()) == 1


def test_port_in_use_is_named(served: Any) -> None:
    port = served.url.rsplit(":", 1)[1]
    status, line = started("--port", port)
    assert status == 2
    assert f"--port: cannot listen on 127.0.0.1:{port}: Address already in use" in line
